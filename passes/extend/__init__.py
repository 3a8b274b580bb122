"""Passes that keep the function at insertion and add trainable parameters."""

from __future__ import annotations

from .attention import AffineScaledAttention, InsertGatedAttention
from .norms import AdaRMSNorm, InsertGatedNorm, InsertPreAffine, SeeDNorm

__all__ = [
    "AdaRMSNorm",
    "AffineScaledAttention",
    "InsertGatedAttention",
    "InsertGatedNorm",
    "InsertPreAffine",
    "SeeDNorm",
]
