"""Whitening ``(x·xᵀ)^{-1/2}·x`` by the coupled Newton iteration, with the products of ``products.py``.

``Y ← Y·(3I - Z·Y)/2``, ``Z ← (3I - Z·Y)·Z/2`` from ``Y = x·xᵀ``, ``Z = I`` leads ``Z`` to the inverse
root (the coupling of Denman and Beavers, without inverses). All are polynomials in one symmetric matrix,
so that every product is symmetric.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import kernel_products
from . import newton_schulz as ns
from .products import Tiled


def whiten(x: Tensor, iterations: int) -> Tensor:
    """``[B, r, c]``, spectral norms at most 1, to matrices of singular values near 1 (zero for zero).

    On the shorter side, where the inverse root exists for matrices of full rank; the result is the same.
    """
    if _kernels(x) is not None:  # a compiler sees their launches
        return _whiten(x, iterations)
    return whiten_op(x, iterations)


@torch.library.custom_op("normfuse_optim::whiten", mutates_args=())
def whiten_op(x: Tensor, iterations: int) -> Tensor:
    """Operator form of :func:`whiten`: one node of a traced step."""
    return _whiten(x, iterations)


@whiten_op.register_fake
def _(x, iterations):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _kernels(x: Tensor) -> kernel_products.KernelProducts | None:
    batch, rows, cols = x.shape
    return kernel_products.choose(batch, rows, cols, x.dtype, x.device)


def _whiten(x: Tensor, iterations: int) -> Tensor:
    rows, cols = x.shape[-2:]
    native = kernel_products.native(rows, cols, x.dtype, x.device)
    plan = ns.make_plan(rows, cols, (), x.dtype, x.device.type, kernels=_kernels(x), native=native)
    if not plan.halvings:
        return _inverse_root_times(x, iterations, plan.batched).contiguous()
    ways = Tiled(min(rows, cols), plan.halvings)
    return torch.stack([_inverse_root_times(m, iterations, ways) for m in x])


def _inverse_root_times(x: Tensor, iterations: int, ways: Any) -> Tensor:
    tall = x.shape[-2] > x.shape[-1]
    side = min(x.shape[-2:])
    y, z, w, spare = (
        ways.room(name, (*x.shape[:-2], side, side), x) for name in ("y", "z", "w", "spare")
    )
    y = ways.gram(x, tall, y)
    # Z = I makes the first step's products known
    z = ways.plus_identity(-0.5 * y, 1.5, z)
    if iterations > 1:
        y, spare = ways.symmetric(y, y, y, 1.5, -0.5, spare), y
    for i in range(1, iterations):
        w = ways.symmetric(z, y, y, 0.0, 1.0, w)
        if i + 1 < iterations:
            y, spare = ways.symmetric(y, w, y, 1.5, -0.5, spare), y
        z, spare = ways.symmetric(w, z, z, 1.5, -0.5, spare), z
    return ways.apply(x, z, 0.0, tall, x.new_empty(x.shape))
