"""FoldStaticScale: fixed scalings and shifts move into a neighbouring layer.

LayerScale (one weight per channel behind a layer), scalar gates, ``q · d^-½``, residual multipliers
and the ``1/√ℓ`` of LayerNorm Scaling ("Curse of Depth", 2025, eq. 2) are fixed once trained; so is
a norm whose mean and deviation are buffers (UN, the core of PowerNorm, tapered norms), written as
subtractions, divisions and additions of weights::

    s ⊙ (W x + b) + t = (diag(s) W) x + (s ⊙ b + t)     c·(γ ⊙ n + β) = (cγ) ⊙ n + cβ
    W (s ⊙ x + t) + b = (W diag(s)) x + (b + W t)

Every op folds by itself, so a chain of them goes the way its first or last one goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .. import cost, ir
from ..axis import Axis
from ..contract import Context, Pass, PassResult, register
from ..errors import Refuse
from ..fixed_maps import FixedMap, before, match, near_layers
from ..linear import Linear, is_weight, match_linear, set_args, table_user
from ..readers import check_readers, feature_axis, fold_into_readers
from ..report import Site
from ..weight_builder import WeightBuilder

if TYPE_CHECKING:
    import sympy

aten = torch.ops.aten


@register
class FoldStaticScale(Pass):
    """Fold scalings and shifts by weights and numbers into the layer or norm before, or layers behind.

    Only those next to a layer or norm are sites; arithmetic inside activations is left alone.

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
        """Behind a layer, behind a norm, before a layer; shifts as well."""
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
            (times(s, w * x + b) + beta, (sympy.diag(*s) * w) * x + (times(s, b) + beta)),
            (c * (times(gain, n) + beta), times(c * gain, n) + c * beta),
            (u * (times(s, n) + beta) + e, (u * sympy.diag(*s)) * n + (e + u * beta)),
        ]

    def run(self, gm: fx.GraphModule, context: Context) -> PassResult:
        result = PassResult()
        builder = WeightBuilder(gm.graph, context)
        names = _Names()
        while True:  # what is folded may uncover the next op of a chain
            done = len(result.applied)
            result.refused.clear()
            for node in list(gm.graph.nodes):
                found = match(node)
                if found is None:
                    continue
                chain = before(found)
                if chain is None and not near_layers(found):
                    continue

                def plan(found: FixedMap = found, chain: Any = chain) -> Callable[[], None]:
                    return self._plan(found, chain, context, builder)

                key, new = names.of(found)
                result.sites += [_site(found, key)] if new else []
                parts = (found.scale is not None) + (found.shift is not None)
                flops = float(cost.numel(node) * parts)
                if self.attempt(context, result, key, plan):
                    result.savings[key] = (0.0, flops)
            if len(result.applied) == done:
                return result

    def _plan(
        self,
        found: FixedMap,
        chain: tuple[fx.Node, Axis | None] | None,
        context: Context,
        builder: WeightBuilder,
    ) -> Callable[[], None]:
        if context.policy == "pays" and context.training:
            raise Refuse(
                "does not pay in training: the weights would be computed at every step, the "
                f"activations' {cost.numel(found.node):,} operations fuse into their neighbours",
                found.node,
            )
        reason: Refuse | None = None
        if chain is not None:
            try:
                return self._into_producer(found, *chain, builder)
            except Refuse as refusal:
                reason = refusal
        try:
            return self._into_readers(found, builder)
        except Refuse as refusal:
            raise reason or refusal from None

    # -- backwards ---------------------------------------------------------------------------

    def _into_producer(
        self, found: FixedMap, producer: fx.Node, axis: Axis | None, builder: WeightBuilder
    ) -> Callable[[], None]:
        linear = match_linear(producer)
        if linear is None:
            return self._into_norm(found, producer, axis, builder)
        if not linear.owned:
            why = ir.why_no_weight(linear.weight, linear.bias)
            raise Refuse(f"the layer's weight or bias {why}", producer)
        if found.scale is not None and table_user(linear.weight) and not self.copy_tied:
            raise Refuse("the layer's weight is tied to an embedding and would be copied", producer)
        if axis is not None and axis.dims != (linear.feature_out,):
            raise Refuse(
                f"the {found.kind} runs along another dim than the layer's outputs", producer
            )

        def commit() -> None:
            factor, offset = (
                _as_vector(builder, t, found, axis)
                for t in (
                    found.factor(builder, linear.weight),
                    found.offset(builder, linear.weight),
                )
            )
            weight, bias = builder.fold_out(linear, factor, offset)
            linear.rebuild(weight=weight, bias=bias)
            found.drop()

        return commit

    def _into_norm(
        self, found: FixedMap, norm: fx.Node, axis: Axis | None, builder: WeightBuilder
    ) -> Callable[[], None]:
        args = ir.NormArgs(norm)
        gain = args.gain
        if gain is None:
            raise Refuse("the norm has no gain to take the scale", norm)
        for t in (gain, args.bias):
            if t is not None and not is_weight(t):
                raise Refuse(f"the norm's gain or bias {ir.why_no_weight(t)}", t)
        if axis is not None and axis != feature_axis(norm, (gain, args.bias), args.dims):
            raise Refuse("the scale runs along other dims than the norm's gain", norm)

        def commit() -> None:
            changes: dict[str, Any] = {"out_dtype": ir.dtype(norm)}
            for name in ("gain", "bias"):
                t = getattr(args, name)
                if t is None:
                    continue
                factor = _as_vector(builder, found.factor(builder, t), found, axis)
                factor = _against(builder, factor, found, axis)
                scaled = builder.emit(aten.mul.Tensor, builder.work(t), factor)
                changes[name] = builder.finish(scaled, ir.dtype(t))
            set_args(norm, **changes)
            ir.set_val(norm)
            found.drop()

        return commit

    # -- forwards ----------------------------------------------------------------------------

    def _into_readers(self, found: FixedMap, builder: WeightBuilder) -> Callable[[], None]:
        node = found.node
        if found.is_number:
            rank = len(ir.shape(node))
            axes = [Axis((d,)) for d in (-1, -3, -2, -4) if -d <= rank]
        else:
            axes = [found.varies()]
        problem: Refuse | None = None
        for axis in axes:
            try:
                readings = check_readers(
                    node,
                    axis,
                    gain=found.scale is not None,
                    shift=found.shift is not None,
                    copy_tied=self.copy_tied or found.scale is None,
                )
            except Refuse as refusal:
                problem = problem or refusal
                continue
            if not readings:
                raise Refuse("nobody reads the result", node)
            sizes = [ir.shape(node)[d] for d in axis.dims]

            def commit(readings: Any = readings, axis: Axis = axis, sizes: Any = sizes) -> None:
                like = readings[0].linear.weight
                factor, offset = found.factor(builder, like), found.offset(builder, like)
                if not found.is_number:
                    fold_into_readers(
                        builder,
                        readings,
                        lambda t: builder.vector(t, axis.dims, sizes),
                        factor,
                        offset,  # type: ignore[arg-type]
                    )
                else:
                    for r in readings:
                        weight, bias = builder.fold_in(
                            r.linear, _scalar(builder, factor), _filled(builder, offset, r.linear)
                        )
                        r.linear.rebuild(weight=weight, bias=bias)
                found.drop()

            return commit
        assert problem is not None
        raise problem


