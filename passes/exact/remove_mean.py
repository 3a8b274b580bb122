"""RemoveMean: LayerNorm becomes RMSNorm where nobody sees the mean of the residual stream.

Every reader of the stream subtracts its mean, so the mean can be taken away where it enters: the
writers' weights are centered over their output features (Jiang et al., "Pre-RMSNorm and
Pre-CRMSNorm Transformers", 2023, section 3.1). With ``C = I − 11ᵀ/d``::

    C (W x + b) = (C W) x + C b          LN(v) = RMS(C v)

Between writer and reader only ops that treat all features alike may sit: they commute with ``C``.
What cannot be centered in weights (a norm's output, an active dropout, a large embedding table) is
centered once where it enters, by ``normfuse::center``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .. import cost, ir
from ..axis import SPLITS, Axis, channel_scale, is_dropout, users
from ..contract import Context, Pass, PassResult, register
from ..errors import Refuse
from ..linear import is_weight, match_linear
from ..residual import Reader, Stream, Writer, iter_norms, streams
from ..weight_builder import WeightBuilder
from ..zero_mean import centered_writers, linear_out_axis

if TYPE_CHECKING:
    import sympy

aten = torch.ops.aten
nf = torch.ops.normfuse

_LAYER_NORMS = (nf.layer_norm, nf.add_layer_norm)
_TO_RMS = {
    nf.layer_norm.default: nf.rms_norm.default,
    nf.add_layer_norm.default: nf.add_rms_norm.default,
}

_OTHER_NORM = (
    "another norm reads the same stream and sees its mean (only LayerNorms are blind to it)"
)

# What a value of the stream is once the writers have been dealt with
_FREE = "zero-mean as it is"
_CLEAN = "centered by its weights, so changed"
_OPEN = "its writers' weights can be centered, if needed"
_DIRTY = "as it was"


@dataclass
class _Plan:
    """How one stream is made zero-mean."""

    #: writers whose weights are centered
    weights: list[Writer] = field(default_factory=list)
    #: stream values after which a ``normfuse::center`` goes
    ops: list[fx.Node] = field(default_factory=list)


@register
class RemoveMean(Pass):
    """Turn the LayerNorms of a residual stream into RMSNorms; all of one stream or none.

    Args:
        explicit: where other readers see the stream's mean, put one ``normfuse::center`` before
            each LayerNorm instead of refusing (for tools that only know RMSNorm; costs what the
            mean inside the LayerNorm did).
        max_table_bytes: under the policy ``"pays"``, embedding tables larger than this are not
            copied; the embedding's output is centered instead.
    """

    name = "remove_mean"
    promise = "exact"

    def __init__(self, *, explicit: bool = False, max_table_bytes: int = 1 << 22) -> None:
        super().__init__(explicit=explicit, max_table_bytes=max_table_bytes)
        self.explicit = explicit
        self.max_table_bytes = max_table_bytes

    @classmethod
    def identity(cls) -> Sequence[tuple[sympy.Matrix, sympy.Matrix]]:
        """Centered writers, LayerScale before centering, and LN(v) = RMS(C v)."""
        import sympy

        d, k = 3, 2
        eps = sympy.Symbol("epsilon", positive=True)
        w = sympy.Matrix(d, k, sympy.symbols(f"w:{d * k}", real=True))
        b = sympy.Matrix(d, 1, sympy.symbols(f"b:{d}", real=True))
        x = sympy.Matrix(k, 1, sympy.symbols(f"x:{k}", real=True))
        v = sympy.Matrix(d, 1, sympy.symbols(f"v:{d}", real=True))
        u = sympy.Matrix(d, 1, sympy.symbols(f"u:{d}", real=True))
        scale = sympy.diag(*sympy.symbols(f"s:{d}", real=True))
        row = sympy.Symbol("rho", real=True)
        c = sympy.eye(d) - sympy.ones(d, d) / d

        def rms(y: sympy.Matrix) -> sympy.Matrix:
            return y / sympy.sqrt((y.T * y)[0] / d + eps)

        def layer_norm(y: sympy.Matrix) -> sympy.Matrix:
            mean = sum(y) / d
            h = y - mean * sympy.ones(d, 1)
            return h / sympy.sqrt(sum(e**2 for e in h) / d + eps)

        return [
            (c * (w * x + b), (c * w) * x + c * b),
            (c * (scale * (w * x + b)), (c * scale * w) * x + c * scale * b),
            (c * (v + row * u), c * v + row * (c * u)),
            (layer_norm(v), rms(c * v)),
        ]

    # -- running -----------------------------------------------------------------------------

    def run(self, gm: fx.GraphModule, context: Context) -> PassResult:
        result = PassResult()
        builder = WeightBuilder(gm.graph, context)
        found = streams(gm)
        # facts of the graph as it came; rewrites keep its nodes (norms and linears change in place)
        free = centered_writers(found)
        for stream in found:
            sites = list(iter_norms(stream, *_LAYER_NORMS))
            keys = list(dict.fromkeys(r.node.meta["site"] for r in sites))
            if not keys:
                continue
            banned = next((k for k in keys if (self.name, k) in context.banned), None)
            first = keys[0] if banned is None else banned

            def plan(stream: Stream = stream) -> Callable[[], None]:
                return self._plan(builder, context, stream, free)

            before = len(result.refused)
            applied = self.attempt(context, result, first, plan)
            others = [k for k in keys if k != first]
            if applied:
                result.applied += others
                for r in sites:
                    rows = cost.numel(r.value)
                    result.savings[r.node.meta["site"]] = (0.0, 2.0 * rows)
            else:
                reason = result.refused[before][1]
                result.refused += [(k, reason) for k in others]
        return result

    def _plan(
        self,
        builder: WeightBuilder,
        context: Context,
        stream: Stream,
        free: set[Writer],
    ) -> Callable[[], None]:
        sites = [r.node for r in iter_norms(stream, *_LAYER_NORMS)]
        if free.issuperset(stream.writers):
            return lambda: _to_rms(sites)
        try:
            plan = self._distribute(stream, context, free)
        except Refuse:
            if not self.explicit or any(ir.is_call(n, nf.add_layer_norm) for n in sites):
                raise

            def explicit() -> None:
                _center_sites(stream, sites)
                _to_rms(sites)

            return explicit
        if context.policy == "pays":
            self._must_pay(context, stream, plan, len(sites))

        def commit() -> None:
            self._center_weights(builder, plan.weights)
            for value in plan.ops:
                _center_value(stream, value)
            _to_rms(sites)

        return commit

    # -- planning ----------------------------------------------------------------------------

    def _distribute(self, stream: Stream, context: Context, free: set[Writer]) -> _Plan:
        """Decide for every writer where its mean is removed; raise if a reader would notice."""
        blind = [r for r in stream.norms if ir.is_call(r.node, *_LAYER_NORMS)]
        seeing = [r for r in stream.readers if r not in blind]
        for r in seeing:
            if ir.is_call(r.node, nf.add_rms_norm):
                raise Refuse(_OTHER_NORM, r.node)
        plan = _Plan()
        own: dict[fx.Node, Writer] = {w.node: w for w in stream.writers if w.user is None}
        leaves: dict[fx.Node, list[Writer]] = {}
        for w in stream.writers:
            if w.user is not None:
                leaves.setdefault(w.user, []).append(w)
        exposed = {r.value: r for r in reversed(seeing)}
        read = {r.value for r in blind}
        fanout: dict[fx.Node, int] = {}
        for value in stream.values:
            for operand in {o for o, _ in stream.operands(value)}:
                fanout[operand] = fanout.get(operand, 0) + 1
        status: dict[fx.Node, str] = {}
        # writers that are still undecided at a value
        open_writers: dict[fx.Node, list[Writer]] = {}

        def settle(value: fx.Node) -> None:
            """From here on ``value`` must be centered."""
            if status[value] == _OPEN:
                plan.weights.extend(open_writers[value])
            elif status[value] == _DIRTY:
                plan.ops.append(value)
            if status[value] != _FREE:
                status[value] = _CLEAN

        for value in stream.values:
            if value in own:
                status[value] = _FREE if own[value] in free else self._status(own[value], context)
                open_writers[value] = [own[value]] if status[value] == _OPEN else []
            else:
                weights = leaves.get(value, [])
                links = dict.fromkeys(o for o, _ in stream.operands(value))
                sources = [o for o in links if all(o is not w.node for w in weights)]
                if not all(o in status for o in sources) or not (sources or weights):
                    raise Refuse(
                        "an earlier rewrite changed this stream; run the pass again", value
                    )
                mine = [w for w in weights if w not in free]
                kinds = {status[o] for o in sources} | ({_OPEN} if mine else set())
                if _CLEAN in kinds:
                    for o in sources:
                        settle(o)
                    plan.weights.extend(mine)
                    status[value], open_writers[value] = _CLEAN, []
                elif _DIRTY in kinds:
                    # writers that meet an uncentered value are centered together with it
                    status[value], open_writers[value] = _DIRTY, []
                elif _OPEN in kinds:
                    status[value] = _OPEN
                    open_writers[value] = [t for o in sources for t in open_writers[o]] + mine
                else:
                    status[value], open_writers[value] = _FREE, []
            if value in exposed:
                if status[value] == _CLEAN:
                    self._refuse_exposed(exposed[value], len(seeing) - 1)
                if status[value] == _OPEN:
                    status[value] = _DIRTY
            if value in read or fanout.get(value, 0) > 1:
                settle(value)
        return plan

    @staticmethod
    def _refuse_exposed(reader: Reader, others: int) -> None:
        more = f" (and {_count(others, 'more reader')})" if others else ""
        if reader.kind == "norm":
            raise Refuse(_OTHER_NORM + more, reader.node)
        if reader.kind == "tap":
            raise Refuse(
                f"the residual stream itself is an output of the model, its mean included{more}",
                reader.value,
            )
        raise Refuse(
            f"{reader.label} {reader.reason}, so it sees the stream's mean{more}", reader.node
        )

    def _status(self, w: Writer, context: Context) -> str:
        if w.kind == "weight":
            return _OPEN
        if w.kind == "embedding":
            source: Any = w.source
            table = source.args[0]
            sparse = len(source.args) > 4 and source.args[4]
            if sparse or w.gates or w.source_axis.dims != (-1,) or not is_weight(table):
                return _DIRTY
            if context.policy == "pays":
                size = cost.nbytes(table)
                if size > self.max_table_bytes or context.training or _is_shared(table):
                    return _DIRTY
            return _OPEN
        if w.linear is not None and _centrable(w):
            return _OPEN
        return _DIRTY

    def _must_pay(self, context: Context, stream: Stream, plan: _Plan, norms: int) -> None:
        rows = max(cost.numel(r.value) for r in stream.norms)
        if 2 * len(plan.ops) > norms:
            raise Refuse(
                f"does not pay: {_count(len(plan.ops), 'activation')} would have to be centered, "
                f"each by an op of its own, to spare {_count(norms, 'LayerNorm')} the mean",
                plan.ops[0],
            )
        if context.training and plan.weights:
            weights = sum(cost.numel(_weight_of(w)) for w in plan.weights)
            raise Refuse(
                f"does not pay in training: {weights:,} weight elements would be centered at every "
                f"step to spare {_count(norms, 'LayerNorm')} a mean over {rows:,} activations"
            )

    # -- committing --------------------------------------------------------------------------

    @staticmethod
    def _center_weights(builder: WeightBuilder, writers: Sequence[Writer]) -> None:
        for w in writers:
            if w.kind == "weight":
                assert w.user is not None
                w.user.replace_input_with(w.node, _centered(builder, w.node, w.axis))
            elif w.kind == "embedding":
                table: Any = w.source.args[0]
                w.source.update_arg(0, _centered(builder, table, _table_axis(w)))
            else:
                _center_linear(builder, w)


def _centered(
    builder: WeightBuilder, weight: fx.Node, axis: Axis, scale: fx.Node | None = None
) -> fx.Node:
    """``diag(scale)·weight`` minus its mean along ``axis``, rounded once to the weight's dtype."""
    others = () if scale is None else (scale,)
    w = builder.work(weight, *others)
    if scale is not None:
        s = builder.emit(aten.reshape.default, builder.work(scale, weight), [-1])
        w = builder.emit(aten.mul.Tensor, w, builder.along(s, axis.dims[0]))
    w = _emit_center(builder.emit, w, axis)
    return builder.finish(w, ir.dtype(weight))


