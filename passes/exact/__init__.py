"""Passes that keep the function to rounding: same function, different graph."""

from __future__ import annotations

from .compress_zero_mean import CompressZeroMean
from .fold_affine import FoldAffine
from .fold_batch_norm import FoldBatchNorm
from .fuse_residual_norm import FuseResidualNorm
from .remove_mean import RemoveMean

__all__ = ["CompressZeroMean", "FoldAffine", "FoldBatchNorm", "FuseResidualNorm", "RemoveMean"]
