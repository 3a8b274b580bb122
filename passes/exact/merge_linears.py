"""MergeLinears: linear layers that read one tensor become one layer, split behind.

``[W₁; W₂] x + [b₁; b₂]`` computes both results in one product: one call instead of several, and one
pass over ``x``. A layer without a bias takes zeros. Results become strided views of the merged one.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .. import cost, ir
from ..contract import Context, Pass, PassResult, register
from ..errors import Refuse
from ..linear import Linear, is_weight, match_linear, table_user
from ..report import Site
from ..weight_builder import WeightBuilder

if TYPE_CHECKING:
    import sympy

aten = torch.ops.aten

_FAMILIES = {"addmm": "mm", "baddbmm": "bmm"}
#: Layouts of ops that have no arguments but their operands, by the side of the weight.
_RIGHT = ("linear", "mm", "addmm", "bmm", "baddbmm", "matmul")
_LEFT = ("mv", "left_linear", "left_mm", "left_bmm", "left_matmul")
_OPERANDS = frozenset({"input", "x", "self", "mat1", "mat2", "batch1", "batch2", "weight", "bias"})


@register
class MergeLinears(Pass):
    """Merge linear layers of the same input (q, k, v; gate, up; parallel branches).

    Args:
        max_rows: under the policy ``"pays"``, merge only up to this many rows of input (``None``:
            what the cost model says for the device).
    """

    name = "merge_linears"
    promise = "exact"

    def __init__(self, *, max_rows: int | None = None) -> None:
        super().__init__(max_rows=max_rows)
        self.max_rows = max_rows

    @classmethod
    def identity(cls) -> Sequence[tuple[sympy.Matrix, sympy.Matrix]]:
        """Two layers, one without a bias, against the merged layer and its slices."""
        import sympy

        k, d1, d2 = 2, 3, 2
        w1 = sympy.Matrix(d1, k, sympy.symbols(f"w:{d1 * k}", real=True))
        w2 = sympy.Matrix(d2, k, sympy.symbols(f"u:{d2 * k}", real=True))
        b1 = sympy.Matrix(d1, 1, sympy.symbols(f"b:{d1}", real=True))
        x = sympy.Matrix(k, 1, sympy.symbols(f"x:{k}", real=True))
        merged = w1.col_join(w2) * x + b1.col_join(sympy.zeros(d2, 1))
        return [(w1 * x + b1, merged[:d1, :]), (w2 * x, merged[d1:, :])]

    def run(self, gm: fx.GraphModule, context: Context) -> PassResult:
        result = PassResult()
        builder = WeightBuilder(gm.graph, context)
        keys: set[str] = set()
        known: dict[Any, Any] = {}
        groups, same = _same_input(gm)
        for readers in groups:
            for members, problem in _partition(readers, same):
                key = _site_key(members, keys)

                def plan(
                    members: list[Linear] = members, problem: Refuse | None = problem
                ) -> Callable[[], None]:
                    if problem is not None:
                        raise problem
                    return self._plan(members, context, builder, known)

                first = members[0]
                result.sites.append(
                    Site(
                        key=key,
                        kind="linear",
                        module=key,
                        spelling=" + ".join(_shape_text(m) for m in members),
                        where=ir.where(first.node),
                        shape="×".join(map(str, ir.shape(first.input))),
                        dtype=str(ir.dtype(first.input)).removeprefix("torch."),
                    )
                )
                if self.attempt(context, result, key, plan):
                    saved = (len(members) - 1) * cost.nbytes(first.input)
                    result.savings[key] = (float(saved), 0.0)
        return result

    def _plan(
        self,
        members: list[Linear],
        context: Context,
        builder: WeightBuilder,
        known: dict[Any, Any],
    ) -> Callable[[], None]:
        if context.policy == "pays":
            self._must_pay(members, context)
        return lambda: _merge(members, builder, known)

    def _must_pay(self, members: list[Linear], context: Context) -> None:
        first = members[0]
        size = cost.text(sum(cost.nbytes(m.weight) for m in members))
        if context.training:
            raise Refuse(
                f"does not pay in training: {size} of weights would be concatenated at every step",
                first.node,
            )
        limit = self.max_rows
        if limit is None:
            limit = cost.merge_rows(context.device)
        rows = cost.rows(first.input, first.feature_in)
        if rows > limit:
            raise Refuse(
                f"does not pay: {rows} rows; on {context.device} one product for {len(members)} "
                f"weights ({size}) is faster only up to {limit} rows",
                first.node,
            )


def _same_input(gm: fx.GraphModule) -> tuple[list[list[Linear]], dict[fx.Node, fx.Node]]:
    """Groups of two or more linear layers whose inputs are the same value.

    Also returns the first node that computes each pure node's value.

    Two values are the same if they are computed by the same pure ops from the same values (each
    reader of a ``Conv1D`` flattens its input anew).
    """
    table: dict[Any, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    groups: dict[fx.Node, list[Linear]] = {}

    def rename(node: fx.Node) -> Any:
        known = ir.concrete(ir.val(node))
        return known if isinstance(known, int) else same.get(node, node)

    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if ir.is_pure(node):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), rename)
            key = ir.frozen((node.target, args, dict(kwargs)))
            same[node] = table.setdefault(key, node)
        linear = match_linear(node)
        if linear is not None:
            groups.setdefault(same.get(linear.input, linear.input), []).append(linear)
    return [group for group in groups.values() if len(group) > 1], same


def _partition(
    readers: list[Linear], same: dict[fx.Node, fx.Node]
) -> list[tuple[list[Linear], Refuse | None]]:
    """Parts that can merge; what is left over comes last, with the reason."""
    parts: dict[Any, list[Linear]] = {}
    rest: list[tuple[Linear, Refuse]] = []
    for linear in readers:
        try:
            parts.setdefault(_signature(linear, same), []).append(linear)
        except Refuse as problem:
            rest.append((linear, problem))
    found: list[tuple[list[Linear], Refuse | None]] = [
        (part, None) for part in parts.values() if len(part) > 1
    ]
    singles = [part[0] for part in parts.values() if len(part) == 1]
    if rest:
        found.append(([m for m, _ in rest], rest[0][1]))
    if len(singles) > 1 or (singles and found):
        found.append((singles, _difference(singles[0], readers)))
    return found


def _signature(linear: Linear, same: dict[fx.Node, fx.Node]) -> Any:
    """What merging layers must have in common besides their input.

    Raises:
        Refuse: the layer cannot merge with any other.
    """
    node, weight = linear.node, linear.weight
    if not linear.owned:
        raise Refuse(f"its weight or bias {ir.why_no_weight(weight, linear.bias)}", node)
    if linear.groups != 1:
        raise Refuse("a grouped convolution mixes its channels in groups", node)
    if linear.layout == "grouped_mm" and linear.bias is not None:
        raise Refuse("the bias of a grouped product cannot be split", node)
    if table_user(weight) is not None:
        raise Refuse("its weight is tied to an embedding and would have to be copied", node)
    if any(u.op == "output" for u in node.users):
        raise Refuse("its result is an output of the model and must stay contiguous", node)
    shape = ir.shape(weight)
    common = [s for i, s in enumerate(shape) if i - len(shape) != linear.out_dim]
    if linear.bias is not None:
        size = [shape[linear.out_dim]]
        if linear.layout == "baddbmm":
            size = [shape[0], 1, *size]
        if list(ir.shape(linear.bias)) != size or ir.dtype(linear.bias) != ir.dtype(weight):
            raise Refuse(
                f"its bias is {ir.dtype(linear.bias)} {list(ir.shape(linear.bias))}, not one "
                "number per output feature in the weight's dtype",
                linear.bias,
            )
    others = {k: v for k, v in ir.bind(node).items() if k not in _OPERANDS}
    others = fx.node.map_arg(others, lambda n: same.get(n, n))
    if linear.layout in (*_RIGHT, *_LEFT):
        others = {}
    family = _FAMILIES.get(linear.layout, linear.layout)
    device = ir.val(weight).device
    region = node.meta.get("region")
    return ir.frozen((family, str(device), ir.dtype(weight), common, others, region))


def _difference(odd: Linear, readers: list[Linear]) -> Refuse:
    """Why ``odd`` merges with none of the others."""
    other = next(r for r in readers if r.node is not odd.node)
    facts = [
        ("dtypes", ir.dtype(odd.weight), ir.dtype(other.weight)),
        ("devices", ir.val(odd.weight).device, ir.val(other.weight).device),
        ("kinds of layer", odd.layout, other.layout),
    ]
    if odd.node.meta.get("region") != other.node.meta.get("region"):
        return Refuse("the layers belong to different checkpointed regions", odd.node)
    for what, a, b in facts:
        if a != b:
            return Refuse(f"the layers have different {what}: {a} and {b}", odd.node)
    return Refuse("the layers differ in more than their output features", odd.node)


def _site_key(members: list[Linear], taken: set[str]) -> str:
    names = [(ir.module_path(m.node) or m.node.name).split(".") for m in members]
    common = 0
    while all(len(n) > common + 1 and n[common] == names[0][common] for n in names):
        common += 1
    inner = "+".join(".".join(n[common:]) for n in names)
    key = ".".join([*names[0][:common], f"({inner})" if common else inner])
    unique, n = key, 1
    while unique in taken:
        unique, n = f"{key}#{n}", n + 1
    taken.add(unique)
    return unique


def _shape_text(linear: Linear) -> str:
    return f"{cost.hint(linear.in_features)}→{cost.hint(linear.out_features)}"


# ---------------------------------------------------------------------------------------------
# The commit


def _merge(members: list[Linear], builder: WeightBuilder, known: dict[Any, Any]) -> None:
    first = members[0]
    graph = first.node.graph
    weight = builder.emit(aten.cat.default, [m.weight for m in members], first.out_dim)
    bias = None
    if any(m.bias is not None for m in members):
        biases = [m.bias if m.bias is not None else _zeros(m, builder) for m in members]
        bias = builder.emit(aten.cat.default, biases, -1)
    # the first op may have been written without a bias: copy it, then give it one
    with graph.inserting_before(first.node):
        merged = graph.node_copy(first.node)
    merged.meta.pop("mutated", None)
    layer = match_linear(merged)  # its input may be what an earlier merge put in place
    assert layer is not None
    merged = layer.rebuild(weight=weight, bias=bias)
    offset = 0
    changed: list[fx.Node] = []
    for m in members:
        width = ir.shape(m.weight)[m.out_dim]
        with graph.inserting_after(m.node):
            part = ir.emit(
                graph,
                aten.slice.Tensor,
                merged,
                m.feature_out,
                offset,
                offset + width,
                like=m.node,
            )
        offset += width
        changed.append(part)
        ir.replace(m.node, part)
    refresh_layouts(changed, known)


def _zeros(linear: Linear, builder: WeightBuilder) -> fx.Node:
    shape = ir.shape(linear.weight)
    size = [shape[linear.out_dim]]
    if linear.layout in ("bmm", "baddbmm"):
        size = [shape[0], 1, *size]
    return builder.emit(aten.new_zeros.default, linear.weight, size)


def refresh_layouts(changed: Sequence[fx.Node], known: dict[Any, Any]) -> None:
    """Recompute fake values behind nodes whose strides have changed, as far as strides change.

    A ``view`` that its new strides do not allow becomes a ``reshape``. ``known`` remembers values
    by op and operands' layouts: the blocks of a model are mostly alike.
    """
    queue = [u for n in changed for u in n.users]
    heapq.heapify(queue)
    done: set[fx.Node] = set()
    while queue:
        node = heapq.heappop(queue)
        if node in done or node.op != "call_function" or is_weight(node):
            continue
        done.add(node)
        if not isinstance(node.target, torch._ops.OpOverload):
            if node.target is not operator.getitem:
                continue
        before = _strides(node)
        key = _layout_key(node)
        if key is not None and key in known:
            node.meta["val"] = known[key]
            node.meta.pop("tensor_meta", None)
        else:
            _recompute(node)
            key = _layout_key(node)  # its op may have changed
            if key is not None:
                known[key] = ir.val(node)
        if _strides(node) != before:
            for user in node.users:
                heapq.heappush(queue, user)


def _recompute(node: fx.Node) -> None:
    try:
        ir.set_val(node)
    except (RuntimeError, ValueError):
        if not ir.is_call(node, aten.view.default, aten._unsafe_view.default):
            raise
        node.target = aten.reshape.default
        ir.set_val(node)


def _layout_key(node: fx.Node) -> Any:
    """What the fake value of ``node`` depends on; ``None`` with symbolic sizes."""

    if not isinstance(node.target, torch._ops.OpOverload) or not ir.is_tensor(node):
        return None
    return ir.value_key(node.target, node.args, node.kwargs)


def _strides(node: fx.Node) -> Any:
    value = ir.val(node)
    if isinstance(value, (list, tuple)):
        return [tuple(v.stride()) for v in value if isinstance(v, torch.Tensor)]
    return tuple(value.stride()) if isinstance(value, torch.Tensor) else None
