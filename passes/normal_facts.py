"""The facts of the normal form and the arithmetic of their constants (see ``normal_form.py``)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._sympy.symbol import SymT, symbol_is_type

from . import ir

aten = torch.ops.aten

# ---------------------------------------------------------------------------------------------
# Facts


@dataclass(frozen=True)
class Value:
    """A tensor: its number, the dtype it is held in, and the node to read it from.

    ``node`` may be narrower than ``dtype``: a widening cast changes no value.
    """

    number: int
    dtype: torch.dtype
    node: fx.Node | None
    center: Center | None = None
    text: str = "x"

    @property
    def base(self) -> fx.Node:
        """A node of this value's shape: its own, or that of the tensor whose mean was removed."""
        node = self.node if self.node is not None or self.center is None else self.center.x.node
        assert node is not None
        return node


@dataclass(frozen=True)
class Center:
    """This value is ``x − mean(x, dims)``, computed in the value's dtype."""

    x: Value
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Square:
    """``c·v²``; where ``v`` is a mean, ``mean`` says of what (half of E[x²] − E[x]²)."""

    v: Value
    c: float
    dtype: torch.dtype
    text: str
    flaw: str | None = None
    mean: Stat | None = None


@dataclass(frozen=True)
class Stat:
    """``max(c·N^p·Σ v^power + shift, floor)`` over ``dims``; no bound where ``floor`` is 0.

    ``kept`` says that the dims are kept with size 1. ``wide``: the spelling accumulates in PyTorch's
    accumulation dtype before rounding to ``dtype`` (``var``, ``norm``).
    """

    v: Value
    power: int
    dims: tuple[int, ...]
    n: Any
    dtype: torch.dtype
    kept: bool
    text: str
    c: float = 1.0
    p: float = 0.0
    shift: float = 0.0
    floor: float = 0.0
    wide: bool = False
    flaw: str | None = None

    @property
    def is_mean(self) -> bool:
        return self.shift == 0.0 == self.floor and _is_one(self.c, self.p + 1, self.n)


@dataclass(frozen=True)
class Root:
    stat: Stat
    q: float
    dtype: torch.dtype
    kept: bool
    text: str
    c: float = 1.0
    p: float = 0.0
    gain: fx.Node | None = None
    flaw: str | None = None


@dataclass(frozen=True)
class Scaled:
    v: Value
    dtype: torch.dtype
    text: str
    root: Root | None = None
    c: float = 1.0
    p: float = 0.0
    gain: fx.Node | None = None
    flaw: str | None = None
    origin: fx.Node | None = None


@dataclass(frozen=True)
class Norm:
    """A recognized norm in the making; ``stage`` says how far along the cast order it is.

    0: normalized; 1: rounded to ``norm_dtype``; 2: gain applied; 3: bias applied; 4: rounded again.
    ``core`` is the node that normalizes, ``end`` the last node that
    belongs to the norm.
    """

    kind: str
    x: fx.Node
    dims: tuple[int, ...]
    eps: float
    floor: bool
    stat_dtype: torch.dtype
    norm_dtype: torch.dtype
    out_dtype: torch.dtype
    core: fx.Node
    end: fx.Node
    text: str
    gain: fx.Node | None = None
    bias: fx.Node | None = None
    stage: int = 0
    native: bool = False


@dataclass(frozen=True)
class Miss:
    """A node that is almost a norm."""

    node: fx.Node
    x: fx.Node
    text: str
    reason: str


@dataclass(frozen=True)
class Number:
    """A constant of the graph; ``tol`` is the relative rounding of the dtype that held it."""

    value: Any
    tol: float = 1e-12


def settled(number: Number) -> Number:
    """A float of the model that Dynamo keeps variable (``dynamic=True``) as the number it is, under a
    guard: another value compiles anew. One made of sizes, or not known before the run, stays what it
    is."""
    if not isinstance(number.value, torch.SymFloat):
        return number
    if not all(symbol_is_type(s, SymT.FLOAT) for s in number.value.node.expr.free_symbols):
        return number
    try:
        return replace(number, value=float(number.value))
    except GuardOnDataDependentSymNode:
        return number


Fact = Square | Stat | Root | Scaled | Norm | tuple

# ---------------------------------------------------------------------------------------------
# Arithmetic of constants


def _is_one(c: float, p: float, n: Any, tol: float = 1e-12) -> bool:
    """``c·n^p == 1``, up to the rounding of Python arithmetic."""
    if p == 0:
        return math.isclose(c, 1.0, rel_tol=tol)
    if isinstance(n, int):
        return n > 0 and math.isclose(c * float(n) ** p, 1.0, rel_tol=tol)
    return False


def _times(c: float, p: float, number: Number, n: Any, sign: int = 1) -> tuple[float, float] | None:
    """``c·n^p`` times (or, with ``sign=-1``, divided by) a number, spelled with ``n`` if it is one."""
    if n is not None:  # a factor of a statistic or its root, not of any tensor
        number = settled(number)
    value = number.value
    for e in (1.0, 0.5, -0.5, -1.0):
        if _equals_power(value, n, e, number.tol):
            return c, p + sign * e
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return None
    if value == 0 or not math.isfinite(value):
        return None
    return (c * value if sign > 0 else c / value), p


def _equals_power(value: Any, n: Any, e: float, tol: float) -> bool:
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        if e == 1.0:
            return ir.same_dim(value, n)
        if isinstance(n, int):
            return False
        try:
            return ir.same_dim(value, torch.sym_float(n) ** e)
        except (TypeError, NotImplementedError):
            return False
    if not isinstance(n, int) or n < 2:
        return False
    return math.isclose(value, float(n) ** e, rel_tol=tol)


def widens(a: torch.dtype, b: torch.dtype) -> bool:
    """True if every value of ``a`` is a value of ``b``."""
    return (
        a.is_floating_point and b.is_floating_point and (a == b or torch.promote_types(a, b) == b)
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_CASTS = frozenset(
    {
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten.to.other,
        aten._to_copy.default,
        aten.type_as.default,
        torch.ops.prims.convert_element_type.default,
    }
)
_SAME = frozenset(
    {
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
        aten.lift_fresh_copy.default,
    }
)
_RESHAPES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.expand_as.default,
        aten.view_as.default,
        aten.broadcast_to.default,
    }
)
_SLICES = (aten.slice, aten.narrow, aten.select, aten.split, aten.split_with_sizes, aten.chunk)

FLAW_ROOT_EPS = "eps is added to the root, not inside it"
FLAW_CLAMP = "the statistic is clamped, and not as max(mean(x²), eps) or max(rms, eps)"
FLAW_UNBIASED = "the variance is unbiased (divided by d − 1, not d)"
FLAW_CANCEL = "the variance is written E[x²] − E[x]², whose cancellation a norm does not reproduce"


def unexpanded(node: Any) -> Any:
    """``node`` without an ``expand``, which ordinary broadcasting makes needless."""
    while ir.is_call(node, aten.expand, aten.expand_as, aten.broadcast_to):
        node = node.args[0]
    return node


def packet(node: fx.Node) -> Any:
    """The op a node calls, whatever the overload."""
    return getattr(node.target, "overloadpacket", node.target)


def is_cast(node: Any) -> bool:
    """True for a dtype conversion that stays on its device."""
    return (
        ir.is_call(node, *_CASTS)
        and isinstance(node.args[0], fx.Node)
        and ir.is_tensor(node)
        and ir.is_tensor(node.args[0])
        and ir.val(node).device == ir.val(node.args[0]).device
    )
