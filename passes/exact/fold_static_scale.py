"""FoldStaticScale: multiplications by weights or numbers move into a neighbouring layer.

LayerScale (one weight per channel behind a layer), scalar gates, ``q · d^-½``, residual multipliers
and the ``1/√ℓ`` of LayerNorm Scaling ("Curse of Depth", 2025, eq. 2) are fixed once trained::

    s ⊙ (W x + b) = (diag(s) W) x + s ⊙ b         c·(γ ⊙ n + β) = (cγ) ⊙ n + cβ
    W (s ⊙ x) + b = (W diag(s)) x + b
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .. import cost, ir
from ..axis import Axis, channel_scale, dropout_is_active, is_dropout, operands
from ..errors import Refuse
from ..linear import (
    WeightBuilder,
    is_weight,
    match_features,
    match_linear,
    set_args,
    table_user,
)
from ..manager import Context, Pass, PassResult, register
from ..readers import check_readers, feature_axis, fold_into_readers
from ..report import Site

if TYPE_CHECKING:
    import sympy

aten = torch.ops.aten
nf = torch.ops.normfuse


def _packets(names: str) -> tuple:
    return tuple(getattr(aten, n) for n in names.split() if hasattr(aten, n))


_MULS = _packets("mul multiply")
_DIVS = _packets("div divide true_divide")

#: ops of one operand that commute with a number
_COMMUTE = (
    torch.ops.prims.convert_element_type,
    *_packets(
        "to _to_copy type_as clone contiguous alias view reshape _unsafe_view flatten unflatten "
        "squeeze unsqueeze permute transpose t swapaxes swapdims mT movedim expand slice narrow "
        "select index_select neg"
    ),
)


@dataclass(frozen=True)
class _Scaling:
    """``node = x · scale`` (or ``x / scale``); ``scale`` is a number or a weight."""

    node: fx.Node
    x: fx.Node
    scale: fx.Node | float
    divides: bool

    @property
    def is_number(self) -> bool:
        return not isinstance(self.scale, fx.Node) or all(
            ir.same_dim(s, 1) for s in ir.shape(self.scale)
        )

    def factor(self, builder: WeightBuilder, like: fx.Node) -> fx.Node | float:
        """What to multiply by, in the working dtype."""
        if not isinstance(self.scale, fx.Node):
            return 1.0 / self.scale if self.divides else self.scale
        out = builder.work(self.scale, like)
        return builder.emit(aten.reciprocal.default, out) if self.divides else out


@register
class FoldStaticScale(Pass):
    """Fold scalings by weights and numbers into the layer or norm before, else the layers behind.

    Only scalings next to a layer or norm are sites; arithmetic inside activations is left alone.

    Args:
        copy_tied: also scale layers and tables whose weight is shared, at the price of a copy.
    """

    name = "fold_static_scale"
    promise = "exact"

    def __init__(self, *, copy_tied: bool = False) -> None:
        super().__init__(copy_tied=copy_tied)
        self.copy_tied = copy_tied

    @classmethod
    def identity(cls) -> Sequence[tuple[sympy.Matrix, sympy.Matrix]]:
        """Behind a layer, behind a norm, before a layer."""
        import sympy

        d, k = 2, 3
        w = sympy.Matrix(d, k, sympy.symbols(f"w:{d * k}", real=True))
        u = sympy.Matrix(k, d, sympy.symbols(f"u:{d * k}", real=True))
        b, s, gain, beta, n = (
            sympy.Matrix(d, 1, sympy.symbols(f"{c}:{d}", real=True)) for c in "bsghn"
        )
        x = sympy.Matrix(k, 1, sympy.symbols(f"x:{k}", real=True))
        e = sympy.Matrix(k, 1, sympy.symbols(f"e:{k}", real=True))
        c = sympy.Symbol("c", real=True)

        def times(p: sympy.Matrix, q: sympy.Matrix) -> sympy.Matrix:
            return p.multiply_elementwise(q)

        return [
            (times(s, w * x + b), (sympy.diag(*s) * w) * x + times(s, b)),
            (c * (times(gain, n) + beta), times(c * gain, n) + c * beta),
            (u * times(s, n) + e, (u * sympy.diag(*s)) * n + e),
        ]

    def run(self, gm: fx.GraphModule, context: Context) -> PassResult:
        result = PassResult()
        builder = WeightBuilder(gm.graph, context)
        taken: dict[str, int] = {}
        for node in list(gm.graph.nodes):
            scaling = _match(node)
            if scaling is None:
                continue
            chain = _before(scaling)
            if chain is None and not _near_layers(scaling):
                continue
            key = f"{ir.module_path(node) or 'graph'}.scale"
            taken[key] = taken.get(key, 0) + 1
            if taken[key] > 1:
                key = f"{key}#{taken[key] - 1}"

            def plan(scaling: _Scaling = scaling, chain: Any = chain) -> Callable[[], None]:
                return self._plan(scaling, chain, context, builder)

            flops = float(cost.numel(node))
            result.sites.append(
                Site(
                    key=key,
                    kind="scale",
                    module=ir.module_path(node),
                    spelling=_spelling(scaling),
                    where=ir.where(node),
                    shape="×".join(map(str, ir.shape(node))),
                    dtype=str(ir.dtype(node)).removeprefix("torch."),
                )
            )
            if self.attempt(context, result, key, plan):
                result.savings[key] = (0.0, flops)
        return result

    def _plan(
        self,
        scaling: _Scaling,
        chain: tuple[fx.Node, Axis | None] | None,
        context: Context,
        builder: WeightBuilder,
    ) -> Callable[[], None]:
        if context.policy == "pays" and context.training:
            raise Refuse(
                "does not pay in training: the weights would be scaled at every step, the "
                f"activations' {cost.numel(scaling.node):,} multiplications fuse into their "
                "neighbours",
                scaling.node,
            )
        reason: Refuse | None = None
        if chain is not None:
            try:
                return self._into_producer(scaling, *chain, builder)
            except Refuse as refusal:
                reason = refusal
        try:
            return self._into_readers(scaling, builder)
        except Refuse as refusal:
            raise reason or refusal from None

    # -- backwards ---------------------------------------------------------------------------

    def _into_producer(
        self, scaling: _Scaling, producer: fx.Node, axis: Axis | None, builder: WeightBuilder
    ) -> Callable[[], None]:
        linear = match_linear(producer)
        if linear is None:
            return self._into_norm(scaling, producer, axis, builder)
        if not linear.owned:
            raise Refuse("the layer's weight or bias is computed from activations", producer)
        if table_user(linear.weight) is not None and not self.copy_tied:
            raise Refuse("the layer's weight is tied to an embedding and would be copied", producer)
        if axis is not None and axis.dims != (linear.feature_out,):
            raise Refuse("the scale runs along another dim than the layer's outputs", producer)

        def commit() -> None:
            factor = scaling.factor(builder, linear.weight)
            if isinstance(factor, fx.Node):
                factor = _as_vector(builder, factor, scaling, axis)
            weight, bias = builder.fold_out(linear, factor, None)
            linear.rebuild(weight=weight, bias=bias)
            _drop(scaling)

        return commit

    def _into_norm(
        self, scaling: _Scaling, norm: fx.Node, axis: Axis | None, builder: WeightBuilder
    ) -> Callable[[], None]:
        args = ir.NormArgs(norm)
        gain = args.gain
        if gain is None:
            raise Refuse("the norm has no gain to take the scale", norm)
        for t in (gain, args.bias):
            if t is not None and not is_weight(t):
                raise Refuse("the norm's gain or bias is computed from activations", t)
        if axis is not None and axis != feature_axis(norm, (gain, args.bias), args.dims):
            raise Refuse("the scale runs along other dims than the norm's gain", norm)

        def commit() -> None:
            changes: dict[str, Any] = {"out_dtype": ir.dtype(norm)}
            for name in ("gain", "bias"):
                t = getattr(args, name)
                if t is None:
                    continue
                factor = scaling.factor(builder, t)
                if isinstance(factor, fx.Node):
                    factor = _as_vector(builder, factor, scaling, axis)
                    factor = _against(builder, factor, scaling, axis)
                scaled = builder.emit(aten.mul.Tensor, builder.work(t), factor)
                changes[name] = builder.finish(scaled, ir.dtype(t))
            set_args(norm, **changes)
            ir.set_val(norm)
            _drop(scaling)

        return commit

    # -- forwards ----------------------------------------------------------------------------

    def _into_readers(self, scaling: _Scaling, builder: WeightBuilder) -> Callable[[], None]:
        node = scaling.node
        if scaling.is_number:
            rank = len(ir.shape(node))
            axes = [Axis((d,)) for d in (-1, -3, -2, -4) if -d <= rank]
        else:
            axes = [feature_axis(node, (scaling.scale,), ())]  # type: ignore[arg-type]
        problem: Refuse | None = None
        for axis in axes:
            try:
                readings = check_readers(
                    node, axis, gain=True, shift=False, copy_tied=self.copy_tied
                )
            except Refuse as refusal:
                problem = problem or refusal
                continue
            if not readings:
                raise Refuse("nobody reads the scaled value", node)
            sizes = [ir.shape(node)[d] for d in axis.dims]

            def commit(readings: Any = readings, axis: Axis = axis, sizes: Any = sizes) -> None:
                factor = scaling.factor(builder, readings[0].linear.weight)
                if not scaling.is_number:
                    fold_into_readers(
                        builder,
                        readings,
                        lambda t: builder.vector(t, axis.dims, sizes),
                        factor,
                        None,
                    )
                else:
                    if isinstance(factor, fx.Node):
                        factor = _scalar(builder, factor)
                    for r in readings:
                        weight, bias = builder.fold_in(r.linear, factor, None)
                        r.linear.rebuild(weight=weight, bias=bias)
                _drop(scaling)

            return commit
        assert problem is not None
        raise problem


# ---------------------------------------------------------------------------------------------
# Recognition


def _match(node: fx.Node) -> _Scaling | None:
    """A multiplication of an activation by a number or by a weight."""
    if not ir.is_call(node, *_MULS, *_DIVS) or len(node.args) != 2 or node.kwargs:
        return None
    if node.meta.get("mutated") or not ir.is_tensor(node) or is_weight(node):
        return None
    divides = ir.is_call(node, *_DIVS)
    args: tuple[Any, ...] = node.args
    pairs = [args] if divides else [args, args[::-1]]
    for x, scale in pairs:
        if not ir.is_tensor(x) or is_weight(x) or not ir.dtype(x).is_floating_point:
            continue
        if not ir.same_shape(ir.shape(x), ir.shape(node)):
            continue
        if isinstance(scale, bool) or (isinstance(scale, fx.Node) and not ir.is_tensor(scale)):
            continue
        if isinstance(scale, (int, float)):
            if not math.isfinite(scale) or (divides and scale == 0):
                continue
            return _Scaling(node, x, float(scale), divides)
        if isinstance(scale, fx.Node) and is_weight(scale):
            if ir.dtype(scale).is_floating_point:
                return _Scaling(node, x, scale, divides)
    return None


def _spelling(scaling: _Scaling) -> str:
    what = scaling.scale if not isinstance(scaling.scale, fx.Node) else "weight"
    return f"x {'/' if scaling.divides else '·'} {what}"


def _varies(scaling: _Scaling) -> Axis:
    """The dims of the result along which the scale varies, gaps filled."""
    return feature_axis(scaling.node, (scaling.scale,), ())  # type: ignore[arg-type]


def _before(scaling: _Scaling) -> tuple[fx.Node, Axis | None] | None:
    """The layer or norm that makes the scaled value for this scaling alone, if there is one.

    Returns it with the axis of the scale in its result (``None`` for a number).
    """
    axis: Axis | None = None
    if not scaling.is_number:
        try:
            axis = _varies(scaling)
        except Refuse:
            return None
    cur, reader = scaling.x, scaling.node
    while True:
        if set(cur.users) != {reader}:
            return None
        layer = match_features(cur, axis.dims if axis is not None else ())
        if layer is not None or ir.is_call(cur, nf.layer_norm, nf.rms_norm):
            return cur, axis
        if cur.op != "call_function" or cur.meta.get("mutated"):
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


def _near_layers(scaling: _Scaling) -> bool:
    """True if a linear layer reads the scaled value directly (or its LayerScale nature is clear)."""
    users = list(scaling.node.users)
    if not scaling.is_number:
        try:
            axis = _varies(scaling)
        except Refuse:
            return False
        producer = match_linear(scaling.x)
        if producer is not None and channel_scale(scaling.node, axis, {}) is not None:
            return True
    return bool(users) and all(
        (m := match_linear(u)) is not None and m.input is scaling.node for u in users
    )


# ---------------------------------------------------------------------------------------------
# Factors


def _scalar(builder: WeightBuilder, factor: fx.Node) -> fx.Node:
    """A one-element tensor that broadcasts against any weight."""
    return factor if not ir.shape(factor) else builder.emit(aten.reshape.default, factor, [])


def _as_vector(
    builder: WeightBuilder, factor: fx.Node, scaling: _Scaling, axis: Axis | None
) -> fx.Node:
    """The factor over the producer's output features (``axis`` says where they went)."""
    if axis is None:
        return _scalar(builder, factor)
    where = _varies(scaling)
    sizes = [ir.shape(scaling.node)[d] for d in where.dims]
    return builder.tile(builder.vector(factor, where.dims, sizes), axis.outer, axis.inner)


def _against(
    builder: WeightBuilder, vector: fx.Node, scaling: _Scaling, axis: Axis | None
) -> fx.Node:
    """A vector over the features along ``axis``, broadcastable against a norm's result."""
    if axis is None:
        return vector
    sizes = [ir.shape(scaling.node)[d] for d in _varies(scaling).dims]
    if len(axis.dims) == 1:
        sizes = [-1]
    ones = [1] * (-axis.dims[-1] - 1)
    if len(sizes) == 1 and not ones:
        return vector
    return builder.emit(aten.reshape.default, vector, [*sizes, *ones])


def _drop(scaling: _Scaling) -> None:
    """Take the multiplication out; a promotion it did stays as a cast."""
    node, x = scaling.node, scaling.x
    if ir.dtype(x) != ir.dtype(node):
        with node.graph.inserting_before(node):
            x = ir.emit(node.graph, aten.to.dtype, x, ir.dtype(node), like=node)
    ir.replace(node, x)
