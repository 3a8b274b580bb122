"""Turn in-place ops of a captured graph into their functional forms, or fence them off.

A pre-dispatch trace still holds what the user wrote in place (``x += y``, ``relu(inplace=True)``,
``cache.copy_``). An in-place op on a tensor that nothing else aliases is replaced by its functional
twin. One that writes into an input, a buffer or through a view is kept as it is, and every node that
shares its storage is marked ``meta["mutated"]``: such nodes are not pure and no pass matches them.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from . import ir
from .opaque import may_write, opaque_nodes

aten = torch.ops.aten

#: Composite ops that may return a view of their input although the schema does not say so.
_MAYBE_VIEW = frozenset(
    {
        aten.reshape.default,
        aten.contiguous.default,
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.to.other,
        aten.flatten.using_ints,
        aten.dropout.default,
        aten.type_as.default,
        aten.chunk.default,
        aten.tensor_split.sections,
        aten.unflatten.int,
    }
)


def _aliases_inputs(node: fx.Node) -> list[fx.Node]:
    """Arguments whose storage the node's result may share."""
    if node.op != "call_function":
        return []
    if node.target is operator.getitem:
        return list(node.all_input_nodes)
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.all_input_nodes)  # higher-order or python function: assume the worst
    if node.target in _MAYBE_VIEW:
        return list(node.all_input_nodes)[:1]
    schema = node.target._schema
    shared = []
    for i, arg in enumerate(schema.arguments):
        if arg.alias_info is None:
            continue
        value = node.args[i] if i < len(node.args) else node.kwargs.get(arg.name)
        if isinstance(value, fx.Node):
            shared.append(value)
        elif isinstance(value, (list, tuple)):
            shared.extend(v for v in value if isinstance(v, fx.Node))
    return shared


def _mutated_args(node: fx.Node) -> list[fx.Node]:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    if hidden := ir.running_stats_written(node):
        return hidden
    schema = node.target._schema
    if not schema.is_mutable:
        return []
    out = []
    for i, arg in enumerate(schema.arguments):
        if arg.alias_info is not None and arg.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(arg.name)
            if isinstance(value, fx.Node):
                out.append(value)
            elif isinstance(value, (list, tuple)):
                out.extend(v for v in value if isinstance(v, fx.Node))
    return out


def _functional_twin(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    namespace, name = target._schema.name.split("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    if packet is None:
        return None
    overload = target._overloadname
    if overload not in packet.overloads():
        return None
    twin = getattr(packet, overload)
    wanted = [a.name for a in target._schema.arguments]
    return twin if [a.name for a in twin._schema.arguments] == wanted else None


def functionalize(gm: fx.GraphModule) -> None:
    """Replace in-place ops by functional ones where that is provably the same; mark the rest."""
    graph = gm.graph
    order = {n: i for i, n in enumerate(graph.nodes)}
    # opaque ops whose bodies write somewhere: whatever they read may be written
    opaque = {n for n in opaque_nodes(gm) if may_write(gm, n)}
    if not opaque and not any(_mutated_args(n) for n in order):
        return
    root: dict[fx.Node, fx.Node] = {}  # node -> node that owns its storage
    members: dict[fx.Node, list[fx.Node]] = {}

    def owner(n: fx.Node) -> fx.Node:
        while root.get(n, n) is not n:
            n = root[n]
        return n

    for node in order:
        shared = _aliases_inputs(node)
        base = owner(shared[0]) if shared else node
        root[node] = base
        members.setdefault(base, []).append(node)
        for other in shared[1:]:  # merge sets when several arguments may be shared
            o = owner(other)
            if o is not base:
                members[base].extend(members.pop(o, []))
                root[o] = base

    for node in list(order):
        if node in opaque:
            _mark(node, members.get(owner(node), [node]))
            for operand in node.all_input_nodes:
                _mark(node, members.get(owner(operand), [operand]))
            continue
        targets = _mutated_args(node)
        if not targets:
            continue
        target = targets[0]
        base = owner(target)
        twin = _functional_twin(node.target)
        if (
            len(targets) == 1
            and twin is not None
            and _owns_storage(base, target, node, members, order)
        ):
            with graph.inserting_before(node):
                new = graph.call_function(twin, node.args, node.kwargs)
            new.meta = dict(node.meta)
            new.meta.pop("val", None)
            order[new] = order[node]
            for user in list(target.users):
                if user is not new and user is not node and order[user] > order[node]:
                    user.replace_input_with(target, new)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            ir.set_val(new)
            # what is left of the alias set is the fresh result alone
            root[new] = new
            members[new] = [new]
            for user in list(new.users):
                if _aliases_inputs(user) and new in _aliases_inputs(user):
                    _move_views(user, new, root, members)
            continue
        _mark(node, members.get(base, [base]))


def _mark(node: fx.Node, shared: list[fx.Node]) -> None:
    """``node`` writes into the storage of ``shared``."""
    for n in (node, *shared):
        n.meta["mutated"] = True
        if n.op in ("placeholder", "get_attr"):
            n.meta["kind"] = "input"  # its value changes: not a weight any more


def _move_views(
    node: fx.Node,
    base: fx.Node,
    root: dict[fx.Node, fx.Node],
    members: dict[fx.Node, list[fx.Node]],
) -> None:
    """Views taken of the fresh result belong to it from now on."""
    stack = [node]
    while stack:
        n = stack.pop()
        if root.get(n) is base:
            continue
        root[n] = base
        members[base].append(n)
        stack.extend(u for u in n.users if n in _aliases_inputs(u))


def _owns_storage(
    base: fx.Node,
    target: fx.Node,
    node: fx.Node,
    members: dict[fx.Node, list[fx.Node]],
    order: dict[fx.Node, int],
) -> bool:
    """True if writing into ``target`` at ``node`` can only be seen through ``target`` and ``node``.

    The storage must have been made inside the graph, and no other alias of it may be read later.
    """
    if base.op != "call_function":
        return False
    for other in members.get(base, ()):
        if other is target or other is node:
            continue
        # views taken from `node`'s own result carry the new value with them
        if order.get(other, -1) > order[node]:
            continue
        if any(order.get(u, -1) > order[node] for u in other.users):
            return False
    # the written tensor must cover its storage: a view target would need a scatter
    if target is base:
        return True
    return _same_elements(base, target)


def _same_elements(base: fx.Node, target: fx.Node) -> bool:
    """A chain of identity casts or in-place results from ``base`` to ``target``, no real views."""
    n = target
    while n is not base:
        shared = _aliases_inputs(n)
        if len(shared) != 1:
            return False
        if not (
            ir.is_tensor(n)
            and ir.is_tensor(shared[0])
            and ir.same_shape(ir.shape(n), ir.shape(shared[0]))
            and ir.dtype(n) == ir.dtype(shared[0])
            and ir.is_call(n, *_MAYBE_VIEW, aten.alias.default, aten.detach.default)
        ):
            return False
        n = shared[0]
    return True