def _center_linear(builder: WeightBuilder, w: Writer) -> None:
    linear = match_linear(w.source)
    assert linear is not None
    axis = linear_out_axis(linear, w.source_axis)
    assert axis is not None
    scale = _gate_scale(w)
    changes: dict[str, Any] = {"weight": _centered(builder, linear.weight, axis, scale)}
    if linear.bias is not None:
        along = Axis((-1,), axis.outer, axis.inner)
        changes["bias"] = _centered(builder, linear.bias, along, scale)
    linear.rebuild(**changes)
    if scale is None:
        return
    gate = w.gates[0]
    unscaled = w.source if w.path[0] is gate else w.path[w.path.index(gate) - 1]
    with builder.graph.inserting_before(gate):
        # the gate becomes a cast (of nothing, mostly), so that it stays the stream's value
        gate.target, gate.args, gate.kwargs = aten.to.dtype, (unscaled, ir.dtype(gate)), {}
    ir.set_val(gate)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _is_shared(table: fx.Node) -> bool:
    return len(table.users) > 1


def _table_axis(w: Writer) -> Axis:
    return Axis((-1,), w.source_axis.outer, w.source_axis.inner)


def _weight_of(w: Writer) -> Any:
    if w.kind == "embedding":
        return w.source.args[0]
    return w.linear.weight if w.linear is not None else w.node


