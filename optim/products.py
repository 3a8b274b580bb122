"""How the products of a Newton–Schulz iteration are computed: whole, in tiles, by our C++ (and, in
``kernel_products.py``, by our kernels on GPUs).

Every way has the same members. ``room`` gives memory that the others write their results into (their
``out``, which overlaps no operand); ``gram``, ``symmetric`` and ``apply`` are the three products, their
epilogue included: rounding once a product instead of three times is worth a factor 2-7 in half
precision.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..runtime import cpp

_LOCAL = threading.local()


@contextlib.contextmanager
def workspace() -> Iterator[None]:
    """Within it, scratch on CPUs is kept from call to call (and freed at the end).

    Fresh memory costs a page fault every 4 KiB: up to a tenth of a step on large matrices.
    """
    if getattr(_LOCAL, "buffers", None) is not None:
        yield
        return
    _LOCAL.buffers = {}
    try:
        yield
    finally:
        _LOCAL.buffers = None


def scratch(name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Uninitialized tensor; the same memory for the same name and shape within a workspace."""
    buffers = getattr(_LOCAL, "buffers", None)
    if buffers is None or like.device.type != "cpu":
        return like.new_empty(shape)
    found = buffers.get(name)
    if found is None or found.shape != torch.Size(shape) or found.dtype != like.dtype:
        found = buffers[name] = like.new_empty(shape)
    return found


class Whole:
    """Products of a batch ``[B, …]`` as single ``bmm``/``baddbmm`` calls."""

    room = staticmethod(scratch)

    @staticmethod
    def gram(x: Tensor, tall: bool, out: Tensor) -> Tensor:
        return torch.bmm(x.mT, x, out=out) if tall else torch.bmm(x, x.mT, out=out)

    @staticmethod
    def symmetric(
        s: Tensor, t: Tensor, base: Tensor, beta: float, alpha: float, out: Tensor
    ) -> Tensor:
        """``beta·base + alpha·s·t`` for commuting symmetric operands."""
        return torch.baddbmm(base, s, t, beta=beta, alpha=alpha, out=out)

    @staticmethod
    def apply(x: Tensor, b: Tensor, a: float, tall: bool, out: Tensor) -> Tensor:
        """``a·x + b·x`` (wide) or ``a·x + x·b`` (tall)."""
        left, right = (x, b) if tall else (b, x)
        if a == 0.0:
            return torch.bmm(left, right, out=out)
        return torch.baddbmm(x, left, right, beta=a, out=out)

    @staticmethod
    def plus_identity(z: Tensor, a: float, out: Tensor) -> Tensor:
        """``z + a·I``."""
        out.copy_(z).diagonal(dim1=-2, dim2=-1).add_(a)
        return out


class Native:
    """The same with our C++ (``runtime/cpp``), which computes half of a symmetric product."""

    room = staticmethod(scratch)
    plus_identity = staticmethod(Whole.plus_identity)

    @staticmethod
    def gram(x: Tensor, tall: bool, out: Tensor) -> Tensor:
        left, right = (x.mT, x) if tall else (x, x.mT)
        return cpp.product(left, right, out, symmetric=True)

    @staticmethod
    def symmetric(
        s: Tensor, t: Tensor, base: Tensor, beta: float, alpha: float, out: Tensor
    ) -> Tensor:
        return cpp.product(s, t, out, base=base, beta=beta, alpha=alpha, symmetric=True)

    @staticmethod
    def apply(x: Tensor, b: Tensor, a: float, tall: bool, out: Tensor) -> Tensor:
        left, right = (x, b) if tall else (b, x)
        return cpp.product(left, right, out, base=x, beta=a)


#: Where a tile lies: its rows, its columns.
Tile = tuple[slice, slice]


def triangle(low: int, high: int, halvings: int) -> Iterator[Tile]:
    """Tiles that cover the lower triangle of ``[low, high)²``: the square below the diagonal, then the
    triangles on either side of it, down to ``2 ** halvings`` whole squares on the diagonal.

    Squares multiply faster than strips of as many FLOPs. Sides are multiples of 32 where they are larger.
    """
    half = (high - low) // 2
    if not halvings or not half:
        yield slice(low, high), slice(low, high)
        return
    middle = low + (half + -half % 32 if half > 32 else half)
    yield slice(middle, high), slice(low, middle)
    yield from triangle(low, middle, halvings - 1)
    yield from triangle(middle, high, halvings - 1)


class Tiled:
    """The same for one matrix; symmetric products compute the tiles of the lower triangle."""

    def __init__(self, side: int, halvings: int) -> None:
        self.tiles = list(triangle(0, side, halvings))

    def _mirror(self, out: Tensor) -> Tensor:
        for rows, cols in self.tiles:
            if rows != cols:
                out[cols, rows].copy_(out[rows, cols].mT)
        return out

    def gram(self, x: Tensor, tall: bool, out: Tensor) -> Tensor:
        left, right = (x.mT, x) if tall else (x, x.mT)
        for rows, cols in self.tiles:
            torch.mm(left[rows], right[:, cols], out=out[rows, cols])
        return self._mirror(out)

    def symmetric(
        self, s: Tensor, t: Tensor, base: Tensor, beta: float, alpha: float, out: Tensor
    ) -> Tensor:
        for tile in self.tiles:
            rows, cols = tile
            torch.addmm(base[tile], s[rows], t[:, cols], beta=beta, alpha=alpha, out=out[tile])
        return self._mirror(out)

    @staticmethod
    def apply(x: Tensor, b: Tensor, a: float, tall: bool, out: Tensor) -> Tensor:
        left, right = (x, b) if tall else (b, x)
        if a == 0.0:
            return torch.mm(left, right, out=out)
        return torch.addmm(x, left, right, beta=a, out=out)

    room = staticmethod(scratch)
    plus_identity = staticmethod(Whole.plus_identity)
