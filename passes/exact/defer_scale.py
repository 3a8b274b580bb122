"""DeferScale: the row scale of a norm moves behind the linear layers that read it.

``W (x·r) + b = (W x)·r + b`` with ``r = rsqrt(mean(x²) + eps)`` (FlashNorm, 2024, section 2): the
normed activation is never written. The scale multiplies *before* the bias is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .. import cost, ir
from ..axis import Axis, dropout_is_active, is_dropout, result_axis
from ..contract import Context, Pass, PassResult, register
from ..errors import Refuse
from ..readers import Reading, check_readers
from ..weight_builder import WeightBuilder

if TYPE_CHECKING:
    import sympy

aten = torch.ops.aten
nf = torch.ops.normfuse

_LAST = Axis((-1,))
_FLOAT16_MAX = torch.finfo(torch.float16).max


def _packets(names: str) -> tuple:
    return tuple(getattr(aten, n) for n in names.split() if hasattr(aten, n))


#: ops on the way that change values' dtype or layout only; the moved product does without
_COPIES = (
    torch.ops.prims.convert_element_type,
    *_packets("to _to_copy type_as clone contiguous alias"),
)
#: ops that treat rows alike whatever their width: applied to the input and to its scale as they are
_ROW_OPS = _packets(
    "flatten unsqueeze squeeze permute transpose swapaxes swapdims movedim slice narrow select "
    "index_select index _unsafe_index flip roll detach"
)
#: ops that spell the shape of their result
_RESHAPES = _packets("view reshape _unsafe_view")


@register
class DeferScale(Pass):
    """``rms_norm`` then linear becomes ``normfuse::scaled_linear``; all readers of a norm or none.

    Args:
        float16_bound: a bound on the entries of ``x Wᵀ`` before scaling, for float16 products,
            which overflow at 65504 (measure it with ``normfuse.calibrate``). Without it float16
            products are refused.
    """

    name = "defer_scale"
    promise = "exact"

    def __init__(self, *, float16_bound: float | None = None) -> None:
        super().__init__(float16_bound=float16_bound)
        self.float16_bound = float16_bound

    @classmethod
    def identity(cls) -> Sequence[tuple[sympy.Matrix, sympy.Matrix]]:
        """RMSNorm before a layer against the scaled layer."""
        import sympy

        d, k = 3, 2
        eps = sympy.Symbol("epsilon", positive=True)
        w = sympy.Matrix(k, d, sympy.symbols(f"w:{d * k}", real=True))
        b = sympy.Matrix(k, 1, sympy.symbols(f"b:{k}", real=True))
        x = sympy.Matrix(d, 1, sympy.symbols(f"x:{d}", real=True))
        r = 1 / sympy.sqrt((x.T * x)[0] / d + eps)
        return [(w * (x * r) + b, (w * x) * r + b)]

    def run(self, gm: fx.GraphModule, context: Context) -> PassResult:
        result = PassResult()
        builder = WeightBuilder(gm.graph, context)
        for node in ir.norm_nodes(gm):
            key = node.meta["site"]

            def plan(node: fx.Node = node) -> Callable[[], None]:
                return self._plan(node, context, builder)

            saved = 2.0 * cost.nbytes(node) if ir.is_tensor(node) else 0.0
            if self.attempt(context, result, key, plan):
                result.savings[key] = (saved, 0.0)
        return result

    def _plan(self, node: fx.Node, context: Context, builder: WeightBuilder) -> Callable[[], None]:
        if ir.is_call(node, nf.layer_norm, nf.add_layer_norm):
            raise Refuse("a LayerNorm subtracts the mean; turn it into RMSNorm first", node)
        if not ir.is_call(node, nf.rms_norm):
            raise Refuse("only a plain RMSNorm is one scale per row", node)
        args = ir.NormArgs(node)
        if args.gain is not None or args.bias is not None:
            raise Refuse("the norm has a gain or a bias; fold them into its readers first", node)
        if list(args.dims) != [-1]:
            raise Refuse(f"normalizes over dims {list(args.dims)}, not the last one", node)
        stat = args.stat_dtype or ir.dtype(args.x)
        if stat == torch.float16:
            raise Refuse("the statistic is computed in float16, where squares overflow", node)
        readings = check_readers(node, _LAST, gain=True, shift=False, copy_tied=True)
        if not readings:
            raise Refuse("nobody reads the normed result", node)
        for r in readings:
            self._check(node, r)
        if context.policy == "pays":
            _must_pay(node, args.x, readings, context)
        return lambda: _commit(node, args, readings, builder)

    def _check(self, norm: fx.Node, r: Reading) -> None:
        linear = r.linear
        if linear.layout not in ("linear", "addmm", "mm", "matmul") or linear.stacked:
            raise Refuse(
                f"a reader is a {linear.layout}, which takes no scale per row", linear.node
            )
        if r.axis != _LAST:
            raise Refuse("a reader takes the rows in pieces", linear.node)
        region = norm.meta.get("region")
        if region is not None and linear.node.meta.get("region") != region:
            raise Refuse(
                "a reader is outside the checkpointed region of the norm, whose result is what is "
                "kept between them",
                linear.node,
            )
        at, axis = norm, _LAST
        for op in r.path:
            found = result_axis(op, at, axis)
            if found != _LAST or not (
                ir.is_call(op, *_COPIES, *_ROW_OPS, *_RESHAPES)
                or (is_dropout(op) and not dropout_is_active(op))
            ):
                raise Refuse("the row scale cannot follow an op before a reader", op)
            if ir.is_call(op, aten.squeeze.default):
                raise Refuse("a squeeze without dims would drop the scale's own dim", op)
            at = op
        if ir.dtype(linear.input) == torch.float16:
            bound = self.float16_bound
            if bound is None:
                raise Refuse(
                    "the product of the un-normalized input may overflow float16 (65504); give a "
                    "bound on it with DeferScale(float16_bound=…)",
                    linear.node,
                )
            if bound > _FLOAT16_MAX / 2:
                raise Refuse(
                    f"products of up to {bound:g} (float16_bound) are too close to float16's "
                    f"largest number {_FLOAT16_MAX:g}",
                    linear.node,
                )


def _must_pay(norm: fx.Node, x: fx.Node, readings: list[Reading], context: Context) -> None:
    """Compare what the normed activation costs with what scaling the results costs."""
    if context.training:
        raise Refuse(
            "does not pay in training: the unscaled products would be saved for the gradient of "
            "the scale",
            norm,
        )
    rows, limit = cost.rows(x), cost.defer_rows(context.device)
    if limit is not None and rows > limit:
        raise Refuse(
            f"does not pay: {rows} rows; on {context.device} scaling the products instead of their "
            f"input is faster only up to {limit} rows",
            norm,
        )
    saved = cost.nbytes(norm)
    if any(ir.dtype(r.linear.input) != ir.dtype(x) for r in readings):
        saved = 0  # a cast of the input is written instead
    unfused = [r.linear.node for r in readings if not _feeds_pointwise(r.linear.node)]
    extra = sum(2 * cost.nbytes(n) for n in unfused)
    if extra >= saved:
        why = "its input has another dtype than its readers, so a cast would be written instead"
        if saved:
            why = f"{cost.text(extra)} of results would be read and written once more to be scaled"
        raise Refuse(
            f"does not pay: {why}, to spare {cost.text(saved)} of normed activations",
            unfused[0] if unfused else norm,
        )


_LAYOUT_OPS = (
    *_COPIES,
    *_RESHAPES,
    *_ROW_OPS,
    *_packets("t expand unflatten split chunk split_with_sizes"),
)


def _feeds_pointwise(node: fx.Node, depth: int = 6) -> bool:
    """True if everything that reads ``node`` is pointwise, so that a scale fuses into it."""
    if not node.users or depth == 0:
        return False
    for user in node.users:
        if user.op != "call_function":
            return False
        if ir.is_call(user, *_LAYOUT_OPS) or not isinstance(user.target, torch._ops.OpOverload):
            if not _feeds_pointwise(user, depth - 1):
                return False
        elif torch.Tag.pointwise not in user.target.tags:
            return False
    return True


@dataclass
class _Moved:
    """What stands for a value of the path: the un-normalized input and its row scale."""

    x: fx.Node
    scale: fx.Node


def _commit(norm: fx.Node, args: Any, readings: list[Reading], builder: WeightBuilder) -> None:
    graph = norm.graph
    with graph.inserting_before(norm):
        scale = ir.emit(
            graph,
            nf.row_rstd.default,
            args.x,
            [-1],
            args.eps,
            like=norm,
            floor=args.floor,
            stat_dtype=args.stat_dtype or ir.dtype(args.x),
        )
        ir.inherit(scale, norm, site=True)
    moved: dict[fx.Node, _Moved] = {norm: _Moved(args.x, scale)}
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for r in readings:
        at = norm
        for op in r.path:
            if op not in moved:
                moved[op] = _follow(op, moved[at])
            at = op
        linear, here = r.linear, moved[at]
        dtype = ir.dtype(linear.input)
        x = here.x
        if ir.dtype(x) != dtype:
            if (x, dtype) not in casts:
                with graph.inserting_before(linear.node):
                    casts[x, dtype] = ir.emit(graph, aten.to.dtype, x, dtype, like=norm)
            x = casts[x, dtype]
        weight = linear.weight
        if linear.in_dim == -2:
            weight = builder.emit(aten.t.default, weight)
        node = linear.node
        node.kwargs = {"out_dtype": ir.dtype(node)}
        node.target = nf.scaled_linear.default
        node.args = (x, weight, here.scale, linear.bias)
        for op in reversed(r.path):
            if not op.users:  # an idle dropout counts as impure: nobody else would remove it
                graph.erase_node(op)


def _follow(op: fx.Node, moved: _Moved) -> _Moved:
    """``op`` applied to the un-normalized input and to its scale instead of to their product."""
    if ir.is_call(op, *_COPIES) or is_dropout(op):
        return moved
    graph = op.graph

    def emit(target: Any, operand: fx.Node, *rest: Any, **kwargs: Any) -> fx.Node:
        return ir.emit(graph, target, operand, *rest, like=op, **kwargs)

    with graph.inserting_before(op):
        if ir.is_call(op, *_RESHAPES):
            sizes: list[Any] = list(op.args[1])  # type: ignore[arg-type]
            narrow = [*sizes[:-1], 1]
            return _Moved(
                emit(aten.reshape.default, moved.x, sizes),
                emit(aten.reshape.default, moved.scale, narrow),
            )
        rest, kwargs = op.args[1:], op.kwargs
        return _Moved(
            emit(op.target, moved.x, *rest, **kwargs),
            emit(op.target, moved.scale, *rest, **kwargs),
        )