def _gate_scale(w: Writer) -> fx.Node | None:
    if not w.gates:
        return None
    found = channel_scale(w.gates[0], w.source_axis, {})
    assert found is not None
    return found[1]


def _centrable(w: Writer) -> bool:
    """True if centering the linear's weights centers what enters the stream."""
    linear = w.linear
    if linear is None or linear_out_axis(linear, w.source_axis) is None:
        return False
    if not linear.owned:
        return False
    if linear.bias is not None:
        shape = ir.shape(linear.bias)
        if not shape or not ir.same_dim(shape[-1], linear.out_features):
            return False  # broadcast over the features
    if not w.gates:
        return True
    if len(w.gates) > 1 or is_dropout(w.gates[0]) or w.axis != w.source_axis:
        return False
    # the scale moves into the weight, so nobody else may read the unscaled result
    return all(len(n.users) == 1 for n in (w.source, *w.path[:-1]))


def _emit_center(emit: Callable[..., fx.Node], x: fx.Node, axis: Axis) -> fx.Node:
    """``x`` minus its mean along ``axis``; the statistic of low-precision values is float32."""
    stat = torch.float32 if ir.dtype(x) in (torch.float16, torch.bfloat16) else None
    if axis.whole:
        return emit(nf.center.default, x, list(axis.dims), stat_dtype=stat)
    dim = axis.dims[0]
    sizes = [axis.outer, axis.size(ir.shape(x)), axis.inner]
    split = emit(aten.unflatten.int, x, dim, sizes)
    middle = emit(nf.center.default, split, [dim - 1], stat_dtype=stat)
    return emit(aten.flatten.using_ints, middle, dim - 2, dim)


