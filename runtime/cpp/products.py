"""Products of batches of matrices by ``symmetric.cpp``, on plain CPU tensors."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from . import library

DTYPES = (torch.float32, torch.float64)

_Strides = ctypes.c_int64 * 3
_Sizes = ctypes.c_int64 * 4


def runs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether :func:`product` works here; the first call on a machine compiles the library.

    Not under a mode (a tracer, a counter of FLOPs), which would not see it.
    """
    if dtype not in DTYPES or device.type != "cpu":
        return False
    if torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling():
        return False
    return _function(dtype) is not None


def is_plain(x: Tensor) -> bool:
    """Whether memory holds the numbers of ``x`` as it says: no subclass, no transform, nothing lazy."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not torch._is_functional_tensor(x)
        and not x.is_neg()
        and not x._is_zerotensor()
    )


@functools.cache
def _function(dtype: torch.dtype) -> Any:
    found = library.load("symmetric")
    if found is None:
        return None
    call = getattr(found, f"normfuse_product_{str(dtype).removeprefix('torch.')}")
    call.argtypes = [*[ctypes.c_void_p] * 9, *[ctypes.c_double] * 2, *[ctypes.c_int] * 2]
    call.restype = None
    return call


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    base: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    symmetric: bool = False,
) -> Tensor:
    """``out = alpha·a·b + beta·base`` for each matrix of a batch.

    Args:
        a: ``[B, m, k]``, float32 or float64, on the CPU; like the others as :func:`is_plain` says.
        b: ``[B, k, n]``, likewise.
        out: ``[B, m, n]``; overlaps no operand.
        base: ``[B, m, n]``, not read with ``beta`` 0; ``None``: nothing is added.
        symmetric: the result is (``m == n``): its lower triangle is computed and mirrored.

    Results depend neither on the number of threads nor on the batch.
    """
    batch, m, k = a.shape
    n = b.shape[2]
    if out.numel() == 0:
        return out
    if beta == 0.0:
        base = None
    if k == 0:
        return out.zero_() if base is None else torch.mul(base, beta, out=out)
    if out.stride(2) != 1:
        made = product(
            a, b, out.new_empty(out.shape), base=base, alpha=alpha, beta=beta, symmetric=symmetric
        )
        return out.copy_(made)
    a, b = (t if 1 in t.stride()[1:] else t.contiguous() for t in (a, b))
    if base is not None and base.stride(2) != 1:
        base = base.contiguous()
    _function(a.dtype)(
        _Sizes(batch, m, n, k),
        a.data_ptr(),
        _Strides(*a.stride()),
        b.data_ptr(),
        _Strides(*b.stride()),
        None if base is None else base.data_ptr(),
        None if base is None else _Strides(*base.stride()),
        out.data_ptr(),
        _Strides(*out.stride()),
        alpha,
        beta,
        symmetric,
        torch.get_num_threads(),
    )
    return out
