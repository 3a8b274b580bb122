"""The axis that the features of a stream live on, and plain questions about nodes along it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import ir

aten = torch.ops.aten

Links = list[tuple[fx.Node, "Axis"]]


@dataclass(frozen=True)
class Axis:
    """Where the features of a value live.

    Attributes:
        dims: the dims (negative, ascending) that hold the features.
        outer, inner: for a single dim of size ``outer·n·inner``: the features are the middle
            factor (a head's channels inside ``heads·head_dim`` have ``outer = heads``).
    """

    dims: tuple[int, ...]
    outer: int = 1
    inner: int = 1

    @property
    def whole(self) -> bool:
        """True if the features are exactly the dims."""
        return self.outer == 1 and self.inner == 1

    def size(self, shape: Sequence) -> Any:
        n: Any = 1
        for d in self.dims:
            n = n * shape[d]
        return n if self.whole else n // (self.outer * self.inner)

    def fits(self, shape: Sequence) -> bool:
        return -self.dims[0] <= len(shape)

    def __str__(self) -> str:
        dims = ",".join(map(str, self.dims))
        return f"dim {dims}" + ("" if self.whole else f" ({self.outer}·n·{self.inner})")


def _product(sizes: Sequence) -> Any:
    n: Any = 1
    for s in sizes:
        n = n * s
    return n


def _exact_ratio(a: Any, b: Any) -> int | None:
    """``a / b`` if it is statically a whole number, else ``None``; never adds a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    return 1 if ir.same_dim(a, b) else None


def through_reshape(source: Sequence, target: Sequence, axis: Axis) -> Axis | None:
    """The axis after a row-major reshape from ``source`` to ``target``; ``None`` if it breaks up."""
    dims = axis.dims
    if list(dims) != list(range(dims[0], dims[0] + len(dims))):
        return axis if ir.same_shape(source, target) else None
    n = axis.size(source)
    stride = _product(source[dims[-1] + 1 :] if dims[-1] < -1 else ()) * axis.inner
    right: Any = 1
    rank = len(target)
    for d in range(-1, -rank - 1, -1):
        if ir.same_dim(target[d], 1) and not ir.same_dim(n, 1):
            continue  # holds nothing
        inner = _exact_ratio(stride, right)
        outer = _exact_ratio(right * target[d], stride * n)
        if inner is not None and outer is not None:
            return Axis((d,), outer, inner)
        if inner == 1:
            # the features may fill several whole dims
            run: Any = 1
            for e in range(d, -rank - 1, -1):
                run = run * target[e]
                if _exact_ratio(run, n) == 1:
                    return Axis(tuple(range(e, d + 1)))
        right = right * target[d]
    return None


def packets(*names: str) -> list[Any]:
    return [getattr(aten, n) for n in names if hasattr(aten, n)]


def is_float(node: Any) -> bool:
    return ir.is_tensor(node) and ir.dtype(node).is_floating_point


def arg(node: Any, i: int, name: str, default: Any = None) -> Any:
    if i < len(node.args):
        return node.args[i]
    return node.kwargs.get(name, default)


def carries(operand: Any, axis: Axis, like: fx.Node) -> bool:
    """True if ``operand`` has the full features of ``like`` (not broadcast along them)."""
    if not is_float(operand) or not axis.fits(ir.shape(operand)):
        return False
    shape, full = ir.shape(operand), ir.shape(like)
    return all(ir.same_dim(shape[d], full[d]) for d in axis.dims)


def constant_along(operand: Any, axis: Axis) -> bool:
    """True if ``operand`` (number or tensor) has one value for all features of a row."""
    if not isinstance(operand, fx.Node):
        return isinstance(operand, (int, float))
    if not ir.is_tensor(operand):
        return True  # a symbolic number
    shape = ir.shape(operand)
    return all(-d > len(shape) or ir.same_dim(shape[d], 1) for d in axis.dims)


def dropout_is_active(node: Any) -> bool:
    """True if a dropout node changes its input (p > 0 in training mode)."""
    p, train = arg(node, 1, "p"), arg(node, 2, "train")
    return bool(train) and not (isinstance(p, (int, float)) and p == 0)


def is_dropout(node: Any) -> bool:
    return ir.is_call(node, *DROPOUTS)


DROPOUTS = tuple(packets("dropout", "native_dropout", "feature_dropout"))


def is_zero(t: Any) -> bool:
    return t == 0 if isinstance(t, (int, float)) else is_zeros(t)


def is_zeros(node: Any) -> bool:
    """True if ``node`` makes a tensor of zeros."""
    if ir.is_call(node, *packets("zeros", "zeros_like", "new_zeros")):
        return True
    if ir.is_call(node, *packets("full", "full_like", "new_full")):
        value = node.args[1] if not ir.is_call(node, aten.new_full) else node.args[2]
        return value == 0
    return ir.is_call(node, aten.scalar_tensor) and node.args[0] == 0


SPLITS = tuple(
    packets("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "tensor_split")
)

ADDS = tuple(packets("add", "sub", "subtract"))
