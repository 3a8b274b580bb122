"""Inline the regions that ``torch.export`` wraps into higher-order ops, so that passes see through.

``with torch.autocast`` becomes enter/exit nodes again (``autocast.py`` turns them into casts);
``with torch.no_grad`` becomes its body with detached results, which is the same function with the
same gradients. A region that only organises compilation (``nested_compile_region``) becomes its body.
Anything else (control flow…) stays one opaque node; for checkpoints see ``subgraphs.py``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from . import ir
from .autocast import _ENTER, _EXIT

aten = torch.ops.aten
hops = torch.ops.higher_order


def inline_regions(gm: fx.GraphModule) -> bool:
    """Inline autocast and no-grad regions in place, innermost last; True if anything changed."""
    changed = False
    while True:
        node = next((n for n in gm.graph.nodes if _inlinable(gm, n)), None)
        if node is None:
            break
        _inline(gm, node)
        changed = True
    if changed:
        for leaf in [n for n in gm.graph.nodes if n.op == "get_attr" and not n.users]:
            gm.graph.erase_node(leaf)
    return changed


def _body(gm: fx.GraphModule, node: fx.Node) -> tuple[Any, list[Any]] | None:
    if node.op != "call_function":
        return None
    if node.target is hops.wrap_with_autocast:
        submodule, operands = node.args[4], list(node.args[5:])
    elif node.target is hops.wrap_with_set_grad_enabled:
        submodule, operands = node.args[1], list(node.args[2:])
    elif node.target is hops.invoke_subgraph:
        submodule, operands = node.args[0], list(node.args[2:])
    else:
        return None
    if not (isinstance(submodule, fx.Node) and submodule.op == "get_attr"):
        return None
    return getattr(gm, submodule.target, None), operands


def _inlinable(gm: fx.GraphModule, node: fx.Node) -> bool:
    found = _body(gm, node)
    if found is None or not isinstance(found[0], fx.GraphModule):
        return False
    if node.target is hops.wrap_with_set_grad_enabled:
        if node.args[0]:  # grad switched on inside no_grad: detaching would be wrong
            return False
        return not any(
            isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable
            for n in found[0].graph.nodes
        )
    return True


def _inline(gm: fx.GraphModule, node: fx.Node) -> None:
    body, operands = _body(gm, node)  # type: ignore[misc]
    graph = gm.graph
    region = None
    autocast = node.target is hops.wrap_with_autocast
    with graph.inserting_before(node):
        if autocast:
            region = graph.call_function(_ENTER, tuple(node.args[:4]))
        env: dict[fx.Node, Any] = {}
        inputs = iter(operands)
        result: Any = ()
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                env[inner] = next(inputs)
            elif inner.op == "output":
                result = fx.node.map_arg(inner.args[0], lambda n: env[n])
            else:
                if inner.op == "get_attr":
                    value = getattr(body, inner.target)
                    name = _fresh_name(gm, inner.target)
                    if isinstance(value, torch.Tensor):
                        gm.register_buffer(name, value, persistent=False)
                    else:
                        setattr(gm, name, value)
                    copied = graph.get_attr(name)
                    copied.meta = dict(inner.meta)
                    if isinstance(value, torch.Tensor):
                        copied.meta.update(kind="constant", fqn=name)
                else:
                    if inner.target is aten._assert_tensor_metadata.default:
                        continue
                    copied = graph.node_copy(inner, lambda n: env[n])
                env[inner] = copied
        if autocast:
            graph.call_function(_EXIT, (region,))
        outputs = list(result) if isinstance(result, (list, tuple)) else [result]
        if node.target is hops.wrap_with_set_grad_enabled:
            outputs = [
                ir.emit(graph, aten.detach.default, o, like=o) if ir.is_tensor(o) else o
                for o in outputs
            ]
    for user in list(node.users):
        if user.op == "call_function" and user.target is operator.getitem:
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(outputs[0])
    graph.erase_node(node)


def _fresh_name(gm: fx.GraphModule, base: str) -> str:
    base = base.replace(".", "_")
    name, i = base, 0
    while hasattr(gm, name):
        i += 1
        name = f"{base}_{i}"
    return name
