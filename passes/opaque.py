"""Higher-order ops that stay as they are: what they may write, and what the report says of them."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from . import ir
from .func_transforms import transform_of
from .report import Site

#: Names under which norms are called, in functional and in ATen spelling.
_NORM_NAMES = frozenset(
    {"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "native_layer_norm"}
)


def opaque_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    return [
        n
        for n in gm.graph.nodes
        if n.op == "call_function" and isinstance(n.target, torch._ops.HigherOrderOperator)
    ]


def bodies(gm: nn.Module, node: fx.Node) -> list[fx.GraphModule]:
    """The graphs a higher-order op holds, those inside them included."""
    found: list[fx.GraphModule] = []
    for a in node.all_input_nodes:
        value = ir.attribute(gm, str(a.target)) if a.op == "get_attr" else None
        if isinstance(value, fx.GraphModule):
            found += [m for m in value.modules() if isinstance(m, fx.GraphModule)]
    return found


def may_write(gm: nn.Module, node: fx.Node) -> bool:
    """True unless every op of the bodies is known to write nothing that it was given."""
    graphs = bodies(gm, node)
    if not graphs:
        return True  # a user's kernel
    return any(_writes(n) for g in graphs for n in g.graph.nodes)


def _writes(n: fx.Node) -> bool:
    if "out" in n.kwargs or n.kwargs.get("inplace"):
        return True
    if n.op == "call_method":
        name = str(n.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if n.op != "call_function":
        return False
    if isinstance(n.target, torch._ops.HigherOrderOperator):
        return not any(a.op == "get_attr" for a in n.all_input_nodes)  # looked into on their own
    if isinstance(n.target, torch._ops.OpOverload):
        return n.target._schema.is_mutable or bool(ir.running_stats_written(n))
    name = getattr(n.target, "__name__", "")
    if name in ("batch_norm", "instance_norm"):
        return True  # running statistics
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or n.target is operator.setitem or n.target in _IN_PLACE_OPERATORS


_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul",
                 "iand", "ior", "ixor", "ilshift", "irshift")
)  # fmt: skip


def opaque_sites(gm: fx.GraphModule) -> tuple[list[Site], list[str]]:
    """What the report says of opaque ops: a site for each norm inside, a note for each op."""
    sites: list[Site] = []
    notes: list[str] = []
    for node in opaque_nodes(gm):
        held = bodies(gm, node)
        transform = transform_of(node, held[0] if held else None)
        name = str(node.target) if transform is None else f"torch.func ({transform})"
        what = f"higher-order op {name}" if transform is None else f"transform {name}"
        place = f" at {ir.where(node)}" if ir.where(node) else ""
        inside = [n for g in held for n in g.graph.nodes if _is_norm_call(n)]
        counted = f"; {len(inside)} norms inside were not looked at" if inside else ""
        notes.append(f"the {what}{place} was left as it is{counted}")
        for i, n in enumerate(inside):
            sites.append(
                Site(
                    key=f"{node.name}.{n.name}#{i}",
                    kind="opaque",
                    module=ir.module_path(node),
                    spelling=_call_name(n),
                    where=ir.where(node),
                    refused=[("canonicalize", f"it is inside the body of {name}{place}")],
                )
            )
    return sites, notes


def _call_name(n: fx.Node) -> str:
    packet = getattr(n.target, "overloadpacket", n.target)
    return getattr(packet, "__name__", str(packet))


def _is_norm_call(n: fx.Node) -> bool:
    return n.op == "call_function" and _call_name(n) in _NORM_NAMES
