"""Find Newton–Schulz chains in an optimizer's traced step and run all of one shape as one batch.

A chain is recognized by its algebra, not its spelling: from ``A = X·Xᵀ`` (or ``XᵀX``) every node is
evaluated as a polynomial in ``A``, or as such a polynomial applied to ``X``, through ``mm``,
``addmm``, ``add``, ``sub``, ``mul`` and ``neg``. The last node of the form ``(a + b·A + c·A²)·X`` is
the next iterate. The graph must be functional (no mutation of intermediate values).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx
from torch.fx import Node

from . import kernel_products
from . import newton_schulz as ns
from .coefficients import Schedule, Triple

aten = torch.ops.aten
Poly = dict[int, float]

_MAX_POWER = 2


@dataclass
class Chain:
    """Consecutive iterations ``first → … → last`` with their coefficients."""

    first: Node
    last: Node
    schedule: list[Triple]
    inside: set[Node]

    def key(self) -> tuple[object, ...]:
        val = self.first.meta["val"]
        shape = tuple(sorted(val.shape))
        return (tuple(self.schedule), shape, val.dtype, val.device)


def batched_newton_schulz(
    xs: Sequence[Tensor], schedule: Schedule, dtype: torch.dtype | None
) -> list[Tensor]:
    """Run ``schedule`` on normalized matrices of one shape up to transposition; new tensors."""
    work = xs[0].dtype if dtype is None else dtype
    rows, cols = xs[0].shape
    device = xs[0].device
    kernels = kernel_products.choose(len(xs), rows, cols, work, device)
    native = kernel_products.native(rows, cols, work, device)
    plan = ns.make_plan(rows, cols, schedule, work, device.type, kernels=kernels, native=native)
    if plan.alone:
        return [_one(x, schedule, work, plan) for x in xs]
    turned = [x.shape != xs[0].shape for x in xs]
    batch = torch.stack([x.mT if t else x for x, t in zip(xs, turned, strict=True)]).to(work)
    out = ns.iterate(batch, schedule, plan).to(xs[0].dtype)
    return [y.mT if t else y for y, t in zip(out.unbind(), turned, strict=True)]


def _one(x: Tensor, schedule: Schedule, work: torch.dtype, plan: ns.Plan) -> Tensor:
    scratch = x.to(work, copy=True, memory_format=torch.contiguous_format)
    return ns.iterate(scratch[None], schedule, plan)[0].to(x.dtype)


# -- recognition -----------------------------------------------------------------------------------


def _transposed(node: object) -> Node | None:
    """``x`` if ``node`` is the transpose of a matrix ``x``."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    x = node.args[0] if node.args else None
    if not isinstance(x, Node) or getattr(x.meta.get("val"), "ndim", None) != 2:
        return None
    if node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default):
        return x
    if node.target == aten.transpose.int:
        a, b = node.args[1], node.args[2]
        if isinstance(a, int) and isinstance(b, int) and {a % 2, b % 2} == {0, 1}:
            return x
    if node.target == aten.permute.default and list(node.args[1]) in ([1, 0], [-1, -2]):  # type: ignore[arg-type]
        return x
    return None


def _gram_of(node: Node) -> list[tuple[Node, bool]]:
    """Readings ``(X, right)`` of ``node`` as ``X·Xᵀ`` or (``right``) ``XᵀX``.

    ``L·R`` with one the transpose of the other is both ``L·Lᵀ`` and ``RᵀR``.
    """
    if node.op != "call_function" or node.target != aten.mm.default:
        return []
    left, right = node.args
    if not isinstance(left, Node) or not isinstance(right, Node):
        return []
    if _transposed(right) is left or _transposed(left) is right:
        return [(left, False), (right, True)]
    return []


