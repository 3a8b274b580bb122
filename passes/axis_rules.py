"""The table of ops that act on every feature alike: how each carries the feature axis."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from . import ir
from .axis_base import (
    ADDS,
    SPLITS,
    Axis,
    Links,
    arg,
    carries,
    constant_along,
    dropout_is_active,
    is_float,
    is_zero,
    packets,
    through_reshape,
)

aten = torch.ops.aten
prims = torch.ops.prims
nf = torch.ops.normfuse

# ---------------------------------------------------------------------------------------------
# Rules: how one op carries an axis from its operands to its result and back.
#
# back(node, axis of the result) -> [(operand, its axis)] or None if the op is not transparent
# fore(node, operand, its axis)  -> axis of the result or None; checked against ``back``

Back = Callable[[fx.Node, Axis], "Links | None"]
Fore = Callable[[fx.Node, fx.Node, Axis], "Axis | None"]
RULES: dict[Any, tuple[Back, Fore]] = {}


def _rule(back: Back, fore: Fore, *packets: Any) -> None:
    for packet in packets:
        RULES[packet] = (back, fore)


def _same(node: Any, operand: Any, axis: Axis) -> Axis | None:
    return axis


# -- elementwise


def _back_unary(node: Any, axis: Axis) -> Links | None:
    x = node.args[0]
    if not is_float(x) or not is_float(node) or not ir.same_shape(ir.shape(x), ir.shape(node)):
        return None
    return [(x, axis)]


_rule(
    _back_unary,
    _same,
    *packets(
        "to",
        "_to_copy",
        "type_as",
        "clone",
        "contiguous",
        "alias",
        "detach",
        "neg",
        "positive",
    ),
    prims.convert_element_type,
)


def _back_dropout(node: Any, axis: Axis) -> Links | None:
    return None if dropout_is_active(node) else _back_unary(node, axis)


_rule(_back_dropout, _same, *packets("dropout", "feature_dropout"))


def _back_scale(node: Any, axis: Axis) -> Links | None:
    """``x·s`` or ``x/s`` where ``s`` is a number or constant along the features."""
    if len(node.args) < 2 or "rounding_mode" in node.kwargs:
        return None
    a, b = node.args[:2]
    if carries(a, axis, node) and constant_along(b, axis):
        return [(a, axis)]
    if ir.is_call(node, aten.mul) and carries(b, axis, node) and constant_along(a, axis):
        return [(b, axis)]
    return None


_rule(_back_scale, _same, *packets("mul", "div", "multiply", "divide", "true_divide"))


def _back_add(node: Any, axis: Axis) -> Links | None:
    a, b = node.args[:2]
    if not (carries(a, axis, node) and carries(b, axis, node)):
        return None
    return [(a, axis), (b, axis)]


_rule(_back_add, _same, *ADDS)


def _back_masked_fill(node: Any, axis: Axis) -> Links | None:
    x, mask, value = node.args[:3]
    if value != 0 or not carries(x, axis, node) or not constant_along(mask, axis):
        return None
    return [(x, axis)]


_rule(_back_masked_fill, _same, *packets("masked_fill"))


def _back_where(node: Any, axis: Axis) -> Links | None:
    if len(node.args) < 3 or not constant_along(node.args[0], axis):
        return None
    a, b = node.args[1:3]
    links = [(t, axis) for t in (a, b) if carries(t, axis, node)]
    rest = [t for t in (a, b) if not carries(t, axis, node)]
    return links if links and all(is_zero(t) for t in rest) else None


_rule(_back_where, _same, *packets("where"))

# -- shapes


def _back_reshape(node: Any, axis: Axis) -> Links | None:
    x = node.args[0]
    if not is_float(x):
        return None
    found = through_reshape(ir.shape(node), ir.shape(x), axis)
    return None if found is None else [(x, found)]


def _fore_reshape(node: Any, operand: Any, axis: Axis) -> Axis | None:
    return through_reshape(ir.shape(operand), ir.shape(node), axis)


_rule(
    _back_reshape,
    _fore_reshape,
    *packets(
        "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"
    ),
)


def _permutation(node: Any) -> list[int] | None:
    """Negative source dim of each result dim, by ascending result dim."""
    rank = len(ir.shape(node))
    dims = list(range(rank))
    if ir.is_call(node, aten.permute):
        dims = [d % rank for d in node.args[1]]
    elif ir.is_call(node, aten.t):
        dims = dims[::-1]
    elif ir.is_call(node, *packets("transpose", "swapaxes", "swapdims")):
        if len(node.args) < 3 or not all(isinstance(d, int) for d in node.args[1:3]):
            return None
        a, b = (d % rank for d in node.args[1:3])
        dims[a], dims[b] = dims[b], dims[a]
    elif ir.is_call(node, *packets("mT")):
        dims[-2:] = dims[:-3:-1]
    elif ir.is_call(node, *packets("movedim")):
        source, target = node.args[1:3]
        source = [source] if isinstance(source, int) else list(source)
        target = [target] if isinstance(target, int) else list(target)
        order: list[int | None] = [None] * rank
        for s, t in zip(source, target, strict=True):
            order[t % rank] = s % rank
        rest = iter(d for d in range(rank) if d not in {s % rank for s in source})
        dims = [next(rest) if d is None else d for d in order]
    return [d - rank for d in dims]


def _back_permute(node: Any, axis: Axis) -> Links | None:
    source = _permutation(node)
    if source is None:
        return None
    dims = tuple(source[d] for d in axis.dims)
    # several feature dims must keep their order, or the features would be renumbered
    return [(node.args[0], Axis(dims, axis.outer, axis.inner))] if _ascends(dims) else None


def _fore_permute(node: Any, operand: Any, axis: Axis) -> Axis | None:
    source = _permutation(node)
    if source is None:
        return None
    rank = len(source)
    dims = tuple(source.index(d) - rank for d in axis.dims)
    return Axis(dims, axis.outer, axis.inner) if _ascends(dims) else None


def _ascends(dims: tuple[int, ...]) -> bool:
    return list(dims) == sorted(dims)


_rule(
    _back_permute,
    _fore_permute,
    *packets("permute", "transpose", "t", "swapaxes", "swapdims", "mT", "movedim"),
)


def _back_expand(node: Any, axis: Axis) -> Links | None:
    x = node.args[0]
    return [(x, axis)] if carries(x, axis, node) else None


_rule(_back_expand, _same, *packets("expand", "expand_as", "broadcast_to"))

# -- ops that act along dims which must not be the features


def _acted(node: Any) -> set[int] | None:
    """Negative dims (of the input) that a dim-wise op touches; ``None`` if unknown."""
    x = node.args[0]
    rank = len(ir.shape(x))
    if ir.is_call(node, aten.constant_pad_nd) or ir.is_call(node, *packets("pad")):
        pads = list(node.args[1])
        return {-1 - i // 2 for i, p in enumerate(pads) if not ir.same_dim(p, 0)}
    if ir.is_call(node, *packets("repeat", "tile")):
        counts = list(node.args[1])
        return {i - len(counts) for i, c in enumerate(counts) if not ir.same_dim(c, 1)}
    index = 2 if ir.is_call(node, *packets("roll", "split", "chunk", "split_with_sizes")) else 1
    if ir.is_call(node, *packets("repeat_interleave")):
        index = 2
    default: Any = 0
    if ir.is_call(node, *packets("mean", "sum", "roll", "flip", "repeat_interleave")):
        default = None
    dims = arg(node, index, "dim" if "dim" in _names(node) else "dims", default)
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return None
    dims = [dims] if isinstance(dims, int) else list(dims)
    return {d % rank - rank for d in dims}


def _names(node: Any) -> set[str]:
    return {a.name for a in node.target._schema.arguments}


def _back_along(node: Any, axis: Axis) -> Links | None:
    x = node.args[0]
    if not is_float(x) or not carries(x, axis, node):
        return None
    acted = _acted(node)
    if acted is None or acted & set(axis.dims):
        return None
    if ir.is_call(node, aten.constant_pad_nd) and arg(node, 2, "value", 0) != 0:
        return None
    if ir.is_call(node, *packets("pad")):
        if arg(node, 2, "mode", "constant") == "constant" and (arg(node, 3, "value") or 0) != 0:
            return None
    return [(x, axis)]


_rule(
    _back_along,
    _same,
    *packets(
        "slice",
        "narrow",
        "index_select",
        "roll",
        "flip",
        "cumsum",
        "constant_pad_nd",
        "pad",
        "repeat",
        "tile",
        "repeat_interleave",
    ),
)


def _drop_dims(axis: Axis, dropped: set[int]) -> Axis:
    """Result axis when the (negative) dims ``dropped`` disappear."""
    dims = tuple(d + sum(1 for k in dropped if k > d) for d in axis.dims)
    return Axis(dims, axis.outer, axis.inner)


def _restore_dims(axis: Axis, dropped: set[int], rank: int) -> Axis:
    """Inverse of :func:`_drop_dims`; ``rank`` is that of the input."""
    kept = [d for d in range(-rank, 0) if d not in dropped]
    return Axis(tuple(kept[d] for d in axis.dims), axis.outer, axis.inner)


def _removed(node: Any) -> set[int] | None:
    """Dims of the input that a select or a reduction removes."""
    acted = _acted(node)
    if acted is None:
        return None
    if ir.is_call(node, aten.mean, aten.sum) and arg(node, 2, "keepdim", False):
        return set()
    return acted


def _back_reduce(node: Any, axis: Axis) -> Links | None:
    x = node.args[0]
    removed = _removed(node) if is_float(x) and is_float(node) else None
    if removed is None:
        return None
    found = _restore_dims(axis, removed, len(ir.shape(x)))
    return None if (_acted(node) or set()) & set(found.dims) else [(x, found)]


def _fore_reduce(node: Any, operand: Any, axis: Axis) -> Axis | None:
    removed = _removed(node)
    if removed is None or removed & set(axis.dims):
        return None
    return _drop_dims(axis, removed)


_rule(_back_reduce, _fore_reduce, *packets("select", "mean", "sum"))


def _back_cat(node: Any, axis: Axis) -> Links | None:
    dim = arg(node, 1, "dim", 0)
    rank = len(ir.shape(node))
    if dim % rank - rank in axis.dims:
        return None
    parts = [t for t in node.args[0] if len(ir.shape(t)) == rank]
    if len(parts) != len(node.args[0]) or not all(carries(t, axis, node) for t in parts):
        return None
    return [(t, axis) for t in parts]


_rule(_back_cat, _same, *packets("cat", "concat", "concatenate"))


def _stacked(node: Any) -> set[int]:
    rank = len(ir.shape(node))
    return {arg(node, 1, "dim", 0) % rank - rank}


def _back_stack(node: Any, axis: Axis) -> Links | None:
    added = _stacked(node)
    if added & set(axis.dims) or not all(is_float(t) for t in node.args[0]):
        return None
    found = _drop_dims(axis, added)
    return [(t, found) for t in node.args[0]]


def _fore_stack(node: Any, operand: Any, axis: Axis) -> Axis | None:
    return _restore_dims(axis, _stacked(node), len(ir.shape(node)))


_rule(_back_stack, _fore_stack, *packets("stack"))


def _split_dims(getitem: Any) -> set[int]:
    split = getitem.args[0]
    rank = len(ir.shape(split.args[0]))
    if ir.is_call(split, aten.unbind):
        return {arg(split, 1, "dim", 0) % rank - rank}
    return {arg(split, 2, "dim", 0) % rank - rank}


def _back_getitem(node: Any, axis: Axis) -> Links | None:
    split = node.args[0]
    if not ir.is_call(split, *SPLITS) or not is_float(split.args[0]):
        return None
    x, acted = split.args[0], _split_dims(node)
    if ir.is_call(split, aten.unbind):
        axis = _restore_dims(axis, acted, len(ir.shape(x)))
    return None if acted & set(axis.dims) else [(x, axis)]


def _fore_getitem(node: Any, operand: Any, axis: Axis) -> Axis | None:
    split, acted = node.args[0], _split_dims(node)
    if acted & set(axis.dims):
        return None
    return _drop_dims(axis, acted) if ir.is_call(split, aten.unbind) else axis


RULES[operator.getitem] = (_back_getitem, _fore_getitem)


def _back_index(node: Any, axis: Axis) -> Links | None:
    """``x[idx, …]`` where every indexed dim lies left of the features."""
    x, indices = node.args[0], node.args[1]
    if not is_float(x):
        return None
    rank = len(ir.shape(x))
    last = max((i for i, t in enumerate(indices) if t is not None), default=-1)
    if last - rank >= axis.dims[0] or not axis.fits(ir.shape(x)):
        return None
    if any(ir.is_tensor(t) and ir.dtype(t) == torch.bool and len(ir.shape(t)) > 1 for t in indices):
        return None
    return [(x, axis)]


_rule(_back_index, _same, *packets("index", "_unsafe_index"))


def _back_index_add(node: Any, axis: Axis) -> Links | None:
    x, dim, _, source = node.args[:4]
    rank = len(ir.shape(x))
    if dim % rank - rank in axis.dims or not carries(source, axis, node):
        return None
    return [(x, axis), (source, axis)]


_rule(_back_index_add, _same, *packets("index_add"))


def _back_pool(node: Any, axis: Axis) -> Links | None:
    """Average pools and linear interpolation: channels are features, space is mixed."""
    x = node.args[0]
    spatial = 1 if "1d" in str(node.target) else 2
    spatial = 3 if "3d" in str(node.target) else spatial
    if not carries(x, axis, node) or any(d >= -spatial for d in axis.dims):
        return None
    return [(x, axis)]


_rule(
    _back_pool,
    _same,
    *packets(
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "_adaptive_avg_pool2d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
    ),
)


def _back_mix(node: Any, axis: Axis) -> Links | None:
    """``A @ x`` with features in ``x``'s last dim: rows are mixed, features are not."""
    if axis.dims != (-1,) or len(node.args) != 2:
        return None
    a, x = node.args
    if a is x or not carries(x, axis, node) or len(ir.shape(x)) < 2:
        return None
    return [(x, axis)]


_rule(_back_mix, _same, *packets("matmul", "bmm", "mm"))


def _back_center(node: Any, axis: Axis) -> Links | None:
    """Removing a mean along other dims."""
    x = node.args[0]
    return None if set(node.args[1]) & set(axis.dims) else [(x, axis)]


_rule(_back_center, _same, nf.center)