class _Names:
    """Site keys: the module's path and what it is, with a number from the second one on."""

    def __init__(self) -> None:
        self._keys: dict[fx.Node, str] = {}
        self._taken: Counter[str] = Counter()

    def of(self, found: FixedMap) -> tuple[str, bool]:
        """The key, and whether it is the first time that it is asked for."""
        known = self._keys.get(found.node)
        if known is not None:
            return known, False
        base = f"{ir.module_path(found.node) or 'graph'}.{found.kind}"
        n = self._taken[base]
        self._taken[base] += 1
        key = self._keys[found.node] = f"{base}#{n}" if n else base
        return key, True


def _site(found: FixedMap, key: str) -> Site:
    node = found.node
    return Site(
        key=key,
        kind=found.kind,
        module=ir.module_path(node),
        spelling=found.spelling,
        where=ir.where(node),
        shape="×".join(map(str, ir.shape(node))),
        dtype=str(ir.dtype(node)).removeprefix("torch."),
    )


# ---------------------------------------------------------------------------------------------
# Factors


def _scalar(builder: WeightBuilder, factor: Any) -> Any:
    """A number, or a one-element tensor that broadcasts against any weight."""
    if not isinstance(factor, fx.Node) or not ir.shape(factor):
        return factor
    return builder.emit(aten.reshape.default, factor, [])


def _filled(builder: WeightBuilder, offset: Any, linear: Linear) -> fx.Node | None:
    """The same shift for every input feature of a layer, as a vector."""
    if offset is None:
        return None
    size = [linear.in_features]
    if not isinstance(offset, fx.Node):
        like = builder.work(linear.weight)
        return builder.emit(aten.new_full.default, like, size, offset)
    return builder.emit(aten.expand.default, _scalar(builder, offset), size)


def _as_vector(builder: WeightBuilder, factor: Any, found: FixedMap, axis: Axis | None) -> Any:
    """The factor over the producer's output features (``axis`` says where they went)."""
    if axis is None:
        return _scalar(builder, factor)
    if not isinstance(factor, fx.Node):
        return factor
    where = found.varies()
    sizes = [ir.shape(found.node)[d] for d in where.dims]
    return builder.tile(builder.vector(factor, where.dims, sizes), axis.outer, axis.inner)


def _against(builder: WeightBuilder, vector: Any, found: FixedMap, axis: Axis | None) -> Any:
    """A vector over the features along ``axis``, broadcastable against a norm's result."""
    if axis is None:
        return vector
    sizes = [ir.shape(found.node)[d] for d in found.varies().dims]
    if len(axis.dims) == 1:
        sizes = [-1]
    ones = [1] * (-axis.dims[-1] - 1)
    if len(sizes) == 1 and not ones:
        return vector
    return builder.emit(aten.reshape.default, vector, [*sizes, *ones])
