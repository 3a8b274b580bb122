"""Contractions with a weight, as the linear layers they are.

``einsum("bld,dhk->blhk", x, W)`` contracts features of ``x`` with a weight and keeps all other dims:
a matrix product of ``W`` reshaped. ``tensordot``, ``inner`` and products with a vector are einsums by
another name. Written as linear layers, everything that knows linear layers knows them.
"""

from __future__ import annotations

import math
import string
from typing import Any

import torch
from torch import fx

from . import ir

aten = torch.ops.aten


def einsum_to_linear(gm: fx.GraphModule) -> None:
    """Rewrite every contraction of an activation and a weight that is a linear layer.

    Others stay: diagonals, labels shared with the result (a stack of matrices), sums over a label
    of one operand alone, broadcast sizes.
    """
    memo: dict[fx.Node, bool] = {}
    moved: list[fx.Node] = []
    for node in list(gm.graph.nodes):
        found = _contraction(node)
        if found is None:
            continue
        operands, terms = found
        weights = [ir.is_weight_expr(o, memo) for o in operands]
        if weights[0] == weights[1]:
            continue
        w = weights.index(True)
        new = _rewrite(node, operands[1 - w], operands[w], terms[1 - w], terms[w], terms[2])
        if new is None:
            continue
        if not _same_strides(new, node):
            with gm.graph.inserting_before(node):
                flat = ir.emit(gm.graph, aten.contiguous.default, new, like=node)
            if _same_strides(flat, node):  # code behind the model may rely on it
                new = flat
            else:
                gm.graph.erase_node(flat)
                moved.append(new)
        ir.replace(node, new)
    if moved:
        from .canonical import settle

        settle(gm, moved)


def _same_strides(a: fx.Node, b: fx.Node) -> bool:
    return ir.same_shape(ir.val(a).stride(), ir.val(b).stride())


def _contraction(node: fx.Node) -> tuple[list[fx.Node], list[list[str]]] | None:
    """Two operands and the labels of their dims and the result's, if that is what ``node`` is."""
    packet = getattr(node.target, "overloadpacket", None) if node.op == "call_function" else None
    read = _SPELLINGS.get(packet)
    if read is None or not ir.is_tensor(node):
        return None
    found = read(node)
    if found is None or len(found[0]) != 2 or not all(ir.is_tensor(o) for o in found[0]):
        return None
    operands, equation = found
    terms = _labels(equation, [len(ir.shape(o)) for o in operands])
    return None if terms is None else (operands, terms)


def _read_einsum(node: fx.Node) -> tuple[list, str]:
    equation, operands = node.args[:2]
    return list(operands), equation


def _read_inner(node: fx.Node) -> tuple[list, str]:
    """``inner(a, b)`` contracts the last dims."""
    a, b = node.args[:2]
    letters = iter(string.ascii_letters[1:])
    left, right = ("".join(next(letters) for _ in ir.shape(t)[1:]) for t in (a, b))
    return [a, b], f"{left}a,{right}a->{left}{right}"


def _read_tensordot(node: fx.Node) -> tuple[list, str] | None:
    if len(node.args) != 4 or node.kwargs:
        return None
    a, b, over_a, over_b = node.args
    letters = iter(string.ascii_letters)
    left = [next(letters) for _ in ir.shape(a)]
    right = [next(letters) for _ in ir.shape(b)]
    for i, j in zip(over_a, over_b, strict=True):
        right[j] = left[i]
    inner = {left[i] for i in over_a}
    out = [c for c in (*left, *right) if c not in inner]
    return [a, b], f"{''.join(left)},{''.join(right)}->{''.join(out)}"


def _read_vector(node: fx.Node) -> tuple[list, str] | None:
    """A product with a vector: ``X v`` or ``v X`` (a matrix times a vector that we do not own is
    a linear layer already)."""
    a, b = node.args[:2]
    if not (ir.is_tensor(a) and ir.is_tensor(b)):
        return None
    ranks = len(ir.shape(a)), len(ir.shape(b))
    if ranks[1] == 1 and not (ranks[0] == 2 and ir.is_weight_expr(a)):
        return [a, b], "...d,d->..."
    if ranks[0] == 1 and not (ranks[1] == 2 and ir.is_weight_expr(b)):
        return [a, b], "d,...dn->...n"
    return None


_SPELLINGS: dict[Any, Any] = {
    aten.einsum: _read_einsum,
    aten.inner: _read_inner,
    aten.tensordot: _read_tensordot,
    aten.matmul: _read_vector,
    aten.mv: _read_vector,
    aten.dot: _read_vector,
}


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
) -> fx.Node | None:
    """The result as a linear layer of ``x``, or ``None`` if it is none."""
    inner = [c for c in x_labels if c in w_labels]
    kept = [c for c in out_labels if c in x_labels]  # as einsum orders them
    new = [c for c in w_labels if c not in inner]
    if not inner or sorted(out_labels) != sorted(kept + new) or set(kept) & set(inner):
        return None
    if len(kept) + len(inner) != len(x_labels):
        return None
    if ir.dtype(x) != ir.dtype(weight) or not ir.dtype(x).is_floating_point:
        return None
    size = dict(zip(w_labels, ir.shape(weight), strict=True))
    sizes = dict(zip(x_labels, ir.shape(x), strict=True))
    if not all(isinstance(s, int) for s in size.values()):
        return None
    if not all(ir.same_dim(size[c], sizes[c]) for c in inner):
        return None
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
        if len(w_labels) != 2 or not new:
            matrix = call(aten.reshape.default, matrix, shape, weight=True)
        y = order(x, x_labels, kept + inner)
        if len(inner) > 1:
            y = call(aten.flatten.using_ints, y, -len(inner), -1)
        y = call(aten.linear.default, y, matrix)
        if not new:
            y = call(aten.squeeze.dim, y, -1)
        elif len(new) > 1:
            y = call(aten.unflatten.int, y, -1, [size[c] for c in new])
        return order(y, kept + new, out_labels)
