"""Lowering: vocabulary ops to what executes.

On CPU each vocabulary op is expanded to its defining formula in ATen before Inductor sees the graph.
Nothing opaque reaches the compiler, and since the formula's ops are in the graph they are part of
every compile-cache key: a changed formula can never serve a stale artifact.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx.traceback
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..passes import ir, ops

_KEPT = ("val", "tensor_meta", "recompute")


def expand(gm: fx.GraphModule) -> int:
    """Replace every vocabulary op of ``gm`` by its formula, in place; returns how many there were."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or getattr(node.target, "namespace", "") != "normfuse":
            continue
        _expand_node(gm, node)
        count += 1
    return count


def _expand_node(gm: fx.GraphModule, node: fx.Node) -> None:
    formula = ops.formula(node.target)
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]
    nodes = [leaves[i] for i in positions]

    def run(*values: Any) -> Any:
        filled = list(leaves)
        for i, v in zip(positions, values, strict=True):
            filled[i] = v
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return formula(*args, **kwargs)

    values = [ir.val(n) for n in nodes]
    mode = next(v.fake_mode for v in values if isinstance(v, torch._subclasses.FakeTensor))
    # formulas say what is not kept for the backward
    with mode, fx.traceback.preserve_node_meta():
        traced = make_fx(run, pre_dispatch=True)(*values)
    graph = gm.graph
    env: dict[fx.Node, Any] = {}
    inputs = iter(nodes)
    result: Any = None
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                env[inner] = next(inputs)
            elif inner.op == "output":
                result = fx.node.map_arg(inner.args[0], lambda n: env[n])
            else:
                copied = graph.node_copy(inner, lambda n: env[n])
                if inner.op == "get_attr":
                    name = f"_normfuse_{node.name}_{inner.target}"
                    gm.register_buffer(name, getattr(traced, inner.target), persistent=False)
                    copied.target = name
                copied.meta = {k: v for k, v in copied.meta.items() if k in _KEPT}
                ir.inherit(copied, node)
                env[inner] = copied
    if isinstance(result, (list, tuple)):
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(result[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
    else:
        ir.replace(node, result)
