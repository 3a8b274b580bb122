"""Passes that keep the function at insertion and add trainable parameters."""

from __future__ import annotations

__all__: list[str] = []
