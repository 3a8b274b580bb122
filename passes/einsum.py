"""``einsum`` with a weight, as the linear layer it is.

``einsum("bld,dhk->blhk", x, W)`` contracts features of ``x`` with a weight and keeps all other dims:
a matrix product of ``W`` reshaped. Written so, everything that knows linear layers knows it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from . import ir

aten = torch.ops.aten


def einsum_to_linear(gm: fx.GraphModule) -> None:
    """Rewrite every two-operand ``einsum`` of an activation and a weight that is a linear layer.

    Others stay: diagonals, labels shared with the result (a stack of matrices), sums over a label
    of one operand alone, broadcast sizes.
    """
    memo: dict[fx.Node, bool] = {}
    for node in gm.graph.find_nodes(op="call_function", target=aten.einsum.default):
        equation, operands = node.args[:2]
        if len(operands) != 2 or not all(ir.is_tensor(o) for o in operands):
            continue
        weights = [ir.is_weight_expr(o, memo) for o in operands]
        if weights[0] == weights[1]:
            continue
        terms = _labels(equation, [len(ir.shape(o)) for o in operands])
        if terms is None:
            continue
        w = weights.index(True)
        _rewrite(node, operands[1 - w], operands[w], terms[1 - w], terms[w], terms[2])


def _labels(equation: str, ranks: list[int]) -> list[list[str]] | None:
    """Labels of the two operands and of the result, one a dim; ``None`` if one repeats."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    named = [len(t.replace("...", "")) for t in terms]
    if len(terms) != len(ranks) or any(r < n for r, n in zip(ranks, named, strict=True)):
        return None
    hidden = [r - n for r, n in zip(ranks, named, strict=True)]
    width = max(hidden)

    def expand(term: str, count: int) -> list[str]:
        head, dots, tail = term.partition("...")
        if not dots:
            return list(term)
        return [*head, *(f"…{i}" for i in range(width - count, width)), *tail]

    out = [expand(t, n) for t, n in zip(terms, hidden, strict=True)]
    if not arrow:  # the implicit result: what occurs once, in alphabetical order
        everything = left.replace("...", "").replace(",", "")
        right = "..." + "".join(sorted(c for c in everything if everything.count(c) == 1))
    out.append(expand(right, width))
    return out if all(len(set(t)) == len(t) for t in out) else None


def _rewrite(
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    x_labels: list[str],
    w_labels: list[str],
    out_labels: list[str],
) -> None:
    inner = [c for c in x_labels if c in w_labels]
    kept = [c for c in x_labels if c not in inner]
    new = [c for c in w_labels if c not in inner]
    if not inner or not new or sorted(out_labels) != sorted(kept + new):
        return
    if ir.dtype(x) != ir.dtype(weight) or not ir.dtype(x).is_floating_point:
        return
    size = dict(zip(w_labels, ir.shape(weight), strict=True))
    sizes = dict(zip(x_labels, ir.shape(x), strict=True))
    if not all(isinstance(s, int) for s in size.values()):
        return
    if not all(ir.same_dim(size[c], sizes[c]) for c in inner):
        return
    graph = node.graph

    def call(target: Any, *args: Any, weight: bool = False) -> fx.Node:
        return ir.emit(graph, target, *args, like=node, weight=weight)

    def order(value: fx.Node, now: list[str], wanted: list[str], weight: bool = False) -> fx.Node:
        if now == wanted:
            return value
        return call(aten.permute.default, value, [now.index(c) for c in wanted], weight=weight)

    with graph.inserting_before(node):
        # views of the weight, in the order that keeps them views
        matrix = order(weight, w_labels, new + inner, weight=True)
        shape = [math.prod(size[c] for c in new), math.prod(size[c] for c in inner)]
        if len(w_labels) > 2:
            matrix = call(aten.reshape.default, matrix, shape, weight=True)
        y = order(x, x_labels, kept + inner)
        if len(inner) > 1:
            y = call(aten.flatten.using_ints, y, -len(inner), -1)
        y = call(aten.linear.default, y, matrix)
        if len(new) > 1:
            y = call(aten.unflatten.int, y, -1, [size[c] for c in new])
        y = order(y, kept + new, out_labels)
    ir.replace(node, y)
