"""Where calibration looks: the probes of a captured graph and the interpreter that feeds them.

A probe is found in the graph, not by module class: the inputs of norms on a residual stream, the
inputs of linear layers, the inputs of all norms, and attention (fused or written out). Its key is
made of module paths, so that graphs captured for different input sizes share their probes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..passes import ir
from ..passes.extend.attention import product_of_softmax
from ..passes.linear import linear_names, match_linear
from ..passes.residual import streams
from .statistics import Attention

aten = torch.ops.aten

KINDS = ("stream", "linear", "norm", "attention")

_SOFTMAX = (aten.softmax, aten._softmax, aten._safe_softmax)


@dataclass
class Probe:
    """One place of the graph that is watched.

    Attributes:
        key: ``"<kind>:<name>"``, stable across captures of the same model.
        kind: one of :data:`KINDS`.
        node: the watched value (attention: the softmax or the fused op).
        order: position in the graph.
        module: module path; where: ``file:line``.
        readers: names of the norms or linears that read the value.
        stream: name of the residual stream, for stream points.
        dims: feature dims of the value (negative).
        gain: the gain of the norm that reads the value, a graph node.
    """

    key: str
    kind: str
    node: fx.Node
    order: int
    module: str = ""
    where: str = ""
    readers: list[str] = field(default_factory=list)
    stream: str = ""
    dims: tuple[int, ...] = (-1,)
    gain: fx.Node | None = None


class _Names:
    """``name``, ``name#1``, ``name#2``… for modules that are called several times."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def __call__(self, name: str) -> str:
        n = self._seen.get(name, 0)
        self._seen[name] = n + 1
        return f"{name}#{n}" if n else name


def find_probes(gm: fx.GraphModule) -> list[Probe]:
    """All probes of a canonicalized graph, in graph order."""
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    found = [*_stream_points(gm, order), *_norms(gm, order), *_linears(gm, order)]
    found += _attention(gm, order)
    return sorted(found, key=lambda p: (p.order, KINDS.index(p.kind)))


def _stream_points(gm: fx.GraphModule, order: dict[fx.Node, int]) -> list[Probe]:
    probes: list[Probe] = []
    for stream in streams(gm):
        if not stream.adds:
            continue  # a norm's own little input (queries, keys): not a residual stream
        points: dict[fx.Node, Probe] = {}
        for reader in stream.norms:
            site = reader.node.meta.get("site", reader.node.name)
            probe = points.get(reader.value)
            if probe is not None:
                probe.readers.append(site)
                continue
            args = ir.NormArgs(reader.node)
            dims = tuple(args.dims)
            points[reader.value] = probe = Probe(
                key=f"stream:{site}",
                kind="stream",
                node=reader.value,
                order=order[reader.value],
                module=ir.module_path(reader.node),
                where=ir.where(reader.node),
                readers=[site],
                stream=stream.name,
                dims=dims,
                gain=args.gain,
            )
        probes += points.values()
    return probes


def _norms(gm: fx.GraphModule, order: dict[fx.Node, int]) -> list[Probe]:
    probes = []
    for node in ir.norm_nodes(gm):
        args = ir.NormArgs(node)
        dims = tuple(args.dims)
        if "residual" in args._values:
            continue  # the input of a fused residual norm is its own second result
        site = node.meta.get("site", node.name)
        probes.append(
            Probe(
                key=f"norm:{site}",
                kind="norm",
                node=args.x,
                order=order[node],
                module=ir.module_path(node),
                where=ir.where(node),
                readers=[site],
                dims=dims,
                gain=args.gain,
            )
        )
    return probes


def _linears(gm: fx.GraphModule, order: dict[fx.Node, int]) -> list[Probe]:
    by_input: dict[tuple[fx.Node, int], Probe] = {}
    for node, name in linear_names(gm).items():
        linear = match_linear(node)
        assert linear is not None
        at = (linear.input, linear.feature_in)
        probe = by_input.get(at)
        if probe is not None:
            probe.readers.append(name)
            continue
        by_input[at] = Probe(
            key=f"linear:{name}",
            kind="linear",
            node=linear.input,
            order=order[node],
            module=ir.module_path(node),
            where=ir.where(node),
            readers=[name],
            dims=(linear.feature_in,),
        )
    return list(by_input.values())


def _attention(gm: fx.GraphModule, order: dict[fx.Node, int]) -> list[Probe]:
    names = _Names()
    probes = []
    for node in gm.graph.nodes:
        fused = ir.is_call(node, aten.scaled_dot_product_attention)
        written = ir.is_call(node, *_SOFTMAX) and values_of_softmax(node) is not None
        if not (fused or written):
            continue
        path = ir.module_path(node)
        probes.append(
            Probe(
                key=f"attention:{names(path or node.name)}",
                kind="attention",
                node=node,
                order=order[node],
                module=path,
                where=ir.where(node),
            )
        )
    return probes


def values_of_softmax(node: fx.Node) -> fx.Node | None:
    """The value operand of a written-out attention whose weights ``node`` computes."""
    product = product_of_softmax(node)
    return None if product is None else product.args[1]


# ---------------------------------------------------------------------------------------------
# Running


