"""What gradients of our ops share: the gate's formula, and a second differentiation that says no."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def self_gate_gradients(
    y: Tensor, dout: Tensor, down: Tensor, up: Tensor, t: Tensor, gate_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``normfuse::self_gate`` on rows ``[n, d]``, for ``y``, ``down`` and ``up``; ``t = y downᵀ``."""
    opened = torch.sigmoid(t)
    inner = t * opened
    gate = torch.sigmoid(inner @ up.t())
    dz = dout * y * (gate_scale * gate * (1 - gate))
    dt = (dz @ up) * (opened * (1 + t * (1 - opened)))
    return dout * (gate_scale * gate) + dt @ down, dt.t() @ y, dz.t() @ inner


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient that says no when it is differentiated in turn."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_depends: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "normfuse's kernels have no second derivatives: where you need them, call the "
            "vocabulary's ops (torch.ops.normfuse)"
        )


def once(backward: Callable) -> Callable:
    """A backward function for one differentiation: a second one would miss what saved statistics
    depend on."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> tuple:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            out = backward(ctx, *grads)
        depends = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        if not depends:
            return out
        return tuple(None if g is None else _NoSecondDerivative.apply(g, *depends) for g in out)

    return run
