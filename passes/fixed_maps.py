"""Fixed affine maps in a graph: ``x · scale + shift`` by weights or numbers, and what is near them.

LayerScale, scalar gates, constant multipliers and the affine core of static norms (means and
deviations that are buffers) are multiplications and additions of weights, in any order and split
over any number of ops. Every op is one map; a chain of them folds one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import ir
from .axis import Axis, channel_scale, dropout_is_active, is_dropout, operands
from .errors import Refuse
from .linear import is_weight, match_features, match_linear
from .readers import feature_axis, keeps_shift
from .weight_builder import WeightBuilder

aten = torch.ops.aten
nf = torch.ops.normfuse


def _packets(names: str) -> tuple:
    return tuple(getattr(aten, n) for n in names.split() if hasattr(aten, n))


_MULS = _packets("mul multiply")
_DIVS = _packets("div divide true_divide")
_ADDS = _packets("add")
_SUBS = _packets("sub subtract")
_FUSED = _packets("addcmul addcdiv")

#: ops of one operand that commute with a number
_COMMUTE = (
    torch.ops.prims.convert_element_type,
    *_packets(
        "to _to_copy type_as clone contiguous alias view reshape _unsafe_view flatten unflatten "
        "squeeze unsqueeze permute transpose t swapaxes swapdims mT movedim expand slice narrow "
        "select index_select neg"
    ),
)

#: layers that take a bias without another op behind them
_BIASED = ("linear", "addmm", "mm", "conv", "conv_transpose")

#: how many maps in a row are looked through for the layer behind them
_CHAIN = 16


@dataclass(frozen=True)
class FixedMap:
    """``node = x · scale + shift``.

    Attributes:
        node, x: the result and what it is computed from, of the same shape.
        scale, shift: numbers or weights; ``None`` where the op has none.
        divides, subtracts: it is ``x / scale``, and ``− shift``.
    """

    node: fx.Node
    x: fx.Node
    scale: fx.Node | float | None = None
    shift: fx.Node | float | None = None
    divides: bool = False
    subtracts: bool = False

    @property
    def weights(self) -> list[fx.Node]:
        return [t for t in (self.scale, self.shift) if isinstance(t, fx.Node)]

    @property
    def is_number(self) -> bool:
        """True if all features are treated alike."""
        return all(ir.same_dim(s, 1) for t in self.weights for s in ir.shape(t))

    @property
    def kind(self) -> str:
        if self.shift is None:
            return "scale"
        return "shift" if self.scale is None else "affine"

    @property
    def spelling(self) -> str:
        def name(t: Any) -> str:
            return "weight" if isinstance(t, fx.Node) else str(t)

        text = "x"
        if self.scale is not None:
            text += f" {'/' if self.divides else '·'} {name(self.scale)}"
        if self.shift is not None:
            text += f" {'−' if self.subtracts else '+'} {name(self.shift)}"
        return text

    def varies(self) -> Axis:
        """The dims of the result along which scale and shift vary, gaps filled."""
        return feature_axis(self.node, self.weights, ())

    def factor(self, builder: WeightBuilder, like: fx.Node) -> fx.Node | float | None:
        """What to multiply by, in the working dtype."""
        if not isinstance(self.scale, fx.Node):
            return 1.0 / self.scale if self.scale is not None and self.divides else self.scale
        out = builder.work(self.scale, like)
        return builder.emit(aten.reciprocal.default, out) if self.divides else out

    def offset(self, builder: WeightBuilder, like: fx.Node) -> fx.Node | float | None:
        """What to add after multiplying, in the working dtype."""
        if not isinstance(self.shift, fx.Node):
            return -self.shift if self.shift is not None and self.subtracts else self.shift
        out = builder.work(self.shift, like)
        return builder.emit(aten.neg.default, out) if self.subtracts else out

    def drop(self) -> None:
        """Take the op out; a promotion it did stays as a cast."""
        node, x = self.node, self.x
        if ir.dtype(x) != ir.dtype(node):
            with node.graph.inserting_before(node):
                x = ir.emit(node.graph, aten.to.dtype, x, ir.dtype(node), like=node)
        ir.replace(node, x)


def match(node: fx.Node) -> FixedMap | None:
    """An activation that numbers or weights are multiplied with, or added to."""
    if not ir.is_call(node, *_MULS, *_DIVS, *_ADDS, *_SUBS, *_FUSED) or node.kwargs:
        return None
    if node.meta.get("mutated") or not ir.is_tensor(node) or is_weight(node):
        return None
    for x, scale, shift in _readings(node):
        if not ir.is_tensor(x) or is_weight(x) or not ir.dtype(x).is_floating_point:
            continue
        if not ir.same_shape(ir.shape(x), ir.shape(node)):
            continue
        divides = ir.is_call(node, *_DIVS, getattr(aten, "addcdiv", None))
        if not _fixed(scale) or not _fixed(shift) or (divides and scale == 0):
            continue
        scale, shift = (float(t) if isinstance(t, int) else t for t in (scale, shift))
        return FixedMap(node, x, scale, shift, divides, ir.is_call(node, *_SUBS))
    return None


def _readings(node: fx.Node) -> Iterator[tuple[Any, Any, Any]]:
    """The ways to read a call as ``(x, scale, shift)``."""
    args: Any = node.args
    if ir.is_call(node, *_FUSED):
        if len(args) != 3:
            return
        yield args[1], args[2], args[0]
        if ir.is_call(node, aten.addcmul):
            yield args[2], args[1], args[0]
        return
    if len(args) != 2:
        return
    ways = [args] if ir.is_call(node, *_DIVS, *_SUBS) else [args, args[::-1]]
    for x, other in ways:
        if other is not None:
            yield (x, other, None) if ir.is_call(node, *_MULS, *_DIVS) else (x, None, other)


def _fixed(t: Any) -> bool:
    """True for nothing, a finite number or a weight."""
    if t is None:
        return True
    if isinstance(t, fx.Node):
        return ir.is_tensor(t) and is_weight(t) and ir.dtype(t).is_floating_point
    return isinstance(t, (int, float)) and not isinstance(t, bool) and math.isfinite(t)


# ---------------------------------------------------------------------------------------------
# Neighbours


def before(m: FixedMap) -> tuple[fx.Node, Axis | None] | None:
    """The layer or norm that makes ``x`` for this map alone, if there is one that can take it.

    Returns it with the axis of the map in its result (``None`` if all features are treated alike).
    """
    axis: Axis | None = None
    if not m.is_number:
        try:
            axis = m.varies()
        except Refuse:
            return None
    if m.shift is not None and (axis is None or len(axis.dims) > 1):
        return None
    cur, reader = m.x, m.node
    while True:
        if set(cur.users) != {reader}:
            return None
        layer = match_features(cur, axis.dims if axis is not None else ())
        if layer is not None:
            return (cur, axis) if m.shift is None or layer.layout in _BIASED else None
        if ir.is_call(cur, nf.layer_norm, nf.rms_norm):
            return (cur, axis) if m.shift is None else None
        if cur.op != "call_function" or cur.meta.get("mutated"):
            return None
        if m.shift is not None and not keeps_shift(cur):
            return None
        if axis is None:
            if not ir.is_call(cur, *_COMMUTE) and not (
                is_dropout(cur) and not dropout_is_active(cur)
            ):
                return None
            behind = cur.args[0]
        else:
            if len(axis.dims) > 1 and not _is_copy(cur):
                return None
            links = operands(cur, axis)
            if links is None or len(links) != 1:
                return None
            behind, axis = links[0]
        if not isinstance(behind, fx.Node) or not ir.is_tensor(behind):
            return None
        if not ir.dtype(behind).is_floating_point:
            return None
        cur, reader = behind, cur


def _is_copy(node: fx.Node) -> bool:
    return ir.is_call(node, *_packets("to _to_copy clone contiguous alias"))


def near_layers(m: FixedMap) -> bool:
    """True if linear layers alone read the result, directly or behind more fixed maps.

    So it is if its nature is clear: one weight per feature, right behind a layer (LayerScale).
    """
    axis: Axis | None = None
    if not m.is_number:
        try:
            axis = m.varies()
        except Refuse:
            return False
        if m.shift is None and match_linear(m.x) is not None:
            if channel_scale(m.node, axis, {}) is not None:
                return True
    if m.shift is not None and axis is not None and len(axis.dims) > 1:
        return False  # a table of positions, say
    return _feeds_layers(m.node, _CHAIN)


def _feeds_layers(node: fx.Node, depth: int) -> bool:
    for user in node.users:
        linear = match_linear(user)
        if linear is not None and linear.input is node:
            continue
        onward = match(user) if depth else None
        if onward is None or onward.x is not node or not _feeds_layers(user, depth - 1):
            return False
    return bool(node.users)
