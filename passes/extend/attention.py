"""Trainable rescalings of attention outputs; the attention itself, fused or written out, is not touched.

Sources: "Gated attention for large language models" (position G1) and "Affine-scaled attention".
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from .. import ir
from ..axis import is_dropout
from ..contract import Context, register
from ..errors import NormfuseError, Refuse
from ..linear import match_linear
from .hold import HOLD
from .parameters import check_free, constant, parameter, parameter_dtype
from .sites import ExtendPass, Selection, fixed, width

aten = torch.ops.aten
nf = torch.ops.normfuse

_SDPA = aten.scaled_dot_product_attention
_SOFTMAX = (aten.softmax, aten._softmax, aten._safe_softmax)
_PRODUCTS = (aten.matmul, aten.bmm, aten.baddbmm)
_VIEWS = (aten.view, aten.reshape, aten._unsafe_view, aten.flatten)


def _sdpa_args(node: fx.Node) -> dict[str, Any]:
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in schema}
    given |= {a.name: v for a, v in zip(schema, node.args, strict=False)}
    return {**given, **node.kwargs}


_PASS_THROUGH = (*_VIEWS, aten.to, aten._to_copy, aten.contiguous, aten.clone, aten.expand)


def product_of_softmax(node: fx.Node) -> fx.Node | None:
    """``softmax(…)·V`` of a written-out attention, for its softmax ``node``; ``None`` if it is none."""
    shape = ir.shape(node)
    if len(shape) not in (3, 4) or node.args[1] not in (-1, len(shape) - 1):
        return None
    cur = node
    while True:
        users = [u for u in cur.users if u.op == "call_function"]
        for user in users:
            if ir.is_call(user, aten.matmul, aten.bmm) and user.args[0] is cur:
                return None if ir.is_weight_expr(user.args[1]) else user
        onward = [u for u in users if is_dropout(u) or ir.is_call(u, *_PASS_THROUGH)]
        if len(onward) != 1:
            return None
        cur = onward[0]


def query_of(node: fx.Node) -> fx.Node:
    """The queries of an attention: of a fused call, or of the logits of a written-out one."""
    if ir.is_call(node, _SDPA):
        return _sdpa_args(node)["query"]
    stack, seen = [node.args[0]], {node.args[0]}
    while stack:
        n = stack.pop(0)
        if ir.is_call(n, *_PRODUCTS):
            left, right = n.args[-2:]
            if not ir.is_weight_expr(left) and not ir.is_weight_expr(right):
                return left
        for a in n.all_input_nodes:
            if a not in seen:
                seen.add(a)
                stack.append(a)
    raise Refuse("the logits of the attention are no product of queries and keys", node)


def query_source(node: fx.Node) -> fx.Node:
    """What the queries of an attention are computed from: the input of their linear layer.

    A value ``(batch, tokens, d)`` whose batch and tokens are the attention output's.
    """
    query = query_of(node)
    found: list[fx.Node] = []
    stack, seen = [query], {query}
    while stack:
        n = stack.pop()
        linear = match_linear(n)
        if linear is not None and ir.is_weight_expr(linear.weight):
            found.append(linear.input)
            continue
        for a in n.all_input_nodes:
            sizes = isinstance(ir.val(a), (torch.SymInt, int))  # chunks are lists: let them pass
            if a not in seen and not sizes and not ir.is_weight_expr(a):
                seen.add(a)
                stack.append(a)
    sources = set(found)
    if len(sources) != 1:
        what = "no linear layer" if not sources else f"{len(sources)} different inputs"
        raise Refuse(
            f"the queries come from {what}, so there is nothing to compute a gate from", node
        )
    x = sources.pop()
    while len(ir.shape(x)) == 2 and ir.is_call(x, *_VIEWS):  # (batch·tokens, d) of addmm layers
        x = x.args[0]
    shape, out = ir.shape(x), ir.shape(node)
    if len(out) != 4 or len(shape) != 3:
        raise Refuse(
            f"attention output of {len(out)} dims from an input of {len(shape)} (want 4 and 3)",
            node,
        )
    if not (ir.same_dim(shape[0], out[0]) and ir.same_dim(shape[1], out[2])):
        raise Refuse("batch and tokens of the attention are not those of its queries' input", node)
    return x


class _AttentionExtension(ExtendPass):
    """Sites are the attentions (fused calls, or ``softmax(…)·V``), keyed by module path."""

    def candidates(self, gm: fx.GraphModule) -> Iterable[tuple[str, fx.Node, str]]:
        seen: dict[str, int] = {}
        for node in gm.graph.nodes:
            if ir.is_call(node, *_SOFTMAX):
                node = product_of_softmax(node)
                if node is None:
                    continue
            elif not ir.is_call(node, _SDPA):
                continue
            path = ir.module_path(node) or node.name
            n = seen[path] = seen.get(path, -1) + 1
            yield (f"{path}.attention" + (f"#{n}" if n else "")), node, ""

    @staticmethod
    def prefix(key_node: fx.Node) -> str:
        """Prefix of the new parameters: beside the weight that makes the queries.

        One set per query projection, so that tied layers share theirs.
        """
        query = query_of(key_node)
        stack, seen = [query], {query}
        names = set()
        while stack:
            n = stack.pop()
            linear = match_linear(n)
            if linear is not None:
                leaf = linear.weight
                while leaf.op == "call_function" and leaf.all_input_nodes:
                    leaf = leaf.all_input_nodes[0]
                names.add(str(leaf.meta.get("fqn", "")))
                continue
            for a in n.all_input_nodes:
                if a not in seen:
                    seen.add(a)
                    stack.append(a)
        name = min(names) if names else ""
        path = ir.module_path(key_node)
        if path and name.startswith(f"{path}."):
            return f"{path}.attention_"
        parent = name.rpartition(".")[0].rpartition(".")[0] or path
        return f"{parent}.attention_" if parent else "attention_"


def _refuse_extended(node: fx.Node) -> None:
    for user in node.users:
        if ir.is_call(user, nf.gate_heads, nf.affine_heads) and user.args[0] is node:
            raise Refuse(f"the attention is extended already ({user.target})", node)


@register
class InsertGatedAttention(_AttentionExtension):
    """The output of attention becomes ``y ⊙ 2σ(x Wᵀ)`` with ``W = 0``, before the output projection.

    ``x`` is what the queries were computed from. The gate is exactly 1 at insertion, in every dtype.

    Args:
        per: ``"head"`` (one gate per head) or ``"element"``.

    New parameter: ``<attention>.attention_gate``, ``(heads, d)`` or ``(heads·w, d)``.
    """

    name = "insert_gated_attention"

    def __init__(self, sites: Selection = "all", per: str = "head") -> None:
        if per not in ("head", "element"):
            raise NormfuseError(f"per must be 'head' or 'element', got {per!r}")
        super().__init__(sites, per=per)

    def plan(self, gm: fx.GraphModule, node: fx.Node, context: Context) -> Callable[[], None]:
        _refuse_extended(node)
        x = query_source(node)
        heads = fixed(ir.shape(node)[1], "the number of heads", node)
        rows = heads * (
            fixed(ir.shape(node)[3], "a head", node) if self.options["per"] == "element" else 1
        )
        shape = (rows, width(x))
        name = f"{self.prefix(node)}gate"
        check_free(gm, name, shape)
        dtype = parameter_dtype(_projection(x), x)

        def commit() -> None:
            weight, fresh = parameter(gm, name, constant(shape, 0.0, x, dtype), before=node)
            if not fresh:
                self.reused.append(name)
            with gm.graph.inserting_after(node):
                gated = ir.emit(gm.graph, nf.gate_heads.default, node, x, weight, like=node)
            node.replace_all_uses_with(gated, delete_user_cb=lambda u: u is not gated)

        return commit


def _projection(x: fx.Node) -> fx.Node | None:
    """A weight that reads ``x``, for the dtype of new ones."""
    for user in x.users:
        linear = match_linear(user)
        if linear is not None and linear.input is x and ir.is_weight_expr(linear.weight):
            return linear.weight
    return None


@register
class AffineScaledAttention(_AttentionExtension):
    """``softmax(…)V`` becomes ``α·softmax(…)V + β·Σ V``, ``α = clip(0.1·(x Wᵀ + b) + 0.5, 0, 1)``.

    ``β = (ᾱ − α)/N`` with ``ᾱ`` a running mean of α per head and ``N`` the number of all keys
    (masked ones included: with visible keys alone every row would sum to ``ᾱ`` whatever α is; the
    paper leaves it open). At insertion ``W = 0``, ``b = 5`` and ``ᾱ = 1``, hence α = 1 and β = 0:
    exactly the same, in every dtype; at ``b = 5`` the clip still has its gradient.

    ``ᾱ`` is a parameter without gradient; graphs captured in training mode move it by
    ``ᾱ ← ρᾱ + (1−ρ)·mean(α)`` after use, graphs in eval mode leave it. Under activation
    checkpointing the forward, and with it that update, would run twice: set ``update=False``.

    Args:
        rho: ``ρ``.
        update: emit the update in training graphs.

    New parameters: ``<attention>.attention_affine_weight`` ``(heads, d)``, ``…_bias`` and ``…_mean``
    ``(heads,)``.
    """

    name = "affine_scaled_attention"

    def __init__(self, sites: Selection = "all", rho: float = 0.9, update: bool = True) -> None:
        if not 0 <= rho <= 1:
            raise NormfuseError(f"rho must lie in [0, 1], got {rho!r}")
        super().__init__(sites, rho=float(rho), update=bool(update))

    def plan(self, gm: fx.GraphModule, node: fx.Node, context: Context) -> Callable[[], None]:
        _refuse_extended(node)
        if not ir.is_call(node, _SDPA):
            raise Refuse(
                "the attention is written out, its mask is part of its logits: which keys are "
                "visible is not known (load the model with fused attention)",
                node,
            )
        x = query_source(node)
        given = _sdpa_args(node)
        value, mask, causal = given["value"], given["attn_mask"], bool(given["is_causal"])
        if given["dropout_p"]:
            raise Refuse("attention drops weights at random, which the added term would not", node)
        if causal and not ir.same_dim(ir.shape(value)[-2], ir.shape(node)[-2]):
            raise Refuse("causal attention with more keys than queries", node)
        if mask is not None and ir.dtype(mask) != torch.bool:
            raise Refuse("the mask is additive, so which keys are visible is not known", mask)
        heads = fixed(ir.shape(node)[1], "the number of heads", node)
        if heads % fixed(ir.shape(value)[1], "the number of value heads", value):
            raise Refuse("value heads do not divide the heads", node)
        base = f"{self.prefix(node)}affine"
        d = width(x)
        check_free(gm, f"{base}_weight", (heads, d))
        for part in ("bias", "mean"):
            check_free(gm, f"{base}_{part}", (heads,))
        dtype = parameter_dtype(_projection(x), x)

        def commit() -> None:
            graph = gm.graph
            leaves = []
            for part, shape, number in (
                ("weight", (heads, d), 0.0),
                ("bias", (heads,), 5.0),
                ("mean", (heads,), 1.0),
            ):
                name = f"{base}_{part}"
                kind = torch.float32 if part == "mean" and dtype.itemsize < 4 else dtype
                leaf, fresh = parameter(
                    gm,
                    name,
                    constant(shape, number, x, kind),
                    before=node,
                    trainable=part != "mean",
                )
                leaves.append(leaf)
                if not fresh:
                    self.reused.append(name)
            mean = leaves[-1]
            update = context.training and self.options["update"]
            with graph.inserting_after(node):
                both = ir.emit(
                    graph,
                    nf.affine_heads.default,
                    node,
                    value,
                    x,
                    *leaves,
                    like=node,
                    mask=mask,
                    is_causal=causal,
                )
            if update:  # the op and its backward must not read what is overwritten below
                mean.meta["kind"] = "input"
                with graph.inserting_before(both):
                    held = ir.emit(graph, HOLD, mean, like=node)
                both.replace_input_with(mean, held)
            with graph.inserting_after(both):
                y = ir.emit(graph, operator.getitem, both, 0, like=node)
            node.replace_all_uses_with(y, delete_user_cb=lambda u: u is not both)
            if update:
                with graph.inserting_after(y):
                    batch = ir.emit(graph, operator.getitem, both, 1, like=node)
                with graph.inserting_after(batch):
                    batch = ir.emit(graph, aten.to.dtype, batch, ir.dtype(mean), like=node)
                with graph.inserting_after(batch):
                    # lerp leaves 1 at exactly 1
                    moved = ir.emit(
                        graph, aten.lerp.Scalar, held, batch, 1 - self.options["rho"], like=node
                    )
                with graph.inserting_after(moved):
                    ir.emit(graph, aten.copy_.default, mean, moved, like=node)

        return commit