class _Reader:
    """Evaluates nodes as polynomials in ``A``, or as polynomials applied to ``X``."""

    def __init__(self, x: Node, gram: Node, right: bool) -> None:
        self.x, self.gram, self.right = x, gram, right
        self._memo: dict[tuple[Node, bool], Poly | None] = {}

    def read(self, node: object, applied: bool) -> Poly | None:
        if not isinstance(node, Node):
            return None
        key = (node, applied)
        if key not in self._memo:
            self._memo[key] = None
            self._memo[key] = self._read(node, applied)
        return self._memo[key]

    def _read(self, node: Node, applied: bool) -> Poly | None:
        if applied and node is self.x:
            return {0: 1.0}
        if not applied and node is self.gram:
            return {1: 1.0}
        if node.op != "call_function":
            return None
        t, a, kw = node.target, node.args, node.kwargs
        if t == aten.neg.default:
            return _scaled(self.read(a[0], applied), -1.0)
        if t in (aten.mul.Tensor, aten.mul.Scalar):
            for value, other in ((a[1], a[0]), (a[0], a[1])):
                if isinstance(value, (int, float)):
                    return _scaled(self.read(other, applied), float(value))
            return None
        if t in (aten.div.Tensor, aten.div.Scalar) and isinstance(a[1], (int, float)):
            return _scaled(self.read(a[0], applied), 1.0 / float(a[1]))
        if t in (aten.add.Tensor, aten.sub.Tensor):
            alpha = kw.get("alpha", 1)
            if not isinstance(alpha, (int, float)):
                return None
            sign = -1.0 if t == aten.sub.Tensor else 1.0
            return _sum(
                self.read(a[0], applied), _scaled(self.read(a[1], applied), sign * float(alpha))
            )
        if t == aten.mm.default:
            return self._product(a[0], a[1], applied)
        if t == aten.addmm.default:
            beta, alpha = kw.get("beta", 1), kw.get("alpha", 1)
            if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)):
                return None
            return _sum(
                _scaled(self.read(a[0], applied), float(beta)),
                _scaled(self._product(a[1], a[2], applied), float(alpha)),
            )
        return None

    def _product(self, left: object, right: object, applied: bool) -> Poly | None:
        if not applied:
            p, q = self.read(left, False), self.read(right, False)
        elif self.right:
            p, q = self.read(left, True), self.read(right, False)
        else:
            p, q = self.read(left, False), self.read(right, True)
        if p is None or q is None:
            return None
        out: Poly = {}
        for i, u in p.items():
            for j, v in q.items():
                out[i + j] = out.get(i + j, 0.0) + u * v
        return out if max(out) <= _MAX_POWER else None


def _scaled(p: Poly | None, s: float) -> Poly | None:
    return None if p is None else {k: v * s for k, v in p.items()}


def _sum(p: Poly | None, q: Poly | None) -> Poly | None:
    if p is None or q is None:
        return None
    return {k: p.get(k, 0.0) + q.get(k, 0.0) for k in {*p, *q}}


@dataclass
class _Iteration:
    x: Node
    next: Node
    triple: Triple
    inside: set[Node]


def _iteration(gram: Node, order: dict[Node, int]) -> _Iteration | None:
    """The iteration that starts at a Gram node, if its nodes serve nothing else."""
    for x, right in _gram_of(gram):
        found = _iteration_from(x, gram, right, order)
        if found is not None:
            return found
    return None


def _iteration_from(x: Node, gram: Node, right: bool, order: dict[Node, int]) -> _Iteration | None:
    reader = _Reader(x, gram, right)
    seen: set[Node] = {gram}
    best: tuple[Node, Poly] | None = None
    frontier = [gram]
    while frontier:
        node = frontier.pop()
        for user in node.users:
            if user in seen:
                continue
            applied, plain = reader.read(user, True), reader.read(user, False)
            if applied is None and plain is None:
                continue
            seen.add(user)
            frontier.append(user)
            if applied is not None and max(applied) > 0:
                if best is None or order[user] > order[best[0]]:
                    best = (user, applied)
    if best is None:
        return None
    end, poly = best
    inside = _between(x, end)
    if inside is None:
        return None
    if any(user not in inside for node in inside if node is not end for user in node.users):
        return None
    return _Iteration(x, end, (poly.get(0, 0.0), poly.get(1, 0.0), poly.get(2, 0.0)), inside)


def _between(x: Node, end: Node) -> set[Node] | None:
    """All nodes from ``x`` (excluded) to ``end``; None if something else flows in."""
    inside: set[Node] = set()
    stack = [end]
    origin = _transposed(x)  # when x is itself a transpose, what it transposes stands for xᵀ
    while stack:
        node = stack.pop()
        if node is x or node is origin or node in inside:
            continue
        if node.op != "call_function":
            return None
        inside.add(node)
        stack.extend(node.all_input_nodes)
    return inside


