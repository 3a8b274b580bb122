"""Gradients of ops that can be taken once: a second differentiation says no instead of being wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