def _insert_center(value: fx.Node, axis: Axis, readers: set[fx.Node]) -> None:
    """Let ``readers`` read ``value`` centered; all others keep the original."""
    graph = value.graph
    behind = value
    if value.op == "placeholder":  # which stay together
        behind = next(n for n in reversed(graph.nodes) if n.op == "placeholder")
    with graph.inserting_before(behind.next):
        new = _emit_center(partial(ir.emit, graph, like=value), value, axis)
    for user in list(value.users):
        parts = user.users if ir.is_call(user, *SPLITS) else (user,)
        if user is not new and any(p in readers for p in parts):
            user.replace_input_with(value, new)


def _center_value(stream: Stream, value: fx.Node) -> None:
    """Let the stream's ops and LayerNorms read ``value`` centered."""
    # a writer's result is a value of the stream, too, but what the writer reads is none of its business
    inside = {
        u
        for u in users(value)
        if u in stream.values and any(o is value for o, _ in stream.operands(u))
    }
    inside |= {r.node for r in iter_norms(stream, *_LAYER_NORMS) if r.value is value}
    _insert_center(value, stream.values[value], inside)


def _center_sites(stream: Stream, sites: Sequence[fx.Node]) -> None:
    """One explicit centering per value that LayerNorms read; nothing else notices."""
    for value in {r.value: None for r in iter_norms(stream, *_LAYER_NORMS)}:
        _insert_center(value, stream.values[value], set(sites))


def _to_rms(sites: Sequence[Any]) -> None:
    """Retarget LayerNorm nodes in place; every argument keeps its value."""
    for node in sites:
        args = ir.NormArgs(node).replaced()
        schema = node.target._schema
        positional = [a.name for a in schema.arguments if not a.kwarg_only]
        node.target = _TO_RMS[node.target]
        node.args = tuple(args[name] for name in positional)
        node.kwargs = {k: v for k, v in args.items() if k not in positional}