def find_chains(graph: fx.Graph) -> list[Chain]:
    """Maximal runs of iterations, each run's intermediate nodes used by nothing else."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    iterations = {it.x: it for n in graph.nodes if (it := _iteration(n, order)) is not None}
    ends = {it.next for it in iterations.values()}
    chains = []
    for x, it in iterations.items():
        if x in ends:
            continue
        chain = Chain(x, it.next, [it.triple], set(it.inside))
        while chain.last in iterations:
            following = iterations[chain.last]
            if any(u not in following.inside for u in chain.last.users):
                break
            chain.schedule.append(following.triple)
            chain.inside |= following.inside
            chain.last = following.next
        chains.append(chain)
    return chains


# -- rewriting -------------------------------------------------------------------------------------


def _ancestors(node: Node, memo: dict[Node, frozenset[Node]], ends: set[Node]) -> frozenset[Node]:
    """Chain ends that ``node`` depends on."""
    stack = [node]
    while stack:
        top = stack[-1]
        if top in memo:
            stack.pop()
            continue
        missing = [i for i in top.all_input_nodes if i not in memo]
        if missing:
            stack.extend(missing)
            continue
        own = frozenset(i for i in top.all_input_nodes if i in ends)
        memo[top] = own.union(*(memo[i] for i in top.all_input_nodes))
        stack.pop()
    return memo[node]


def batch_newton_schulz(gm: fx.GraphModule, dtype: torch.dtype | None = None) -> list[list[Chain]]:
    """Replace every chain in ``gm`` by a batched call; returns the batches.

    Args:
        dtype: dtype inside the iteration; None keeps each chain's own.
    """
    _fold_double_transposes(gm.graph)
    chains = find_chains(gm.graph)
    if not chains:
        return []
    ends = {c.last for c in chains}
    memo: dict[Node, frozenset[Node]] = {}
    groups: list[tuple[tuple[object, ...], list[Chain]]] = []
    for chain in chains:
        before = _ancestors(chain.first, memo, ends)
        for key, members in groups:
            ours = {m.last for m in members}
            theirs = [_ancestors(m.first, memo, ends) for m in members]
            if (
                key == chain.key()
                and not (before & ours)
                and not any(chain.last in t for t in theirs)
            ):
                members.append(chain)
                break
        else:
            groups.append((chain.key(), [chain]))
    batches = [members for _, members in groups]
    graph = gm.graph
    for members in batches:
        with graph.inserting_before(members[0].last):
            call = graph.call_function(
                batched_newton_schulz,
                ([m.first for m in members], tuple(members[0].schedule), dtype),
            )
            for i, m in enumerate(members):
                item = graph.call_function(_getitem, (call, i))
                item.meta["val"] = m.last.meta.get("val")
                m.last.replace_all_uses_with(item)
    _sort(graph)
    graph.eliminate_dead_code()
    graph.lint()
    gm.recompile()
    return batches


def _fold_double_transposes(graph: fx.Graph) -> None:
    """``(Xᵀ)ᵀ → X``; functionalizing an in-place division of a transposed view leaves them."""
    for node in list(graph.nodes):
        inner = _transposed(node)
        original = _transposed(inner) if inner is not None else None
        if original is not None:
            node.replace_all_uses_with(original)
            graph.erase_node(node)


def _getitem(items: Sequence[Tensor], i: int) -> Tensor:
    return items[i]


def _sort(graph: fx.Graph) -> None:
    """Stable topological order: a batched call comes after the last of its inputs."""
    pending = list(graph.nodes)
    ordered: list[Node] = []
    waiting: dict[Node, list[Node]] = {}
    counts = {n: len(n.all_input_nodes) for n in pending}
    for n in pending:
        for i in n.all_input_nodes:
            waiting.setdefault(i, []).append(n)
    position = {n: k for k, n in enumerate(pending)}
    heap = [position[n] for n in pending if counts[n] == 0]
    heapq.heapify(heap)
    while heap:
        node = pending[heapq.heappop(heap)]
        ordered.append(node)
        for user in waiting.get(node, ()):
            counts[user] -= 1
            if counts[user] == 0:
                heapq.heappush(heap, position[user])
    if len(ordered) != len(pending):
        raise RuntimeError("batching made a cycle; this is a bug in find_chains")
    for before, after in pairwise(ordered):
        before.append(after)
