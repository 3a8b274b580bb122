"""Following a feature axis through a graph: which ops act on every feature alike.

A residual stream is a family of values that share one feature axis. An op belongs *inside* a
stream when it applies one linear map to every feature slice, ``f(x)[…, i] = L(x[…, i])`` with the
same ``L`` for all features ``i`` (adds, casts, reshapes, token slices, row scalings, pooling over
tokens…). Such ops commute with everything that mixes features only, in particular with removing
the mean along the features and with dropping a feature.

Axes are kept as negative dims, so that broadcasting needs no care.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import ir

aten = torch.ops.aten
prims = torch.ops.prims
nf = torch.ops.normfuse

Links = list[tuple[fx.Node, "Axis"]]


@dataclass(frozen=True)
class Axis:
    """Where the features of a value live.

    Attributes:
        dims: the dims (negative, ascending) that hold the features.
        outer, inner: for a single dim of size ``outer·n·inner``: the features are the middle
            factor (a head's channels inside ``heads·head_dim`` have ``outer = heads``).
    """

    dims: tuple[int, ...]
    outer: int = 1
    inner: int = 1

    @property
    def whole(self) -> bool:
        """True if the features are exactly the dims."""
        return self.outer == 1 and self.inner == 1

    def size(self, shape: Sequence) -> Any:
        n: Any = 1
        for d in self.dims:
            n = n * shape[d]
        return n if self.whole else n // (self.outer * self.inner)

    def fits(self, shape: Sequence) -> bool:
        return -self.dims[0] <= len(shape)

    def __str__(self) -> str:
        dims = ",".join(map(str, self.dims))
        return f"dim {dims}" + ("" if self.whole else f" ({self.outer}·n·{self.inner})")


def _product(sizes: Sequence) -> Any:
    n: Any = 1
    for s in sizes:
        n = n * s
    return n


def _exact_ratio(a: Any, b: Any) -> int | None:
    """``a / b`` if it is statically a whole number, else ``None``; never adds a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    return 1 if ir.same_dim(a, b) else None


def through_reshape(source: Sequence, target: Sequence, axis: Axis) -> Axis | None:
    """The axis after a row-major reshape from ``source`` to ``target``; ``None`` if it breaks up."""
    dims = axis.dims
    if list(dims) != list(range(dims[0], dims[0] + len(dims))):
        return axis if ir.same_shape(source, target) else None
    n = axis.size(source)
    stride = _product(source[dims[-1] + 1 :] if dims[-1] < -1 else ()) * axis.inner
    right: Any = 1
    rank = len(target)
    for d in range(-1, -rank - 1, -1):
        inner = _exact_ratio(stride, right)
        outer = _exact_ratio(right * target[d], stride * n)
        if inner is not None and outer is not None:
            return Axis((d,), outer, inner)
        if inner == 1:
            # the features may fill several whole dims
            run: Any = 1
            for e in range(d, -rank - 1, -1):
                run = run * target[e]
                if _exact_ratio(run, n) == 1:
                    return Axis(tuple(range(e, d + 1)))
        right = right * target[d]
    return None


# ---------------------------------------------------------------------------------------------
# Rules: how one op carries an axis from its operands to its result and back.
#
# back(node, axis of the result) -> [(operand, its axis)] or None if the op is not transparent
# fore(node, operand, its axis)  -> axis of the result or None; checked against ``back``

Back = Callable[[fx.Node, Axis], "Links | None"]
Fore = Callable[[fx.Node, fx.Node, Axis], "Axis | None"]
_RULES: dict[Any, tuple[Back, Fore]] = {}


def _rule(back: Back, fore: Fore, *packets: Any) -> None:
    for packet in packets:
        _RULES[packet] = (back, fore)


def _same(node: fx.Node, operand: fx.Node, axis: Axis) -> Axis | None:
    return axis


def _packets(*names: str) -> list[Any]:
    return [getattr(aten, n) for n in names if hasattr(aten, n)]


def _is_float(node: Any) -> bool:
    return ir.is_tensor(node) and ir.dtype(node).is_floating_point


def _arg(node: fx.Node, i: int, name: str, default: Any = None) -> Any:
    if i < len(node.args):
        return node.args[i]
    return node.kwargs.get(name, default)


def _carries(operand: Any, axis: Axis, like: fx.Node) -> bool:
    """True if ``operand`` has the full features of ``like`` (not broadcast along them)."""
    if not _is_float(operand) or not axis.fits(ir.shape(operand)):
        return False
    shape, full = ir.shape(operand), ir.shape(like)
    return all(ir.same_dim(shape[d], full[d]) for d in axis.dims)


def constant_along(operand: Any, axis: Axis) -> bool:
    """True if ``operand`` (number or tensor) has one value for all features of a row."""
    if not isinstance(operand, fx.Node):
        return isinstance(operand, (int, float))
    if not ir.is_tensor(operand):
        return True  # a symbolic number
    shape = ir.shape(operand)
    return all(-d > len(shape) or ir.same_dim(shape[d], 1) for d in axis.dims)


# -- elementwise


def _back_unary(node: fx.Node, axis: Axis) -> Links | None:
    x = node.args[0]
    if not _is_float(x) or not _is_float(node) or not ir.same_shape(ir.shape(x), ir.shape(node)):
        return None
    return [(x, axis)]


_rule(
    _back_unary,
    _same,
    *_packets(
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


def dropout_is_active(node: fx.Node) -> bool:
    """True if a dropout node changes its input (p > 0 in training mode)."""
    p, train = _arg(node, 1, "p"), _arg(node, 2, "train")
    return bool(train) and not (isinstance(p, (int, float)) and p == 0)


def is_dropout(node: Any) -> bool:
    return ir.is_call(node, *DROPOUTS)


DROPOUTS = tuple(_packets("dropout", "native_dropout", "feature_dropout"))


def _back_dropout(node: fx.Node, axis: Axis) -> Links | None:
    return None if dropout_is_active(node) else _back_unary(node, axis)


_rule(_back_dropout, _same, *_packets("dropout", "feature_dropout"))


def _back_scale(node: fx.Node, axis: Axis) -> Links | None:
    """``x·s`` or ``x/s`` where ``s`` is a number or constant along the features."""
    if len(node.args) < 2 or "rounding_mode" in node.kwargs:
        return None
    a, b = node.args[:2]
    if _carries(a, axis, node) and constant_along(b, axis):
        return [(a, axis)]
    if ir.is_call(node, aten.mul) and _carries(b, axis, node) and constant_along(a, axis):
        return [(b, axis)]
    return None


_rule(_back_scale, _same, *_packets("mul", "div", "multiply", "divide", "true_divide"))


def _back_add(node: fx.Node, axis: Axis) -> Links | None:
    a, b = node.args[:2]
    if not (_carries(a, axis, node) and _carries(b, axis, node)):
        return None
    return [(a, axis), (b, axis)]


ADDS = tuple(_packets("add", "sub", "subtract"))
_rule(_back_add, _same, *ADDS)


def _back_masked_fill(node: fx.Node, axis: Axis) -> Links | None:
    x, mask, value = node.args[:3]
    if value != 0 or not _carries(x, axis, node) or not constant_along(mask, axis):
        return None
    return [(x, axis)]


_rule(_back_masked_fill, _same, *_packets("masked_fill"))


def _back_where(node: fx.Node, axis: Axis) -> Links | None:
    if len(node.args) < 3 or not constant_along(node.args[0], axis):
        return None
    a, b = node.args[1:3]
    links = [(t, axis) for t in (a, b) if _carries(t, axis, node)]
    rest = [t for t in (a, b) if not _carries(t, axis, node)]
    return links if links and all(_is_zero(t) for t in rest) else None


def _is_zero(t: Any) -> bool:
    return t == 0 if isinstance(t, (int, float)) else is_zeros(t)


def is_zeros(node: Any) -> bool:
    """True if ``node`` makes a tensor of zeros."""
    if ir.is_call(node, *_packets("zeros", "zeros_like", "new_zeros")):
        return True
    if ir.is_call(node, *_packets("full", "full_like", "new_full")):
        value = node.args[1] if not ir.is_call(node, aten.new_full) else node.args[2]
        return value == 0
    return ir.is_call(node, aten.scalar_tensor) and node.args[0] == 0


_rule(_back_where, _same, *_packets("where"))

# -- shapes


def _back_reshape(node: fx.Node, axis: Axis) -> Links | None:
    x = node.args[0]
    if not _is_float(x):
        return None
    found = through_reshape(ir.shape(node), ir.shape(x), axis)
    return None if found is None else [(x, found)]


def _fore_reshape(node: fx.Node, operand: fx.Node, axis: Axis) -> Axis | None:
    return through_reshape(ir.shape(operand), ir.shape(node), axis)


_rule(
    _back_reshape,
    _fore_reshape,
    *_packets(
        "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"
    ),
)


def _permutation(node: fx.Node) -> list[int] | None:
    """Negative source dim of each result dim, by ascending result dim."""
    rank = len(ir.shape(node))
    dims = list(range(rank))
    if ir.is_call(node, aten.permute):
        dims = [d % rank for d in node.args[1]]
    elif ir.is_call(node, aten.t):
        dims = dims[::-1]
    elif ir.is_call(node, *_packets("transpose", "swapaxes", "swapdims")):
        if len(node.args) < 3 or not all(isinstance(d, int) for d in node.args[1:3]):
            return None
        a, b = (d % rank for d in node.args[1:3])
        dims[a], dims[b] = dims[b], dims[a]
    elif ir.is_call(node, *_packets("mT")):
        dims[-2:] = dims[:-3:-1]
    elif ir.is_call(node, *_packets("movedim")):
        source, target = node.args[1:3]
        source = [source] if isinstance(source, int) else list(source)
        target = [target] if isinstance(target, int) else list(target)
        order: list[int | None] = [None] * rank
        for s, t in zip(source, target, strict=True):
            order[t % rank] = s % rank
        rest = iter(d for d in range(rank) if d not in {s % rank for s in source})
        dims = [next(rest) if d is None else d for d in order]
    return [d - rank for d in dims]


def _back_permute(node: fx.Node, axis: Axis) -> Links | None:
    source = _permutation(node)
    if source is None or (len(axis.dims) > 1 and not axis.whole):
        return None
    dims = tuple(sorted(source[d] for d in axis.dims))
    return [(node.args[0], Axis(dims, axis.outer, axis.inner))]


def _fore_permute(node: fx.Node, operand: fx.Node, axis: Axis) -> Axis | None:
    source = _permutation(node)
    if source is None:
        return None
    rank = len(source)
    dims = tuple(sorted(source.index(d) - rank for d in axis.dims))
    return Axis(dims, axis.outer, axis.inner)


_rule(
    _back_permute,
    _fore_permute,
    *_packets("permute", "transpose", "t", "swapaxes", "swapdims", "mT", "movedim"),
)


def _back_expand(node: fx.Node, axis: Axis) -> Links | None:
    x = node.args[0]
    return [(x, axis)] if _carries(x, axis, node) else None


_rule(_back_expand, _same, *_packets("expand", "expand_as", "broadcast_to"))

# -- ops that act along dims which must not be the features


def _acted(node: fx.Node) -> set[int] | None:
    """Negative dims (of the input) that a dim-wise op touches; ``None`` if unknown."""
    x = node.args[0]
    rank = len(ir.shape(x))
    if ir.is_call(node, aten.constant_pad_nd) or ir.is_call(node, *_packets("pad")):
        pads = list(node.args[1])
        return {-1 - i // 2 for i, p in enumerate(pads) if not ir.same_dim(p, 0)}
    if ir.is_call(node, *_packets("repeat", "tile")):
        counts = list(node.args[1])
        return {i - len(counts) for i, c in enumerate(counts) if not ir.same_dim(c, 1)}
    index = 2 if ir.is_call(node, *_packets("roll", "split", "chunk", "split_with_sizes")) else 1
    if ir.is_call(node, *_packets("repeat_interleave")):
        index = 2
    default: Any = 0
    if ir.is_call(node, *_packets("mean", "sum", "roll", "flip", "repeat_interleave")):
        default = None
    dims = _arg(node, index, "dim" if "dim" in _names(node) else "dims", default)
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return None
    dims = [dims] if isinstance(dims, int) else list(dims)
    return {d % rank - rank for d in dims}


def _names(node: fx.Node) -> set[str]:
    return {a.name for a in node.target._schema.arguments}


def _back_along(node: fx.Node, axis: Axis) -> Links | None:
    x = node.args[0]
    if not _is_float(x) or not _carries(x, axis, node):
        return None
    acted = _acted(node)
    if acted is None or acted & set(axis.dims):
        return None
    if ir.is_call(node, aten.constant_pad_nd) and _arg(node, 2, "value", 0) != 0:
        return None
    if ir.is_call(node, *_packets("pad")):
        if _arg(node, 2, "mode", "constant") == "constant" and (_arg(node, 3, "value") or 0) != 0:
            return None
    return [(x, axis)]


_rule(
    _back_along,
    _same,
    *_packets(
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


def _removed(node: fx.Node) -> set[int] | None:
    """Dims of the input that a select or a reduction removes."""
    acted = _acted(node)
    if acted is None:
        return None
    if ir.is_call(node, aten.mean, aten.sum) and _arg(node, 2, "keepdim", False):
        return set()
    return acted


def _back_reduce(node: fx.Node, axis: Axis) -> Links | None:
    x = node.args[0]
    removed = _removed(node) if _is_float(x) and _is_float(node) else None
    if removed is None:
        return None
    found = _restore_dims(axis, removed, len(ir.shape(x)))
    return None if (_acted(node) or set()) & set(found.dims) else [(x, found)]


def _fore_reduce(node: fx.Node, operand: fx.Node, axis: Axis) -> Axis | None:
    removed = _removed(node)
    if removed is None or removed & set(axis.dims):
        return None
    return _drop_dims(axis, removed)


_rule(_back_reduce, _fore_reduce, *_packets("select", "mean", "sum"))


def _back_cat(node: fx.Node, axis: Axis) -> Links | None:
    dim = _arg(node, 1, "dim", 0)
    rank = len(ir.shape(node))
    if dim % rank - rank in axis.dims:
        return None
    parts = [t for t in node.args[0] if len(ir.shape(t)) == rank]
    if len(parts) != len(node.args[0]) or not all(_carries(t, axis, node) for t in parts):
        return None
    return [(t, axis) for t in parts]


_rule(_back_cat, _same, *_packets("cat", "concat", "concatenate"))


def _stacked(node: fx.Node) -> set[int]:
    rank = len(ir.shape(node))
    return {_arg(node, 1, "dim", 0) % rank - rank}


def _back_stack(node: fx.Node, axis: Axis) -> Links | None:
    added = _stacked(node)
    if added & set(axis.dims) or not all(_is_float(t) for t in node.args[0]):
        return None
    found = _drop_dims(axis, added)
    return [(t, found) for t in node.args[0]]


def _fore_stack(node: fx.Node, operand: fx.Node, axis: Axis) -> Axis | None:
    return _restore_dims(axis, _stacked(node), len(ir.shape(node)))


_rule(_back_stack, _fore_stack, *_packets("stack"))

SPLITS = tuple(
    _packets("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "tensor_split")
)


def _split_dims(getitem: fx.Node) -> set[int]:
    split = getitem.args[0]
    rank = len(ir.shape(split.args[0]))
    if ir.is_call(split, aten.unbind):
        return {_arg(split, 1, "dim", 0) % rank - rank}
    return {_arg(split, 2, "dim", 0) % rank - rank}


def _back_getitem(node: fx.Node, axis: Axis) -> Links | None:
    split = node.args[0]
    if not ir.is_call(split, *SPLITS) or not _is_float(split.args[0]):
        return None
    x, acted = split.args[0], _split_dims(node)
    if ir.is_call(split, aten.unbind):
        axis = _restore_dims(axis, acted, len(ir.shape(x)))
    return None if acted & set(axis.dims) else [(x, axis)]


def _fore_getitem(node: fx.Node, operand: fx.Node, axis: Axis) -> Axis | None:
    split, acted = node.args[0], _split_dims(node)
    if acted & set(axis.dims):
        return None
    return _drop_dims(axis, acted) if ir.is_call(split, aten.unbind) else axis


_RULES[operator.getitem] = (_back_getitem, _fore_getitem)


def _back_index(node: fx.Node, axis: Axis) -> Links | None:
    """``x[idx, …]`` where every indexed dim lies left of the features."""
    x, indices = node.args[0], node.args[1]
    if not _is_float(x):
        return None
    rank = len(ir.shape(x))
    last = max((i for i, t in enumerate(indices) if t is not None), default=-1)
    if last - rank >= axis.dims[0] or not axis.fits(ir.shape(x)):
        return None
    if any(ir.is_tensor(t) and ir.dtype(t) == torch.bool and len(ir.shape(t)) > 1 for t in indices):
        return None
    return [(x, axis)]


_rule(_back_index, _same, *_packets("index", "_unsafe_index"))


def _back_index_add(node: fx.Node, axis: Axis) -> Links | None:
    x, dim, _, source = node.args[:4]
    rank = len(ir.shape(x))
    if dim % rank - rank in axis.dims or not _carries(source, axis, node):
        return None
    return [(x, axis), (source, axis)]


_rule(_back_index_add, _same, *_packets("index_add"))


def _back_pool(node: fx.Node, axis: Axis) -> Links | None:
    """Average pools and linear interpolation: channels are features, space is mixed."""
    x = node.args[0]
    spatial = 1 if "1d" in str(node.target) else 2
    spatial = 3 if "3d" in str(node.target) else spatial
    if not _carries(x, axis, node) or any(d >= -spatial for d in axis.dims):
        return None
    return [(x, axis)]


_rule(
    _back_pool,
    _same,
    *_packets(
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


def _back_mix(node: fx.Node, axis: Axis) -> Links | None:
    """``A @ x`` with features in ``x``'s last dim: rows are mixed, features are not."""
    if axis.dims != (-1,) or len(node.args) != 2:
        return None
    a, x = node.args
    if a is x or not _carries(x, axis, node) or len(ir.shape(x)) < 2:
        return None
    return [(x, axis)]


_rule(_back_mix, _same, *_packets("matmul", "bmm"))


# ---------------------------------------------------------------------------------------------
# The interface


def _lookup(node: fx.Node) -> tuple[Back, Fore] | None:
    if node.op != "call_function":
        return None
    packet = getattr(node.target, "overloadpacket", node.target)
    try:
        return _RULES.get(packet)
    except TypeError:  # an unhashable target
        return None


def operands(node: fx.Node, axis: Axis) -> Links | None:
    """Operands of ``node`` that carry the features of its result, with their axes.

    ``None`` if the op is not transparent to the features (it is then a writer of its result).
    """
    rule = _lookup(node)
    if rule is None:
        return None
    links = rule[0](node, axis)
    if links is None:
        return None
    n = axis.size(ir.shape(node))
    for operand, found in links:
        shape = ir.shape(operand)
        if not found.fits(shape) or not ir.same_dim(found.size(shape), n):
            return None
    return links


def result_axis(node: fx.Node, operand: fx.Node, axis: Axis) -> Axis | None:
    """The axis of ``node``'s result if ``operand``'s features pass through it, else ``None``."""
    rule = _lookup(node)
    if rule is None or not ir.is_tensor(node):
        return None
    found = rule[1](node, operand, axis)
    if found is None or not found.fits(ir.shape(node)):
        return None
    links = operands(node, found)
    if links is None or (operand, axis) not in links:
        return None
    # x + x passes, x · x does not
    uses = sum(1 for a in _flat_args(node) if a is operand)
    return found if uses == sum(1 for o, _ in links if o is operand) else None


def _flat_args(node: fx.Node) -> Iterator[Any]:
    source = node.args[0] if node.target is operator.getitem else node
    for a in (*source.args, *source.kwargs.values()):
        if isinstance(a, (list, tuple)):
            yield from a
        else:
            yield a


def channel_scale(
    node: fx.Node, axis: Axis, memo: dict[fx.Node, bool]
) -> tuple[fx.Node, fx.Node] | None:
    """``(value, scale)`` if ``node`` multiplies a value by one weight per feature (LayerScale).

    ``memo`` is that of :func:`ir.is_weight_expr`.
    """
    if not ir.is_call(node, aten.mul) or len(node.args) < 2:
        return None
    for x, s in (node.args[:2], node.args[1::-1]):
        if not (_carries(x, axis, node) and _carries(s, axis, node)) or not ir.is_weight_expr(
            s, memo
        ):
            continue
        if ir.is_weight_expr(x, memo):
            continue
        shape = ir.shape(s)
        rest = (k for i, k in enumerate(shape) if i - len(shape) not in axis.dims)
        if all(ir.same_dim(k, 1) for k in rest):
            return x, s
    return None


_METADATA = tuple(
    _packets(
        "sym_size",
        "sym_stride",
        "sym_numel",
        "sym_storage_offset",
        "size",
        "_assert_tensor_metadata",
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
    )
)


def reads_metadata_only(node: fx.Node) -> bool:
    """True if ``node`` looks at a tensor's shape and dtype but not at its values."""
    return ir.is_call(node, *_METADATA)


def is_inert(node: fx.Node, depth: int = 4) -> bool:
    """True if nothing but shapes is ever read from ``node``'s result (dead code included)."""
    if depth == 0 or not ir.is_pure(node):
        return False
    return all(reads_metadata_only(u) or is_inert(u, depth - 1) for u in node.users)


def users(node: fx.Node) -> Iterator[fx.Node]:
    """Users of a value; a split stands for its parts."""
    for user in node.users:
        if ir.is_call(user, *SPLITS):
            yield from user.users
        else:
            yield user