Sink = Callable[[Probe, Any], None]


class ProbeInterpreter(fx.Interpreter):
    """Runs a graph and hands watched values over as they appear; nothing is kept.

    Args:
        on_value: called with a probe and its value (stream points, norms, linears).
        on_gain: called with a probe and the gain of the norm that reads it.
        on_attention: called with a probe and the node's arguments and result.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        probes: Sequence[Probe],
        on_value: Sink,
        on_gain: Sink,
        on_attention: Callable[[Probe, fx.Node, tuple, dict, Any, dict], None],
    ) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self._values: dict[fx.Node, list[Probe]] = {}
        self._gains: dict[fx.Node, list[Probe]] = {}
        self._attention: dict[fx.Node, Probe] = {}
        self._softmax_values: dict[fx.Node, list[Probe]] = {}
        for probe in probes:
            if probe.kind == "attention":
                self._attention[probe.node] = probe
                if ir.is_call(probe.node, *_SOFTMAX):
                    value = values_of_softmax(probe.node)
                    assert value is not None
                    self._softmax_values.setdefault(value, []).append(probe)
                continue
            self._values.setdefault(probe.node, []).append(probe)
            if isinstance(probe.gain, fx.Node):
                self._gains.setdefault(probe.gain, []).append(probe)
        self._on_value, self._on_gain, self._on_attention = on_value, on_gain, on_attention

    def run_node(self, n: fx.Node) -> Any:
        probe = self._attention.get(n)
        if probe is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            result = super().run_node(n)
            self._on_attention(probe, n, args, kwargs, result, {})
        else:
            result = super().run_node(n)
        for probe in self._values.get(n, ()):
            self._on_value(probe, result)
        for probe in self._gains.get(n, ()):
            self._on_gain(probe, result)
        for probe in self._softmax_values.get(n, ()):
            self._on_attention(probe, n, (), {}, None, {"value": result})
        return result


def rows_of(value: Tensor, dims: Sequence[int]) -> Tensor:
    """``(rows, features)`` view or copy of a value whose features lie in ``dims``."""
    n = len(dims)
    moved = value.movedim(tuple(dims), tuple(range(-n, 0)))
    width = 1
    for size in moved.shape[moved.dim() - n :]:
        width *= size
    return moved.reshape(-1, width) if width else moved.new_zeros(0, 0)


def watch_sdpa(stats: Attention, node: fx.Node, args: tuple, kwargs: dict) -> None:
    """Recompute the logits of a fused attention block by block and add them up."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    q, k, v = given["query"], given["key"], given["value"]
    q, k, v = (four_dims(t) for t in (q, k, v))
    heads = q.shape[1]
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))  # grouped queries
    scale = given.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = given.get("attn_mask")
    if mask is not None:
        mask = four_dims(mask)
    n, m = q.shape[-2], k.shape[-2]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    columns = torch.arange(m, device=q.device)
    seen = torch.zeros((q.shape[0], m), dtype=torch.bool, device=q.device)
    blocks = []
    for start in range(0, n, stats.BLOCK):
        rows = torch.arange(start, min(start + stats.BLOCK, n), device=q.device)
        visible = torch.ones((1, 1, len(rows), m), dtype=torch.bool, device=q.device)
        if given.get("is_causal"):
            visible = columns[None, :] <= rows[:, None]
            visible = visible[None, None]
        bias = None
        if mask is not None:
            part = mask if mask.shape[-2] == 1 else mask[..., rows, :]
            if part.dtype == torch.bool:
                visible = visible & part
            else:
                # additive masks hide a key with −inf or the dtype's lowest number
                visible = visible & (part > torch.finfo(part.dtype).min / 2)
                bias = part.to(work)
        visible = visible.expand(q.shape[0], -1, -1, -1)
        seen |= visible.any(1).any(1)
        blocks.append((rows, visible, bias))
    first = seen.to(torch.int8).argmax(-1)
    for rows, visible, bias in blocks:
        logits = q[:, :, rows].to(work) @ k.to(work).transpose(-1, -2) * scale
        if bias is not None:
            logits = logits + bias
        stats.update_logits(logits, visible, first)
    stats.update_values(v, first)


def four_dims(t: Tensor) -> Tensor:
    """``(batch, heads, tokens, width)``; three dims have no heads."""
    if t.dim() == 2:
        return t[None, None]
    return t.unsqueeze(1) if t.dim() == 3 else t.reshape(-1, *t.shape[-3:])


def watch_softmax(stats: Attention, logits: Tensor) -> None:
    """Add the logits of a written-out softmax.

    Its mask has been added already: a key more than a thousand below its row's largest logit, or at
    minus infinity, is masked.
    """
    logits = four_dims(logits)
    visible = (logits - logits.amax(-1, keepdim=True) > -1e3) | ~logits.isfinite()
    visible &= logits != -torch.inf
    first = visible.any(1).any(1).to(torch.int8).argmax(-1)
    for start in range(0, logits.shape[-2], stats.BLOCK):
        block = slice(start, start + stats.BLOCK)
        stats.update_logits(logits[:, :, block], visible[:, :, block], first)
