"""New parameters of a rewrite: their names, their values, their place in the graph.

A pass that extends a model registers each new ``nn.Parameter`` on the graph module under the path of
the module it extends (``blocks.0.norm.gate_down``) and lists it in ``gm.meta["new_parameters"]``. A
name that exists already is taken over with its present value: another graph of the same model (other
mode, other sizes), or a second call of a tied module, shares one set of parameters.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import ir
from ..capture import set_attribute
from ..contract import Context
from ..errors import Refuse

NEW = "new_parameters"


def refuse_in_backend(context: Context) -> None:
    """New parameters need an owner: only ``rewrite`` and ``PassManager`` on a capture have one."""
    if context.options.get("dynamo"):
        raise Refuse(
            "this pass adds parameters, which torch.compile's backend has nowhere to keep; "
            "use normfuse.rewrite(model, args, passes=[…]) and compile the result"
        )


def prune(gm: fx.GraphModule) -> dict[str, nn.Parameter]:
    """``gm.meta["new_parameters"]`` without entries that no node reads (undone rewrites)."""
    read = {n.target for n in gm.graph.find_nodes(op="get_attr")}
    new = gm.meta.setdefault(NEW, {})
    for name in [n for n in new if n not in read]:
        del new[name]
    return new


def weight_leaves(node: Any) -> set[fx.Node]:
    """The parameters and buffers an expression of weights is made of."""
    found: set[fx.Node] = set()
    stack = [node] if isinstance(node, fx.Node) else []
    while stack:
        n = stack.pop()
        if ir.is_weight(n):
            found.add(n)
        stack.extend(n.all_input_nodes)
    return found


def norm_prefix(node: fx.Node) -> str:
    """Where the new parameters of a norm live, as a prefix: ``"blocks.0.norm."``.

    Calls that share their gain, or that are calls of one ``nn`` norm module, share the prefix.
    Norms without gain written as plain code get one per call.
    """
    gain = ir.NormArgs(node).gain
    leaves = [n for n in weight_leaves(gain) if n.meta["kind"] == "param"]
    if len(leaves) == 1:
        parent, _, leaf = leaves[0].meta["fqn"].rpartition(".")
        prefix = f"{parent}." if parent else ""
        return prefix if leaf == "weight" and prefix else f"{prefix}{leaf}_"
    path = ir.module_path(node)
    if str(node.meta.get("spelling", "")).startswith("nn.") and path:
        return f"{path}."
    site = str(node.meta.get("site", node.name)).replace("#", "_")
    return f"{site}." if path and site == path else f"{site}_".replace("-", "_")


def parameter_dtype(*nodes: Any) -> torch.dtype:
    """The dtype for new parameters: that of the first given floating weight or value."""
    for node in nodes:
        for leaf in (*weight_leaves(node), node) if isinstance(node, fx.Node) else ():
            if ir.is_tensor(leaf) and ir.dtype(leaf).is_floating_point:
                return ir.dtype(leaf)
    return torch.get_default_dtype()


def check_free(gm: fx.GraphModule, name: str, shape: tuple[int, ...]) -> None:
    """Refuse if ``name`` is taken by something else than such a parameter."""
    if not ir.has_attribute(gm, name):
        return
    value = ir.attribute(gm, name)
    if not isinstance(value, nn.Parameter) or tuple(value.shape) != shape:
        raise Refuse(f"the model already has an attribute {name!r} that is not this parameter")


def parameter(
    gm: fx.GraphModule,
    name: str,
    init: Callable[[], Tensor],
    *,
    before: fx.Node,
    trainable: bool = True,
) -> tuple[fx.Node, bool]:
    """The leaf of the parameter called ``name``, made from ``init()`` unless it exists.

    Returns:
        The ``get_attr`` node and whether the parameter is new (has its initial value).
    """
    new = gm.meta.setdefault(NEW, {})
    fresh = not ir.has_attribute(gm, name)
    if fresh:
        value = nn.Parameter(init(), requires_grad=trainable)
        set_attribute(gm, name, value)
        new[name] = value
        gm.meta.setdefault("fresh_parameters", set()).add(name)
    value = ir.attribute(gm, name)
    new.setdefault(name, value)
    fresh = name in gm.meta.get("fresh_parameters", ())
    for node in gm.graph.find_nodes(op="get_attr"):
        if node.target == name:
            if node > before:
                before.prepend(node)
            return node, fresh
    with gm.graph.inserting_before(before):
        leaf = gm.graph.get_attr(name)
    mode = ir.fake_mode(gm)
    leaf.meta["val"] = value if mode is None else mode.from_tensor(value, static_shapes=True)
    leaf.meta["kind"], leaf.meta["fqn"] = "param", name
    return leaf, fresh


def uniform(shape: tuple[int, ...], bound: float, name: str, seed: int, like: fx.Node, dtype: Any):
    """``U(−bound, bound)``, the same for the same name and seed on every machine and rank."""

    def init() -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        value = torch.empty(shape, dtype=torch.float32)
        value.uniform_(-bound, bound, generator=generator)
        return value.to(device=ir.val(like).device, dtype=dtype)

    return init


def constant(shape: tuple[int, ...], number: float, like: fx.Node, dtype: torch.dtype):
    """A tensor full of one number, on ``like``'s device."""

    def init() -> Tensor:
        return torch.full(shape, number, dtype=dtype, device=ir.val(like).device)

    return init
