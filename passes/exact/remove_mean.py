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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .. import ir
from ..axis import SPLITS, Axis, channel_scale, is_dropout
from ..errors import Refuse
from ..manager import Context, Pass, PassResult, register
from ..residual import (
    Stream,
    Writer,
    centered_streams,
    iter_norms,
    linear_out_axis,
    streams,
    writer_is_centered,
)

if TYPE_CHECKING:
    import sympy

aten = torch.ops.aten
nf = torch.ops.normfuse

_LAYER_NORMS = (nf.layer_norm, nf.add_layer_norm)
_TO_RMS = {
    nf.layer_norm.default: nf.rms_norm.default,
    nf.add_layer_norm.default: nf.add_rms_norm.default,
}

# What a value of the stream is once the writers have been dealt with
_CLEAN, _TABLE, _DIRTY = "centered", "a weight, centered or not as needed", "uncentered"


@dataclass
class _Plan:
    """How one stream is made zero-mean."""

    #: writers whose weights are centered
    weights: list[Writer] = field(default_factory=list)
    #: stream values after which a ``normfuse::center`` goes
    ops: list[fx.Node] = field(default_factory=list)


def numel(x: Any) -> int:
    """Number of elements of a fake tensor, symbolic sizes by their hint (1 without); no guards."""
    total = 1
    for s in x.shape:
        if not isinstance(s, int):
            hint = getattr(s.node, "hint", None)
            s = hint if isinstance(hint, int) else 1
        total *= s
    return total


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
        done: set[str] = set()
        pending = self._candidates(gm)
        touched: set[fx.Node] = set()
        while pending:
            stream, centered = pending.pop()
            if not touched.isdisjoint(_references(stream)):
                # the analysis knows nodes that have changed since
                pending, touched = self._candidates(gm), set()
                continue
            sites = list(iter_norms(stream, *_LAYER_NORMS))
            keys = [r.node.meta["site"] for r in sites]
            if not keys or not done.isdisjoint(keys):
                continue
            done.update(keys)
            banned = next((k for k in keys if (self.name, k) in context.banned), None)
            first = keys[0] if banned is None else banned

            def plan(
                stream: Stream = stream, centered: bool = centered, touched: set = touched
            ) -> Callable[[], None]:
                return self._plan(gm, context, stream, centered, touched)

            before = len(result.refused)
            applied = self.attempt(context, result, first, plan)
            others = [k for k in keys if k != first]
            if applied:
                result.applied += others
                context.journal += [(self.name, k) for k in others]
                for r in sites:
                    rows = numel(ir.val(r.value))
                    result.savings[r.node.meta["site"]] = (0.0, 2.0 * rows)
            else:
                reason = result.refused[before][1]
                result.refused += [(k, reason) for k in others]
        return result

    @staticmethod
    def _candidates(gm: fx.GraphModule) -> list[tuple[Stream, bool]]:
        """Streams with LayerNorms and whether they are zero-mean already, last stream first."""
        found = streams(gm)
        return [
            (s, c)
            for s, c in list(zip(found, centered_streams(found), strict=True))[::-1]
            if any(iter_norms(s, *_LAYER_NORMS))
        ]

    def _plan(
        self,
        gm: fx.GraphModule,
        context: Context,
        stream: Stream,
        centered: bool,
        touched: set[fx.Node],
    ) -> Callable[[], None]:
        sites = [r.node for r in iter_norms(stream, *_LAYER_NORMS)]
        if centered:
            return lambda: _to_rms(sites)
        try:
            plan = self._distribute(stream, context)
        except Refuse:
            if not self.explicit or any(ir.is_call(n, nf.add_layer_norm) for n in sites):
                raise
            return lambda: (_center_sites(stream, sites, touched), _to_rms(sites))[1]
        if context.policy == "pays":
            self._must_pay(context, stream, plan, len(sites))

        def commit() -> None:
            self._center_weights(gm, context, plan.weights, touched)
            for value in plan.ops:
                _center_value(stream, value, touched)
            _to_rms(sites)

        return commit

    # -- planning ----------------------------------------------------------------------------

    def _distribute(self, stream: Stream, context: Context) -> _Plan:
        """Decide for every writer where its mean is removed; raise if a reader would notice."""
        for r in stream.norms:
            if not ir.is_call(r.node, *_LAYER_NORMS):
                raise Refuse(
                    "another norm reads the same stream and sees its mean (only LayerNorms are "
                    "blind to it)",
                    r.node,
                )
        plan = _Plan()
        own: dict[fx.Node, Writer] = {w.node: w for w in stream.writers if w.user is None}
        leaves: dict[fx.Node, list[Writer]] = {}
        for w in stream.writers:
            if w.user is not None:
                leaves.setdefault(w.user, []).append(w)
        exposed = {r.value for r in (*stream.raw_readers, *stream.taps)}
        read = {r.value for r in stream.norms}
        fanout: dict[fx.Node, int] = {}
        for value in stream.values:
            for operand in {o for o, _ in stream.operands(value)}:
                fanout[operand] = fanout.get(operand, 0) + 1
        status: dict[fx.Node, str] = {}
        # tables that are still undecided at a value
        tables: dict[fx.Node, list[Writer]] = {}

        def settle(value: fx.Node) -> None:
            """From here on ``value`` must be centered."""
            if status[value] == _TABLE:
                plan.weights.extend(tables[value])
            elif status[value] == _DIRTY:
                plan.ops.append(value)
            status[value] = _CLEAN

        for value in stream.values:
            if value in own:
                status[value] = self._writer_status(own[value], context)
                tables[value] = [own[value]] if status[value] == _TABLE else []
                if status[value] == _CLEAN and not writer_is_centered(own[value]):
                    plan.weights.append(own[value])
            else:
                sources = list(dict.fromkeys(o for o, _ in stream.operands(value)))
                sources = [o for o in sources if o in status]
                mine = leaves.get(value, [])
                kinds = {status[o] for o in sources} | ({_TABLE} if mine else set())
                if _CLEAN in kinds:
                    for o in sources:
                        settle(o)
                    plan.weights.extend(mine)
                    status[value], tables[value] = _CLEAN, []
                elif _DIRTY in kinds:
                    # weights that meet an uncentered value are centered together with it
                    status[value], tables[value] = _DIRTY, []
                else:
                    status[value] = _TABLE
                    tables[value] = [t for o in sources for t in tables[o]] + mine
            if value in exposed:
                if status[value] == _CLEAN:
                    self._refuse_exposed(stream, value)
                status[value] = _DIRTY
            if value in read or fanout.get(value, 0) > 1:
                settle(value)
        plan.weights = [w for w in plan.weights if not writer_is_centered(w)]
        return plan

    @staticmethod
    def _refuse_exposed(stream: Stream, value: fx.Node) -> None:
        reader = next(r for r in (*stream.raw_readers, *stream.taps) if r.value is value)
        others = len(stream.raw_readers) + len(stream.taps) - 1
        more = f" (and {others} more readers)" if others else ""
        if reader.kind == "tap":
            raise Refuse(
                f"the residual stream itself is an output of the model, its mean included{more}",
                value,
            )
        raise Refuse(
            f"{reader.label} {reader.reason}, so it sees the stream's mean{more}", reader.node
        )

    def _writer_status(self, w: Writer, context: Context) -> str:
        if writer_is_centered(w):
            return _CLEAN
        if w.kind == "weight":
            return _TABLE
        if w.kind == "embedding":
            table = w.source.args[0]
            sparse = len(w.source.args) > 4 and w.source.args[4]
            if sparse or w.gates or w.source_axis.dims != (-1,) or not ir.is_weight_expr(table):
                return _DIRTY
            if context.policy == "pays":
                size = numel(ir.val(table)) * ir.dtype(table).itemsize
                if size > self.max_table_bytes or context.training or _is_shared(table):
                    return _DIRTY
            return _TABLE
        if w.linear is not None and _centrable(w):
            return _CLEAN
        return _DIRTY

    def _must_pay(self, context: Context, stream: Stream, plan: _Plan, norms: int) -> None:
        rows = max(numel(ir.val(r.value)) for r in stream.norms)
        if 2 * len(plan.ops) > norms:
            culprits = ", ".join(ir.describe(v) for v in plan.ops[:3])
            raise Refuse(
                f"does not pay: {_count(len(plan.ops), 'activation')} ({culprits}"
                f"{', …' if len(plan.ops) > 3 else ''}) would have to be centered by an op of its "
                f"own to spare {_count(norms, 'LayerNorm')} the mean",
                plan.ops[0],
            )
        if context.training and plan.weights:
            weights = sum(numel(ir.val(_weight_of(w))) for w in plan.weights)
            raise Refuse(
                f"does not pay in training: {weights:,} weight elements would be centered at every "
                f"step to spare {_count(norms, 'LayerNorm')} a mean over {rows:,} activations"
            )

    # -- committing --------------------------------------------------------------------------

    def _center_weights(
        self,
        gm: fx.GraphModule,
        context: Context,
        writers: Sequence[Writer],
        touched: set[fx.Node],
    ) -> None:
        graph = gm.graph
        cache: dict[Any, fx.Node] = {}

        def centered(
            weight: fx.Node, axis: Axis, before: fx.Node, scale: fx.Node | None = None
        ) -> fx.Node:
            key = (weight, axis, scale)
            if key not in cache:
                dtypes = [ir.dtype(t) for t in (weight, scale) if t is not None]
                with graph.inserting_before(before):
                    work = context.fold_dtype(*dtypes)
                    w = ir.weight_cast(graph, weight, work)
                    if scale is not None:
                        s = _along(graph, ir.weight_cast(graph, scale, work), weight, axis.dims[0])
                        w = ir.emit(graph, aten.mul.Tensor, w, s, like=weight, weight=True)
                    w = emit_center(graph, w, axis, like=weight, weight=True)
                    cache[key] = ir.weight_cast(graph, w, ir.dtype(weight))
            return cache[key]

        for w in writers:
            if w.kind == "weight":
                assert w.user is not None
                new = centered(w.node, w.axis, w.user)
                w.user.replace_input_with(w.node, new)
            elif w.kind == "embedding":
                table = w.source.args[0]
                new = centered(table, _table_axis(w), w.source)
                w.source.update_arg(0, new)
            else:
                self._center_linear(graph, w, centered, touched)

    @staticmethod
    def _center_linear(
        graph: fx.Graph, w: Writer, centered: Callable[..., fx.Node], touched: set[fx.Node]
    ) -> None:
        linear = w.linear
        assert linear is not None
        axis = linear_out_axis(linear, w.source_axis)
        assert axis is not None
        scale = _gate_scale(w)
        weight = centered(linear.weight, axis, w.source, scale)
        changes: dict[str, Any] = {"weight": weight}
        if linear.bias is not None:
            bias_axis = Axis((-1,), axis.outer, axis.inner)
            changes["bias"] = centered(linear.bias, bias_axis, w.source, scale)
        new = linear.rebuild(**changes)
        touched.add(w.source)
        if scale is not None:
            gate = w.gates[0]
            unscaled = new if w.path[0] is gate else w.path[w.path.index(gate) - 1]
            if ir.dtype(unscaled) != ir.dtype(gate):
                with graph.inserting_before(gate):
                    unscaled = ir.emit(graph, aten.to.dtype, unscaled, ir.dtype(gate), like=gate)
            touched.add(gate)
            ir.replace(gate, unscaled)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _is_shared(table: fx.Node) -> bool:
    return len(table.users) > 1


