"""The Newton–Schulz iteration on a batch of normalized matrices: forms and cost model.

Two forms of the same polynomial. *Direct* works on the matrix: per step one Gram matrix, one square
and one application, ``4m²n + 2m³`` FLOPs for m×n with m ≤ n. *Gram* works on the m×m Gram matrix and
applies the accumulated polynomial once, ``4m²n`` per segment plus up to ``8m³`` per step; where a
segment ends (a *restart*) the matrix is formed and its Gram matrix taken anew, because the
accumulated factor loses the small singular values to rounding. Every product but the application is
symmetric; ``products.py`` has the ways to compute them.

Shapes below: ``x`` is ``[B, r, c]``, its Gram matrix lives on the shorter side, ``[B, m, m]``; a tall
matrix is never transposed, it is multiplied from the right instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..runtime import cpp
from .coefficients import Schedule
from .kernel_products import KernelProducts
from .products import Native, Tiled, Whole

METHODS = ("auto", "direct", "gram")

#: Shorter sides from which a matrix on a CPU is worked on alone (smaller ones share a batch), and from
#: which, without our C++, tiles pay.
ALONE_FROM = 320
#: What it computes beyond half of a symmetric product, in rows: tiles cross the diagonal.
_CROSSING = 11
#: Side up to which a square on the diagonal is computed whole: smaller ones lose more speed than the
#: triangle saves.
_TILE = 192

#: On a CPU matrices up to this size share a batch with their transposes; turning larger ones costs
#: more than a longer batch gains.
TURN_UP_TO = 2**14


class _Stability(NamedTuple):
    """Rounding of one Gram matrix in a dtype: the spurious eigenvalue, and the spread we accept."""

    spurious: float
    limit: float


#: ``limit`` times the unit roundoff is the share of the error band given to the Gram form.
_STABILITY = {
    torch.float64: _Stability(-1e-14, 1e6),
    torch.float32: _Stability(-1e-5, 2e3),
    torch.float16: _Stability(-4e-4, 2e2),
    torch.bfloat16: _Stability(-4e-3, 2e2),
}

#: What the iteration and the optimizers compute in.
DTYPES = tuple(_STABILITY)


def spread(schedule: Schedule, restarts: tuple[int, ...], spurious: float) -> float:
    """Largest ratio, over the iterations, between entries of the accumulated Gram factor.

    Simulated on eigenvalues 1 … 1e-20 of the Gram matrix, each shifted by ``spurious``: half
    precision produces small negative ones, which the polynomial blows up.
    """
    x = np.logspace(0, -10, 2000)
    r, q, worst = x * x + spurious, np.ones_like(x), 1.0
    with np.errstate(all="ignore"):
        for i, (a, b, c) in enumerate(schedule):
            if i in restarts:
                x = x * q
                r, q = x * x + spurious, np.ones_like(x)
            z = a + r * (b + c * r)
            q, r = q * z, r * z * z
            ratio = np.abs(q).max() / np.abs(q).min()
            worst = max(worst, float(ratio)) if np.isfinite(ratio) else float("inf")
    return worst


@lru_cache(maxsize=256)
def choose_restarts(schedule: Schedule, dtype: torch.dtype) -> tuple[int, ...] | None:
    """Fewest restarts (indices of the iterations they precede) that keep the Gram form stable.

    ``None`` when no three restarts do: then only the direct form is accurate.
    """
    spurious, limit = _STABILITY.get(dtype, _STABILITY[torch.bfloat16])
    for count in range(min(4, max(1, len(schedule)))):
        options = combinations(range(1, len(schedule)), count)
        best = min(((spread(schedule, o, spurious), o) for o in options), default=None)
        if best is not None and best[0] <= limit:
            return best[1]
    return None


@dataclass(frozen=True)
class Plan:
    """How a batch is orthogonalized, and why: ``flops`` is the count the choice was made on.

    On CPUs, ``native``: symmetric products are our C++'s; else ``halvings`` of the side cut them into
    tiles. ``alone``: matrices are worked on one by one. ``kernels`` says which products are ours on GPUs.
    """

    method: str
    restarts: tuple[int, ...]
    halvings: int
    flops: float
    kernels: KernelProducts | None = None
    native: bool = False
    alone: bool = False

    def batched(self, x: Tensor) -> Any:
        """The products of a batch like ``x``."""
        return self.kernels or (Native if self.native and cpp.is_plain(x) else Whole)


def flops(
    rows: int, cols: int, schedule: Schedule, restarts: tuple[int, ...] | None, share: float = 1.0
) -> float:
    """FLOPs for one matrix; ``share`` is the part of a symmetric product that is computed.

    ``restarts=None`` means the direct form. The floor of the symmetric-aware algorithm is
    ``share=0.5``.
    """
    m, n = float(min(rows, cols)), float(max(rows, cols))
    wide, cube = 2 * m * m * n, 2 * m**3
    if restarts is None:
        return sum(wide * share + wide + (cube * share if c else 0.0) for _, _, c in schedule)
    total = (len(restarts) + 1) * (wide * share + wide)
    fresh, last = True, len(schedule) - 1
    for i, (_, _, c) in enumerate(schedule):
        fresh = fresh or i in restarts
        total += cube * share * ((1 if c else 0) + (0 if fresh else 1))
        if i < last and i + 1 not in restarts:
            total += 2 * cube * share
        fresh = False
    return total


@lru_cache(maxsize=1024)
def make_plan(
    rows: int,
    cols: int,
    schedule: Schedule,
    dtype: torch.dtype,
    device: str,
    method: str = "auto",
    restarts: tuple[int, ...] | None = None,
    kernels: KernelProducts | None = None,
    native: bool = False,
) -> Plan:
    """Choose direct or Gram form by FLOPs, and the tiling; ``method`` other than auto is obeyed.

    Raises:
        ValueError: unknown method, restarts out of range, or the Gram form asked for where no
            restart positions make it accurate.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    m = min(rows, cols)
    # Tiles, our C++ and kernels compute half of a symmetric product; bmm computes all of it.
    alone = device == "cpu" and m >= ALONE_FROM and kernels is None
    halvings = math.ceil(math.log2(m / _TILE)) if alone and not native else 0
    share = (1 + 0.5**halvings) / 2
    if kernels is not None:
        share = kernels.share
    elif native:
        share = 0.5 + _CROSSING / m
    made = partial(Plan, halvings=halvings, kernels=kernels, native=native, alone=alone)
    direct = flops(rows, cols, schedule, None, share)
    if method == "direct" or not schedule:
        return made("direct", (), flops=direct)
    if restarts is not None:
        if any(not 0 < i < len(schedule) for i in restarts):
            raise ValueError(
                f"restarts must lie in 1..{len(schedule) - 1} (iterations they precede), "
                f"got {restarts}"
            )
        chosen: tuple[int, ...] | None = tuple(sorted(set(restarts)))
    else:
        chosen = choose_restarts(schedule, dtype)
    if chosen is None:
        if method == "gram":
            raise ValueError(
                f"the Gram form is not accurate in {dtype} for these coefficients: no choice of up "
                "to three restarts keeps it stable; use method='direct', another set, or ns_dtype"
            )
        return made("direct", (), flops=direct)
    gram = flops(rows, cols, schedule, chosen, share)
    if method == "gram" or gram < 0.95 * direct:
        return made("gram", chosen, flops=gram)
    return made("direct", (), flops=direct)


