"""The residual stream as an object: who writes it, who reads it, what sits between.

A :class:`Stream` is a maximal set of values that share one feature axis and are connected by ops
acting on every feature alike (see :mod:`.axis`), grown from the input of a norm. At its border sit

* **writers**: ops whose result enters the stream (embedding, linear, conv, a norm, a weight, a
  graph input, anything else). A writer may reach the stream through *gates*, ops that treat
  features differently (LayerScale, an active dropout); they are listed with it.
* **readers**: norms over exactly the stream's features, *raw* readers (everything else that looks
  at the values), and *taps* (the stream is a graph output).

Inside it are the **adds** and other transparent ops. Every stream-level pass asks this object.
Building all streams of a graph takes time linear in its size.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import fx

from . import ir, ops
from .axis import (
    ADDS,
    Axis,
    Links,
    channel_scale,
    dropout_is_active,
    is_dropout,
    is_inert,
    is_zeros,
    operands,
    reads_metadata_only,
    result_axis,
    users,
)
from .linear import Linear, match_features, match_linear

aten = torch.ops.aten
nf = torch.ops.normfuse

ADD_NORMS = (nf.add_layer_norm.default, nf.add_rms_norm.default)
_RESCALED = (nf.gated_rms_norm.default, nf.seed_norm.default, nf.ada_rms_norm.default)
_NORMS = (*ops.NORM_OPS, *_RESCALED, *ADD_NORMS)
_EMBEDDINGS = (aten.embedding,)


@dataclass(eq=False)
class Writer:
    """One source of a stream.

    Attributes:
        node: the value that enters the stream. For a weight (or constant) it is the weight
            expression itself, read by ``user``.
        kind: ``"embedding"``, ``"linear"``, ``"conv"``, ``"norm"``, ``"weight"``, ``"zeros"``,
            ``"center"``, ``"input"`` or ``"op"`` (anything else).
        source: the producing node, behind ``path``.
        axis: the stream's features in ``node``; source_axis: the same in ``source``.
        path: ops from ``source`` (exclusive) to ``node`` (inclusive), in execution order.
        gates: those of ``path`` that treat features differently (LayerScale, active dropout).
        linear: the matched linear layer of kinds ``"linear"`` and ``"conv"``.
        user: the in-stream op that reads a weight; ``None`` for activations.
    """

    node: fx.Node
    kind: str
    source: fx.Node
    axis: Axis
    source_axis: Axis
    path: tuple[fx.Node, ...] = ()
    gates: tuple[fx.Node, ...] = ()
    linear: Linear | None = None
    user: fx.Node | None = None

    @property
    def label(self) -> str:
        return _label(self.source)


@dataclass(eq=False)
class Reader:
    """One use of a stream's value.

    Attributes:
        node: the reading op (the graph's output node for a tap).
        kind: ``"norm"``, ``"raw"`` or ``"tap"``.
        value: the stream value it reads; axis: the features in it.
        reason: for raw readers, why the op is not transparent to the stream.
    """

    node: fx.Node
    kind: str
    value: fx.Node
    axis: Axis
    reason: str = ""

    @property
    def label(self) -> str:
        return "output" if self.kind == "tap" else _label(self.node)


@dataclass(eq=False)
class Stream:
    """One residual stream of a graph. Lists are in graph order.

    Attributes:
        name: common module path of its norms, unique within the graph.
        values: every value of the stream with its feature axis.
        writers, readers: see :class:`Writer`, :class:`Reader`.
        adds: the residual adds (two or more operands belong to the stream).
    """

    name: str = ""
    values: dict[fx.Node, Axis] = field(default_factory=dict)
    writers: list[Writer] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    adds: list[fx.Node] = field(default_factory=list)
    _graph: nx.DiGraph | None = None

    @property
    def norms(self) -> list[Reader]:
        return [r for r in self.readers if r.kind == "norm"]

    @property
    def raw_readers(self) -> list[Reader]:
        return [r for r in self.readers if r.kind == "raw"]

    @property
    def taps(self) -> list[Reader]:
        return [r for r in self.readers if r.kind == "tap"]

    @property
    def width(self) -> Any:
        """Number of features."""
        node, axis = next(iter(self.values.items()))
        return axis.size(ir.shape(node))

    @property
    def graph(self) -> nx.DiGraph:
        """Writers, joins (adds, concatenations) and readers as a networkx graph.

        Node keys are ``"writer:<fx name>"``, ``"join:<fx name>"``, ``"reader:<fx name>"``;
        attributes ``role``, ``kind``, ``label``, ``item`` (the Writer, fx node or Reader). Edges
        carry ``ops``: the transparent fx nodes that were contracted.
        """
        if self._graph is None:
            self._graph = _skeleton(self)
        return self._graph

    def operands(self, node: fx.Node) -> Links:
        """Operands through which the stream enters the in-stream value ``node``."""
        return _links(node, self.values[node]) or []

    def between(self, item: Writer | Reader) -> list[fx.Node]:
        """Ops between a writer and the join it feeds, or between a reader and its join.

        For a writer the gates come first. In execution order.
        """
        g = self.graph
        if isinstance(item, Writer):
            key = f"writer:{item.node.name}"
            edges = [d["ops"] for _, _, d in g.out_edges(key, data=True)]
            return [*item.path, *(edges[0] if len(edges) == 1 else ())]
        key = _reader_key(item)
        return [n for _, _, d in g.in_edges(key, data=True) for n in d["ops"]]

    def to_text(self, width: int = 100) -> str:
        """A drawing in characters."""
        from .residual_draw import to_text

        return to_text(self, width)

    def to_dot(self) -> str:
        """The skeleton in Graphviz's language."""
        from .residual_draw import to_dot

        return to_dot(self)

    def to_svg(self) -> str:
        """A self-contained SVG drawing."""
        from .residual_draw import to_svg

        return to_svg(self)

    def drawing(self) -> dict[str, str]:
        """What ``Report.streams`` holds."""
        return {"name": self.name, "text": self.to_text(), "svg": self.to_svg()}

    def __repr__(self) -> str:
        return (
            f"Stream({self.name!r}, width={self.width}, writers={len(self.writers)}, "
            f"norms={len(self.norms)}, raw={len(self.raw_readers)}, taps={len(self.taps)}, "
            f"adds={len(self.adds)})"
        )


def _label(node: Any) -> str:
    if node.op in ("placeholder", "get_attr"):
        return str(node.meta.get("fqn", node.name))
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    path = ir.module_path(node)
    return f"{path} ({name})" if path else name


def _reader_key(reader: Reader) -> str:
    return f"reader:{reader.node.name}:{reader.value.name}"


# ---------------------------------------------------------------------------------------------
# Building


def _is_add_norm(node: Any) -> bool:
    return ir.is_call(node, *ADD_NORMS)


def _links(node: Any, axis: Axis) -> Links | None:
    """As :func:`axis.operands`, also through the fused residual add + norm."""
    if node.target is operator.getitem and _is_add_norm(node.args[0]):
        if node.args[1] != 1:
            return None
        args = ir.NormArgs(node.args[0])
        return [(args.x, axis), (args.residual, axis)]
    if match_features(node, axis.dims) is not None:
        return None
    return operands(node, axis)


def _norm_inputs(node: fx.Node) -> list[fx.Node]:
    args = ir.NormArgs(node)
    return [args.x, args.residual] if _is_add_norm(node) else [args.x]


def _part(node: fx.Node, index: int) -> fx.Node | None:
    return next(
        (u for u in node.users if u.target is operator.getitem and u.args[1] == index), None
    )


class _Builder:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.order = {n: i for i, n in enumerate(gm.graph.nodes)}
        self.weights: dict[fx.Node, bool] = {}

    def is_weight(self, node: fx.Node) -> bool:
        return ir.is_weight_expr(node, self.weights)

    def grow(self, seed: fx.Node, axis: Axis) -> Stream:
        """The stream around ``seed``."""
        stream = Stream()
        readers: dict[tuple[fx.Node, fx.Node], Reader] = {}
        weights: dict[tuple[fx.Node, fx.Node], Writer] = {}
        stack = [(seed, axis)]
        stream.values[seed] = axis

        def read(node: fx.Node, value: fx.Node, kind: str, reason: str = "") -> None:
            reader = Reader(node, kind, value, stream.values[value], reason)
            readers.setdefault((node, value), reader)

        def push(node: fx.Node, found: Axis, via: fx.Node, value: fx.Node) -> None:
            known = stream.values.get(node)
            if known is None:
                stream.values[node] = found
                stack.append((node, found))
            elif known != found:
                read(via, value, "raw", "uses the stream along two different axes")

        while stack:
            value, axis = stack.pop()
            links = _links(value, axis)
            if links is None:
                stream.writers.append(self.writer(value, axis))
            else:
                for operand, found in links:
                    if self.is_weight(operand):
                        weights[operand, value] = Writer(
                            operand, "weight", operand, found, found, user=value
                        )
                    else:
                        push(operand, found, value, value)
            for user in users(value):
                self._follow(user, value, axis, push, read)
        stream.writers += weights.values()
        place = self.order.__getitem__
        stream.writers.sort(key=lambda w: (place(w.node), place(w.user or w.node)))
        stream.readers = sorted(readers.values(), key=lambda r: (place(r.node), place(r.value)))
        stream.values = dict(sorted(stream.values.items(), key=lambda kv: place(kv[0])))
        stream.adds = [n for n in stream.values if _is_add(n)]
        return stream

    def _follow(self, user: fx.Node, value: fx.Node, axis: Axis, push: Any, read: Any) -> None:
        if user.op == "output":
            read(user, value, "tap")
            return
        if reads_metadata_only(user):
            return
        if ir.is_call(user, *_NORMS) and value in _norm_inputs(user):
            args = ir.NormArgs(user)
            fits = axis.whole and tuple(args.dims) == axis.dims
            extra = [a for a in user.all_input_nodes if a not in _norm_inputs(user)]
            if _is_add_norm(user) and fits:
                total = _part(user, 1)
                others = [a for a in _norm_inputs(user) if a is not value]
                if total is not None:
                    push(total, axis, user, value)
                else:
                    for other in others:
                        if not self.is_weight(other):
                            push(other, axis, user, value)
            if fits and value not in extra:
                read(user, value, "norm")
            else:
                read(
                    user, value, "raw", f"normalizes over dims {list(args.dims)}, not the features"
                )
            return
        found = result_axis(user, value, axis)
        if found is not None and match_features(user, axis.dims) is None:
            push(user, found, user, value)
            return
        if not is_inert(user):
            read(user, value, "raw", self._why_raw(user, axis))

    def _why_raw(self, user: fx.Node, axis: Axis) -> str:
        if match_linear(user) is not None:
            return "is a linear map of the un-normalized stream"
        if is_dropout(user):
            return "drops single features at random"
        if ir.is_tensor(user) and channel_scale(user, axis, self.weights):
            return "scales the stream channel by channel"
        return "reads the un-normalized stream"

    def writer(self, value: fx.Node, axis: Axis) -> Writer:
        """Classify the writer whose result ``value`` enters the stream."""
        path: list[fx.Node] = []
        gates: list[fx.Node] = []
        cur, at = value, axis
        while True:
            kind = self._kind(cur, at)
            if kind is not None:
                break
            back = self._behind(cur, at)
            if back is None:
                break
            (cur_in, at_in), gate = back
            if self.is_weight(cur_in):
                break
            path.append(cur)
            if gate:
                gates.append(cur)
            cur, at = cur_in, at_in
        if kind is None:
            kind, cur, at, path, gates = "op", value, axis, [], []
        linear = match_linear(cur) if kind in ("linear", "conv") else None
        return Writer(
            value, kind, cur, axis, at, tuple(reversed(path)), tuple(reversed(gates)), linear
        )

    def _behind(self, node: Any, axis: Axis) -> tuple[tuple[fx.Node, Axis], bool] | None:
        """The one operand behind a gate or a transparent op; ``None`` ends the search."""
        if is_dropout(node) and dropout_is_active(node):
            return (node.args[0], axis), True
        if node.target is operator.getitem and ir.is_call(node.args[0], aten.native_dropout):
            return (node.args[0].args[0], axis), True
        if ir.is_tensor(node):
            scaled = channel_scale(node, axis, self.weights)
            if scaled is not None:
                return (scaled[0], axis), True
        links = operands(node, axis) if ir.is_tensor(node) else None
        if links is not None and len(links) == 1:
            return links[0], False
        return None

    def _kind(self, node: Any, axis: Axis) -> str | None:
        if node.op == "placeholder":
            return "input"
        linear = match_features(node, axis.dims)
        if linear is not None:
            return "conv" if "conv" in linear.layout else "linear"
        if ir.is_call(node, *_EMBEDDINGS):
            return "embedding"
        if ir.is_call(node, *_NORMS):
            return "norm"
        if node.target is operator.getitem and _is_add_norm(node.args[0]) and node.args[1] == 0:
            return "norm"
        if ir.is_call(node, nf.center):
            return "center"
        if is_zeros(node):
            return "zeros"
        return None


def _is_add(node: Any) -> bool:
    if node.target is operator.getitem and _is_add_norm(node.args[0]):
        return True
    return ir.is_call(node, *ADDS)


def streams(gm: fx.GraphModule) -> list[Stream]:
    """All residual streams of a canonicalized graph: one per connected family of norm inputs."""
    norms = ((Axis(tuple(ir.NormArgs(n).dims)), n) for n in ir.norm_nodes(gm))
    return streams_of(gm, ((x, axis) for axis, norm in norms for x in _norm_inputs(norm)))


def streams_of(gm: fx.GraphModule, values: Iterable[tuple[fx.Node, Axis]]) -> list[Stream]:
    """The residual streams that these values belong to, each once."""
    builder = _Builder(gm)
    found: list[Stream] = []
    owner: set[tuple[fx.Node, Axis]] = set()
    for x, axis in values:
        if (x, axis) in owner or builder.is_weight(x) or not axis.fits(ir.shape(x)):
            continue
        stream = builder.grow(x, axis)
        owner.update(stream.values.items())
        found.append(stream)
    _name(found)
    return found


def _name(found: list[Stream]) -> None:
    taken: dict[str, int] = {}
    for stream in found:
        paths = [ir.module_path(r.node).split(".") for r in stream.norms]
        common: list[str] = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        name = ".".join(common) or "stream"
        taken[name] = taken.get(name, 0) + 1
        stream.name = name if taken[name] == 1 else f"{name}#{taken[name] - 1}"


def _skeleton(stream: Stream) -> nx.DiGraph:
    g = nx.DiGraph(name=stream.name)
    weights: dict[fx.Node, list[Writer]] = {}
    writers: dict[fx.Node, Writer] = {}
    for w in stream.writers:
        key = f"writer:{w.node.name}"
        g.add_node(key, role="writer", kind=w.kind, label=w.label, item=w)
        if w.user is None:
            writers[w.node] = w
        else:
            weights.setdefault(w.user, []).append(w)
    # per value: the key of the join or writer it comes from, and the ops since
    origin: dict[fx.Node, tuple[str, tuple[fx.Node, ...]]] = {}

    def connect(source: tuple[str, tuple[fx.Node, ...]], target: str) -> None:
        key, between = source
        if g.has_edge(key, target):
            g.edges[key, target]["parallel"] += 1
        else:
            g.add_edge(key, target, ops=between, parallel=1)

    for value in stream.values:
        if value in writers:
            origin[value] = (f"writer:{value.name}", ())
            continue
        sources = [origin[o] for o, _ in stream.operands(value) if o in origin]
        sources += [(f"writer:{w.node.name}", ()) for w in weights.get(value, ())]
        if len(sources) == 1:
            key, between = sources[0]
            origin[value] = (key, (*between, value))
            continue
        join = f"join:{value.name}"
        kind = "add" if _is_add(value) else _label(value).split(" (")[-1].rstrip(")")
        g.add_node(join, role="join", kind=kind, label=_label(value), item=value)
        for source in sources:
            connect(source, join)
        origin[value] = (join, ())
    for r in stream.readers:
        key = _reader_key(r)
        g.add_node(key, role="reader", kind=r.kind, label=r.label, item=r)
        connect(origin[r.value], key)
    return g


def iter_norms(stream: Stream, *targets: Any) -> Iterator[Reader]:
    """The stream's norm readers that call one of ``targets``."""
    return (r for r in stream.norms if ir.is_call(r.node, *targets))
