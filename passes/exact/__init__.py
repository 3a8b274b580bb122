"""Passes that keep the function to rounding: same function, different graph."""

from __future__ import annotations

from .compress_zero_mean import CompressZeroMean
from .defer_scale import DeferScale
from .fold_affine import FoldAffine
from .fold_batch_norm import FoldBatchNorm
from .fold_static_scale import FoldStaticScale
from .fuse_residual_norm import FuseResidualNorm
from .merge_linears import MergeLinears
from .remove_mean import RemoveMean

__all__ = [
    "CompressZeroMean",
    "DeferScale",
    "FoldAffine",
    "FoldBatchNorm",
    "FoldStaticScale",
    "FuseResidualNorm",
    "MergeLinears",
    "RemoveMean",
]
