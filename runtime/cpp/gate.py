"""The low-rank gate of rows (``normfuse::self_gate``) by ``gate.cpp``, as an op with gradients.

Not the norm before it: Inductor fuses that with the residual's sum, forward and backward.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..derivatives import once, self_gate_gradients
from . import library

NAMESPACE = "normfuse_cpp"
#: Widths are whole tiles of the C++.
WIDTHS = 16

_Sizes = ctypes.c_int64 * 3


@functools.cache
def _functions() -> tuple[Any, Any, Any] | None:
    found = library.load("gate")
    if found is None:
        return None
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    forward, backward, sums = (
        getattr(found, f"normfuse_gate{part}") for part in ("", "_backward", "_sums")
    )
    rows = [pointer, integer]
    forward.argtypes = [pointer, *rows, *[pointer] * 2, real, *[pointer] * 2, ctypes.c_int]
    backward.argtypes = [pointer, *rows, *rows, *[pointer] * 3, real, *[pointer] * 4, ctypes.c_int]
    forward.restype = backward.restype = None
    sums.argtypes, sums.restype = [pointer], integer
    return forward, backward, sums


def _rows(x: Tensor) -> Tensor:
    """``[rows, d]`` with numbers of a row next to each other."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _check(y: Tensor, down: Tensor, up: Tensor, *others: Tensor) -> tuple[int, int, int]:
    """Rows, width and rank of what the C++ takes.

    Raises:
        TypeError: not all float32.
        ValueError: shapes that do not fit.
    """
    for t in (y, down, up, *others):
        if t.dtype != torch.float32:
            raise TypeError(f"gates in C++ take float32, got {t.dtype}")
    d, rank = y.shape[-1:].numel(), down.shape[:1].numel()
    if not y.dim() or d % WIDTHS or not rank or down.shape != (rank, d) or up.shape != (d, rank):
        raise ValueError(
            f"gates in C++ take (..., d), (r, d) and (d, r) with d a multiple of {WIDTHS}, got "
            f"{tuple(y.shape)}, {tuple(down.shape)} and {tuple(up.shape)}"
        )
    return math.prod(y.shape[:-1]), d, rank


# not torch.library.custom_op: the checks around it cost as much as a small gate
_lib = torch.library.Library(NAMESPACE, "DEF")
_lib.define("self_gate(Tensor y, Tensor down, Tensor up, float gate_scale) -> (Tensor, Tensor)")
_lib.define(
    "self_gate_backward(Tensor y, Tensor dout, Tensor down, Tensor up, Tensor t, float gate_scale) "
    "-> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_lib, "self_gate", "CPU")
def self_gate(y: Tensor, down: Tensor, up: Tensor, gate_scale: float) -> tuple[Tensor, Tensor]:
    """``y ⊙ gate_scale·σ(silu(y downᵀ) upᵀ)`` and ``y downᵀ``.

    Args:
        y: ``(..., d)``, float32; ``d`` a multiple of 16.
        down: ``(r, d)``; up: ``(d, r)``; float32.

    Returns:
        The gated rows, ``(..., d)``, and ``(rows, r)``; both contiguous. Neither depends on the number of
        threads, nor a row on the others.

    Raises:
        TypeError: not all float32.
        ValueError: shapes that do not fit.
    """
    rows, d, rank = _check(y, down, up)
    functions = _functions()
    if functions is None:  # compiled where there was a library
        t = _rows(y) @ down.t()
        gate = gate_scale * torch.sigmoid(F.silu(t) @ up.t())
        return (_rows(y) * gate).view(y.shape), t
    out, t = y.new_empty(y.shape), y.new_empty((rows, rank))
    if out.numel() == 0:
        return out, t.zero_()
    y, down, up = _rows(y), down.contiguous(), up.contiguous()
    functions[0](
        _Sizes(rows, d, rank),
        y.data_ptr(),
        y.stride(0),
        down.data_ptr(),
        up.data_ptr(),
        gate_scale,
        out.data_ptr(),
        t.data_ptr(),
        torch.get_num_threads(),
    )
    return out, t


@torch.library.impl(_lib, "self_gate_backward", "CPU")
def self_gate_backward(
    y: Tensor, dout: Tensor, down: Tensor, up: Tensor, t: Tensor, gate_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``y``, ``down`` and ``up``; ``t`` is the second result of the forward."""
    rows, d, rank = _check(y, down, up, dout, t)
    if dout.shape != y.shape or t.shape != (rows, rank):
        raise ValueError(
            f"dout must be {tuple(y.shape)} and t {(rows, rank)}, got {tuple(dout.shape)} and "
            f"{tuple(t.shape)}"
        )
    functions = _functions()
    if functions is None:
        dy, ddown, dup = self_gate_gradients(_rows(y), _rows(dout), down, up, t, gate_scale)
        return dy.view(y.shape), ddown, dup
    dy, ddown, dup = y.new_empty(y.shape), down.new_empty((rank, d)), up.new_empty((d, rank))
    if dy.numel() == 0:
        return dy, ddown.zero_(), dup.zero_()
    y, dout, down, up = _rows(y), _rows(dout), down.contiguous(), up.contiguous()
    t, sizes = t.contiguous(), _Sizes(rows, d, rank)
    sums = y.new_empty(functions[2](sizes))
    functions[1](
        sizes,
        y.data_ptr(),
        y.stride(0),
        dout.data_ptr(),
        dout.stride(0),
        down.data_ptr(),
        up.data_ptr(),
        t.data_ptr(),
        gate_scale,
        dy.data_ptr(),
        ddown.data_ptr(),
        dup.data_ptr(),
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    return dy, ddown, dup


@torch.library.register_fake(f"{NAMESPACE}::self_gate", lib=_lib)
def _(y: Tensor, down: Tensor, up: Tensor, gate_scale: float) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty((math.prod(y.shape[:-1]), down.shape[0]))


@torch.library.register_fake(f"{NAMESPACE}::self_gate_backward", lib=_lib)
def _(
    y: Tensor, dout: Tensor, down: Tensor, up: Tensor, t: Tensor, gate_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), down.new_empty(down.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    y, down, up, ctx.gate_scale = inputs
    ctx.save_for_backward(y, down, up, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dout: Tensor, _: Any) -> tuple:
    y, down, up, t = ctx.saved_tensors
    op = torch.ops.normfuse_cpp.self_gate_backward.default
    return *op(y, dout, down, up, t, ctx.gate_scale), None


torch.library.register_autograd(
    f"{NAMESPACE}::self_gate", once(_backward), setup_context=_save, lib=_lib
)


# Per row, width and rank: two products forward; five backward, one of which makes the logits again.
@register_flop_formula(torch.ops.normfuse_cpp.self_gate)  # type: ignore[untyped-decorator]
def _count(y, down, *_, **__):  # type: ignore[no-untyped-def]
    return 4 * math.prod(y) * down[0]


@register_flop_formula(torch.ops.normfuse_cpp.self_gate_backward)  # type: ignore[untyped-decorator]
def _count_backward(y, dout, down, *_, **__):  # type: ignore[no-untyped-def]
    return 10 * math.prod(y) * down[0]