def _table_axis(w: Writer) -> Axis:
    return Axis((-1,), w.source_axis.outer, w.source_axis.inner)


def _weight_of(w: Writer) -> fx.Node:
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
    if not ir.is_weight_expr(linear.weight):
        return False
    if linear.bias is not None and not ir.is_weight_expr(linear.bias):
        return False
    if not w.gates:
        return True
    if len(w.gates) > 1 or is_dropout(w.gates[0]) or w.axis != w.source_axis:
        return False
    # the scale moves into the weight, so nobody else may read the unscaled result
    return all(len(n.users) == 1 for n in (w.source, *w.path[:-1]))


def emit_center(
    graph: fx.Graph, x: fx.Node, axis: Axis, *, like: fx.Node, weight: bool = False
) -> fx.Node:
    """``x`` minus its mean along ``axis``; the statistic of low-precision values is float32."""
    stat = torch.float32 if ir.dtype(x) in (torch.float16, torch.bfloat16) else None

    def emit(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return ir.emit(graph, target, *args, like=like, weight=weight, **kwargs)

    if axis.whole:
        return emit(nf.center.default, x, list(axis.dims), stat_dtype=stat)
    dim = axis.dims[0]
    sizes = [axis.outer, axis.size(ir.shape(x)), axis.inner]
    split = emit(aten.unflatten.int, x, dim, sizes)
    middle = emit(nf.center.default, split, [dim - 1], stat_dtype=stat)
    return emit(aten.flatten.using_ints, middle, dim - 2, dim)


def _along(graph: fx.Graph, scale: fx.Node, weight: fx.Node, dim: int) -> fx.Node:
    """A per-channel scale of any shape, broadcastable along ``dim`` of ``weight``."""
    shape = [-1] + [1] * (-dim - 1)
    return ir.emit(graph, aten.reshape.default, scale, shape, like=scale, weight=True)


def _center_value(stream: Stream, value: fx.Node, touched: set[fx.Node]) -> None:
    """Let the stream's ops and norms read ``value`` centered; others keep the original."""
    inside = set(stream.values) | {r.node for r in stream.norms if r.value is value}
    with value.graph.inserting_after(_after(value)):
        new = emit_center(value.graph, value, stream.values[value], like=value)
    _redirect(value, new, inside)
    touched.add(value)


def _center_sites(stream: Stream, sites: Sequence[fx.Node], touched: set[fx.Node]) -> None:
    """One explicit centering per value that LayerNorms read; nothing else notices."""
    chosen = set(sites)
    for value in {r.value: None for r in iter_norms(stream, *_LAYER_NORMS)}:
        with value.graph.inserting_after(_after(value)):
            new = emit_center(value.graph, value, stream.values[value], like=value)
        _redirect(value, new, chosen)
        touched.add(value)


def _after(value: fx.Node) -> fx.Node:
    """Where to insert right behind ``value`` (placeholders stay together)."""
    if value.op != "placeholder":
        return value
    return [n for n in value.graph.nodes if n.op == "placeholder"][-1]


def _redirect(value: fx.Node, new: fx.Node, readers: set[fx.Node]) -> None:
    for user in list(value.users):
        parts = user.users if ir.is_call(user, *SPLITS) else (user,)
        if user is not new and any(p in readers for p in parts):
            user.replace_input_with(value, new)


def _to_rms(sites: Sequence[fx.Node]) -> None:
    """Retarget LayerNorm nodes in place; every argument keeps its value."""
    for node in sites:
        args = ir.NormArgs(node).replaced()
        schema = node.target._schema
        positional = [a.name for a in schema.arguments if not a.kwarg_only]
        node.target = _TO_RMS[node.target]
        node.args = tuple(args[name] for name in positional)
        node.kwargs = {k: v for k, v in args.items() if k not in positional}


def _references(stream: Stream) -> Iterator[fx.Node]:
    """Nodes that a rewrite of the stream relies on."""
    yield from stream.values
    for w in stream.writers:
        yield w.source
        yield from w.path
        if w.linear is not None:
            yield w.linear.input
