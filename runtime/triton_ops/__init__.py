"""Kernels as operators (namespace ``normfuse_kernels``), with gradients; needs triton.

Every op is a ``torch.library.triton_op``: in eager mode it launches, under ``torch.compile`` Inductor
sees the launches themselves. Bodies are written for fake and symbolic tensors: they allocate new
contiguous outputs, never look at data and never synchronize. Nothing here is atomic, so results do
not depend on scheduling. Importing this package registers the ops; ``runtime/lower_kernels.py`` puts
them into graphs.

Requirements (checked, ``ValueError``): float16, bfloat16 or float32; the norm runs over the last dim;
gain and bias are ``(d,)``. The products of ``symmetric.py`` take any dtype and device: they compute their
formula where no kernel runs.
"""

from .gated import MAX_RANK, gated_norm, gated_norm_backward
from .launch import DTYPES, KINDS, KernelFailed, failures, required
from .linear import ACTIVATIONS, norm_linear, scaled_linear
from .norms import add_norm, add_row_rstd, norm, norm_backward, row_rstd
from .symmetric import add_product, symmetric_product

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "KINDS",
    "MAX_RANK",
    "KernelFailed",
    "add_norm",
    "add_product",
    "add_row_rstd",
    "failures",
    "gated_norm",
    "gated_norm_backward",
    "norm",
    "norm_backward",
    "norm_linear",
    "required",
    "row_rstd",
    "scaled_linear",
    "symmetric_product",
]
