"""Bytes, FLOPs and whether a rewrite pays: the numbers behind every "does not pay" in a report.

Sizes that are symbolic count by their hint (the example's size); nothing here adds a guard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from . import ir

#: Up to this many rows, scaling products instead of inputs is faster on a CPU. Timed with Inductor at
#: widths 256 and 384: 1.07× at 1 row against 1.03× without, nothing at 16, 0.94× at 256.
_DEFER_ROWS = {"cpu": 4}

#: Up to this many rows a matrix product is bound by reading its weight and by the call itself, so
#: that one product for several weights saves calls without spoiling cache blocking. The number for
#: CPUs comes from timing; that for GPUs is a model (2·rows FLOPs per weight element stay far below
#: what the device can do per byte it reads).
_MERGE_ROWS = {"cpu": 16}
_MERGE_ROWS_ELSEWHERE = 64


def defer_rows(device: str) -> int | None:
    """The number of rows up to which a deferred scale pays; ``None``: bytes alone decide."""
    return _DEFER_ROWS.get(device)


def merge_rows(device: str) -> int:
    """The number of input rows up to which merged linear layers are expected to be faster."""
    return _MERGE_ROWS.get(device, _MERGE_ROWS_ELSEWHERE)


def hint(size: Any) -> int:
    """A size as a plain number: symbolic ones by their hint, 1 without one."""
    if isinstance(size, int):
        return size
    node = getattr(size, "node", None)
    value = getattr(node, "hint", None) if node is not None and node.has_hint() else None
    return int(value) if value is not None else 1


def numel(node: fx.Node) -> int:
    """Number of elements of a node's value."""
    total = 1
    for s in ir.shape(node):
        total *= hint(s)
    return total


def nbytes(node: fx.Node) -> int:
    """Size of a node's value in memory."""
    return numel(node) * ir.dtype(node).itemsize


def rows(node: fx.Node, dim: int = -1) -> int:
    """How many feature vectors (along ``dim``) a value holds."""
    return numel(node) // max(hint(ir.shape(node)[dim]), 1)


@dataclass(frozen=True)
class Cost:
    """Bytes moved and arithmetic done per call."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.bytes - other.bytes, self.flops - other.flops)


def text(n: float) -> str:
    """A byte count for a sentence: ``"1.5 MiB"``."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} GiB"
