"""Transforms of ``torch.func`` (``vmap``, ``grad``, ``jvp``…) inside a Dynamo graph.

Dynamo writes them as instructions: raise the level, wrap, compute, unwrap, lower the level. A retrace
would run through the batching (or the differentiation) and lose it. So each such section becomes the
body of one opaque call for as long as passes look at the graph, and is laid out again, node by node,
before the graph is compiled.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch._higher_order_ops.wrap import wrap

from . import ir
from .errors import Unsupported

_RAISE, _LOWER = "_increment_nesting", "_decrement_nesting"


def _level(node: fx.Node) -> int:
    """+1 where a transform begins, -1 where it ends."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return name.endswith(_RAISE) - name.endswith(_LOWER)


def transform_of(node: fx.Node, body: fx.GraphModule | None) -> str | None:
    """The transforms (``"vmap"``, ``"grad, vmap"``) an enclosed call stands for, else ``None``."""
    if node.target is not wrap or body is None:
        return None
    names = [n.target.__name__ for n in body.graph.nodes if _level(n) > 0]
    kinds = dict.fromkeys(n.removesuffix(_RAISE).strip("_") for n in names)
    return ", ".join(kinds) or None


def enclose(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``gm`` where each section is one call of ``wrap``; ``gm`` itself if there is none.

    Raises:
        Unsupported: a section does not end.
    """
    sections: list[list[fx.Node]] = []
    depth = 0
    for node in gm.graph.nodes:
        change = _level(node)
        if change > 0 and depth == 0:
            sections.append([])
        if depth or change > 0:
            sections[-1].append(node)
        depth += change
    if not sections:
        return gm
    if depth:
        raise Unsupported("the graph holds a transform of torch.func that does not end in it")
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    attributes: dict[str, Any] = {}
    first = {section[0]: section for section in sections}
    inside = {n for section in sections for n in section}
    for node in gm.graph.nodes:
        if node in first:
            _enclose_one(gm, graph, first[node], env, attributes, len(attributes))
        elif node not in inside:
            env[node] = graph.node_copy(node, env.__getitem__)
            if hasattr(node, "_dynamo_source"):
                env[node]._dynamo_source = node._dynamo_source
            if node.op in ("get_attr", "call_module"):
                attributes[node.target] = ir.attribute(gm, node.target)
    new = fx.GraphModule(attributes, graph)
    new.meta = dict(gm.meta)
    return new


def _enclose_one(
    gm: fx.GraphModule,
    graph: fx.Graph,
    section: list[fx.Node],
    env: dict[fx.Node, fx.Node],
    attributes: dict[str, Any],
    number: int,
) -> None:
    inside = set(section)
    body = fx.Graph()
    inner: dict[fx.Node, fx.Node] = {}
    operands: list[fx.Node] = []
    held: dict[str, Any] = {}
    outside = dict.fromkeys(a for n in section for a in n.all_input_nodes if a not in inside)
    for a in outside:
        if a.op != "get_attr":
            inner[a] = body.placeholder(a.name)
            operands.append(env[a])
    for a in outside:
        if a.op == "get_attr":
            inner[a] = body.node_copy(a)
            held[a.target] = ir.attribute(gm, a.target)
    for n in section:
        inner[n] = body.node_copy(n, inner.__getitem__)
        if n.op in ("get_attr", "call_module"):
            held[n.target] = ir.attribute(gm, n.target)
    results = [n for n in section if any(u not in inside for u in n.users)]
    body.output(tuple(inner[n] for n in results))
    name = f"transform_{number}"
    while ir.has_attribute(gm, name):
        name += "_"
    attributes[name] = fx.GraphModule(held, body)
    call = graph.call_function(wrap, (graph.get_attr(name), *operands))
    shown = next((n for n in section if n.meta.get("stack_trace")), section[0])
    keys = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")
    call.meta = {k: shown.meta[k] for k in keys if k in shown.meta}
    call.meta["example_value"] = tuple(n.meta.get("example_value") for n in results)
    for i, n in enumerate(results):
        env[n] = graph.call_function(operator.getitem, (call, i))
        env[n].meta = dict(n.meta)


def release(gm: fx.GraphModule) -> None:
    """Lay enclosed sections out again, in place."""
    graph = gm.graph
    for call in list(graph.nodes):
        if call.op != "call_function" or call.target is not wrap:
            continue
        at: Any = call.args[0]
        body = ir.attribute(gm, at.target)
        if transform_of(call, body) is None:
            continue
        env: dict[fx.Node, fx.Node] = {}
        operands = iter(call.args[1:])
        results: tuple = ()
        with graph.inserting_before(call):
            for n in body.graph.nodes:
                if n.op == "placeholder":
                    env[n] = next(operands)  # type: ignore[assignment]
                elif n.op == "output":
                    results = tuple(env[m] for m in n.args[0])
                else:
                    env[n] = graph.node_copy(n, env.__getitem__)
                    if n.op in ("get_attr", "call_module"):
                        env[n].target = _adopt(gm, at.target, body, n.target)
                    if "region" in call.meta:
                        env[n].meta["region"] = call.meta["region"]
        for part in list(call.users):
            new = results[part.args[1]]
            new.meta.update({k: v for k, v in part.meta.items() if k in ("val", "tensor_meta")})
            part.replace_all_uses_with(new)
            graph.erase_node(part)
        graph.erase_node(call)
        if not at.users:
            graph.erase_node(at)
            gm.delete_submodule(at.target)


def _adopt(gm: fx.GraphModule, name: str, body: nn.Module, target: str) -> str:
    """Give ``gm`` what ``body`` holds as ``target``; returns its new name."""
    value = ir.attribute(body, target)
    new = f"{name}_{target}".replace(".", "_")
    while ir.has_attribute(gm, new):
        new += "_"
    if isinstance(value, torch.Tensor):
        gm.register_buffer(new, value, persistent=False)
        sources = getattr(gm, "_param_name_to_source", None)
        if sources is not None and f"{name}.{target}" in sources:
            sources[new] = sources[f"{name}.{target}"]
    else:
        gm.add_module(new, value)
    return new