def _direct(
    x: Tensor, schedule: Schedule, ops: Any, first: Tensor | None, out: Tensor | None
) -> Tensor:
    """Direct form; ``x`` is scratch (overwritten), ``first`` its Gram matrix if already known."""
    tall = x.shape[-2] > x.shape[-1]
    side = min(x.shape[-2:])
    square = (*x.shape[:-2], side, side)
    a_buf = ops.room("a", square, x) if first is None else first
    b_buf, other = ops.room("b", square, x), ops.room("other", x.shape, x)
    for i, (a, b, c) in enumerate(schedule):
        gram = a_buf if i == 0 and first is not None else ops.gram(x, tall, a_buf)
        if c:
            poly = ops.symmetric(gram, gram, gram, b, c, b_buf)
        else:
            poly = torch.mul(gram, b, out=b_buf)
        into = out if i + 1 == len(schedule) else other
        x, other = ops.apply(x, poly, a, tall, into), x
    return x


def _gram(
    x: Tensor,
    schedule: Schedule,
    restarts: tuple[int, ...],
    ops: Any,
    first: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """Gram form: ``q`` accumulates the polynomial, ``r`` the Gram matrix it would produce."""
    tall = x.shape[-2] > x.shape[-1]
    side = min(x.shape[-2:])
    square = (*x.shape[:-2], side, side)
    r = ops.gram(x, tall, ops.room("r", square, x)) if first is None else first
    z, q, spare = (ops.room(name, square, x) for name in ("z", "q", "spare"))
    other: Tensor | None = None
    have_q = False
    for i, (a, b, c) in enumerate(schedule):
        if i in restarts:
            other = ops.room("other", x.shape, x) if other is None else other
            x, other = ops.apply(x, q, 0.0, tall, other), x
            r = ops.gram(x, tall, r)
            have_q = False
        z = ops.symmetric(r, r, r, b, c, z) if c else torch.mul(r, b, out=z)
        if have_q:
            q, spare = ops.symmetric(q, z, q, a, 1.0, spare), q
        else:
            q = ops.plus_identity(z, a, q)
            have_q = True
        if i + 1 < len(schedule) and i + 1 not in restarts:
            # (a + Z)²·R = a·(a·R + Z·R) + Z·(a·R + Z·R)
            spare = ops.symmetric(r, z, r, a, 1.0, spare)
            r = ops.symmetric(z, spare, spare, a, 1.0, r)
    return ops.apply(x, q, 0.0, tall, out)


def iterate(
    x: Tensor,
    schedule: Schedule,
    plan: Plan,
    first_gram: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Run ``schedule`` on normalized matrices.

    Args:
        x: ``[B, r, c]``, singular values at most 1, in the dtype of the iteration. Scratch: its
            contents are lost.
        schedule: one ``(a, b, c)`` per step.
        plan: from :func:`make_plan` for this shape.
        first_gram: ``[B, m, m]`` Gram matrix of ``x`` if a normalization has formed it already.
        out: where the last product writes, like ``x`` and apart from it; ``None``: a new tensor.

    Returns:
        ``[B, r, c]`` (``x`` itself when the schedule is empty and no ``out`` is given).
    """
    if not schedule:
        return x if out is None else out.copy_(x)

    def run(part: Tensor, ops: Any, first: Tensor | None, into: Tensor | None) -> Tensor:
        if plan.method == "gram":
            return _gram(part, schedule, plan.restarts, ops, first, into)
        return _direct(part, schedule, ops, first, into)

    if plan.kernels is not None:
        made = run(x, plan.kernels, first_gram, None)
        return made if out is None else out.copy_(made)
    out = torch.empty_like(x) if out is None else out
    if not plan.halvings:
        return run(x, plan.batched(x), first_gram, out)
    # One matrix at a time: each product is large enough to fill the cores, and its operands stay
    # in cache; a batched product into a strided tile would be computed aside and copied.
    ops = Tiled(min(x.shape[-2:]), plan.halvings)
    for i in range(x.shape[0]):
        run(x[i], ops, None if first_gram is None else first_gram[i], out[i])
    return out
