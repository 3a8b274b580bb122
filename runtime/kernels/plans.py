"""Which regime and which tiles: plain arithmetic on sizes, so that tests and tables can ask it too.

Sizes may be symbolic (dynamic shapes). A symbolic size never adds a guard: it gets the plan that is
right for any value.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

#: Longest row that a program keeps in registers: forward, backward (which holds four rows' worth).
TILE_COLS = 16384
TILE_COLS_BACKWARD = 8192
#: Elements of a tile that small rows are packed into.
_TILE_ELEMENTS = 2048


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: Any, b: Any) -> Any:
    return (a + b - 1) // b


def _static(size: Any) -> bool:
    return type(size) is int


@dataclass(frozen=True)
class NormPlan:
    """Regime ``tile`` (rows in registers), ``split`` (a row over several programs; with one split it
    is the loop over a long row)."""

    regime: str
    block_r: int
    block_c: int
    num_warps: int
    splits: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _warps(elements: int) -> int:
    return min(max(next_power_of_2(elements) // 512, 1), 16)


def norm_forward(rows: Any, cols: Any, processors: int) -> NormPlan:
    """Plan of a forward norm over ``[rows, cols]`` on a device with that many processors."""
    few = _static(rows) and rows * 4 <= processors
    if _static(cols) and cols <= TILE_COLS and not (few and cols > 8192):
        block_c = next_power_of_2(cols)
        block_r = max(min(_TILE_ELEMENTS // block_c, 16), 1)
        return NormPlan("tile", block_r, block_c, _warps(block_r * block_c))
    splits = 1
    if few and _static(cols):
        splits = max(min(processors // max(rows, 1), cols // 4096, 32), 1)
    return NormPlan("split", 1, 4096, 8, splits)


def norm_backward(rows: Any, cols: Any, processors: int) -> NormPlan:
    """Plan of a backward norm. ``splits`` is the number of programs that share the rows."""
    if _static(cols) and cols <= TILE_COLS_BACKWARD:
        block_c = next_power_of_2(cols)
        block_r = max(min(_TILE_ELEMENTS // 2 // block_c, 16), 1)
        programs = processors * 2
        warps = max(_warps(2 * block_r * block_c), 8 if block_c >= 1024 else 1)
        if _static(rows):
            programs = max(min(programs, cdiv(rows, block_r)), 1)
        return NormPlan("tile", block_r, block_c, warps, programs)
    parts = 16
    if _static(rows):
        parts = max(min(parts, cdiv(rows, 32)), 1)
    return NormPlan("loop", 16, 2048, 8, parts)


@dataclass(frozen=True)
class GemmPlan:
    """Tiles of a product; ``splits > 1`` divides K, ``descriptors`` means the persistent kernel."""

    regime: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1
    group: int = 8
    descriptors: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def gemm(
    m: Any,
    n: Any,
    k: Any,
    itemsize: int,
    processors: int,
    *,
    dual: bool = False,
    mixed: bool = False,
) -> GemmPlan:
    """Plan of ``[m, k] × [n, k]ᵀ``: decode (≤ 64 rows), medium (≤ 512), large; symbolic is medium.

    Chosen so that no target spills registers, LayerNorm's second product included. ``mixed``: rows
    come wider than ``itemsize`` and are rounded in registers.
    """
    wide = itemsize > 2
    if _static(m) and m <= 64:
        block_m = 16 if m <= 16 else 32 if m <= 32 else 64
        block_n = 32 if block_m == 64 and dual else 64
        # a taller tile has no registers left for a deep one, least of all without tensor cores
        if block_m < 64:
            block_k, warps, stages = (64 if wide else 128), 4, 3
        elif wide:
            block_k, warps, stages = 32, (8 if dual else 4), 3
        else:
            block_k, warps, stages = 64, 4, 5
        splits = 1
        if _static(n) and _static(k):
            tiles = cdiv(n, block_n) * cdiv(m, block_m)
            splits = max(min(2 * processors // max(tiles, 1), k // (4 * block_k), 16), 1)
        return GemmPlan("decode", block_m, block_n, block_k, warps, stages, splits, 1)
    regime = "medium" if not _static(m) or m <= 512 else "large"
    if dual:
        return GemmPlan(regime, 64, 64, 32, 8, 3) if wide else GemmPlan(regime, 64, 128, 64, 8, 3)
    if regime == "medium":
        if wide:
            return GemmPlan("medium", 64, 64, 32, 4, 3)
        return (
            GemmPlan("medium", 64, 128, 64, 8, 3)
            if mixed
            else GemmPlan("medium", 64, 128, 64, 4, 4)
        )
    return GemmPlan("large", 64, 128, 32, 8, 3) if wide else GemmPlan("large", 128, 128, 64, 8, 3)


def finish(n: Any) -> tuple[int, int]:
    """Columns of a program that adds up a split product, and elements of K it takes at a time where it
    multiplies a row again."""
    block_n = min(next_power_of_2(n), 256) if _static(n) else 256
    return block_n, min(8192 // block_n, 512)


@dataclass(frozen=True)
class SquarePlan:
    """Square tiles of a product with a symmetric result."""

    regime: str
    block: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def tiles(self, side: Any) -> Any:
        """Tiles on and below the diagonal."""
        t = cdiv(side, self.block)
        return t * (t + 1) // 2


def symmetric(
    batch: Any, side: Any, itemsize: int, processors: int, *, tf32: bool = False
) -> SquarePlan:
    """Plan of ``batch`` symmetric results of one side: small tiles where large ones are too few."""
    if itemsize > 2 and not tf32:  # without tensor cores: a deeper tile has no registers left
        return SquarePlan("symmetric", 64, 16, 4, 3)
    block_k = 128 // itemsize
    large = SquarePlan("symmetric", 128, block_k, 8, 3)
    few = _static(batch) and _static(side) and batch * large.tiles(side) < processors
    small = few or (_static(side) and side <= 256)
    return SquarePlan("symmetric", 64, block_k, 4, 4) if small else large


def addend(m: Any, n: Any, itemsize: int, *, tf32: bool = False) -> GemmPlan:
    """Plan of a product ``[m, n]`` with an addend."""
    if itemsize > 2 and not tf32:
        return GemmPlan("addend", 64, 64, 16, 4, 3)
    block_k = 128 // itemsize
    if _static(m) and _static(n) and min(m, n) <= 256:
        short, long = (64, 128) if m <= n else (128, 64)
        return GemmPlan("addend", short, long, block_k, 4, 4)
    return GemmPlan("addend", 128, 128, block_k, 8, 3)


def divides(block: int, *sizes: Any) -> bool:
    """True if every size is known and a multiple of ``block`` (no masks needed)."""
    return all(_static(s) and s % block == 0 for s in sizes)


@dataclass(frozen=True)
class GatedPlan:
    """Tiles of the gated norm: rows a program holds, columns a step, padded rank."""

    block_r: int
    block_c: int
    block_k: int
    num_warps: int
    splits: int
    num_stages: int = 3

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def gated(
    rows: Any, cols: Any, rank: int, itemsize: int, processors: int, *, backward: bool = False
) -> GatedPlan:
    """Plan of the gated norm over ``[rows, cols]``."""
    block_k = max(next_power_of_2(rank), 16)
    parts = 16
    if _static(rows):
        parts = max(min(parts, cdiv(rows, 64)), 1)
    if backward:
        # two accumulators of [columns, rank] beside the recomputed chunk: half the columns, and no
        # pipeline for float32, so that no target spills registers
        return GatedPlan(16, 32, block_k, 4, parts, 1 if itemsize > 2 else 3)
    block_c = 64 if not _static(cols) or cols > 32 else 32
    return GatedPlan(16, block_c, block_k, 4, parts)
