"""Who reads a value feature by feature, and whether a factor or a shift can move into its readers.

A value ``g ⊙ n + b`` flows through ops that treat all features alike (``axis.py``) to its readers.
The factor ``g`` may move into a reader that is a linear layer of these features. The shift ``b``
may move too if everything on the way maps constants to themselves and the layer adds no zeros
around its input.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import ir
from .axis import (
    Axis,
    dropout_is_active,
    is_dropout,
    is_inert,
    operands,
    reads_metadata_only,
    result_axis,
    users,
)
from .errors import Refuse
from .linear import Linear, is_weight, leaf_of, match_features, table_user
from .weight_builder import WeightBuilder

aten = torch.ops.aten


@dataclass(frozen=True)
class Reading:
    """A linear layer that reads the value.

    Attributes:
        linear: the layer.
        axis: where the features are in its input.
        path: the transparent ops between, in order.
        changes_shift: the first of them that does not map constants to themselves, if any.
    """

    linear: Linear
    axis: Axis
    path: tuple[fx.Node, ...]
    changes_shift: fx.Node | None


@dataclass(frozen=True)
class Blocked:
    """A reader through which nothing can move, and why."""

    node: fx.Node
    reason: str


def _packets(names: str) -> tuple:
    return tuple(getattr(aten, n) for n in names.split() if hasattr(aten, n))


#: Transparent ops that map a constant (per feature) to the same constant.
_KEEP_SHIFT = (
    torch.ops.prims.convert_element_type,
    *_packets(
        "to _to_copy type_as clone contiguous alias detach view reshape _unsafe_view flatten unflatten "
        "squeeze unsqueeze view_as permute transpose t swapaxes swapdims mT movedim expand expand_as "
        "broadcast_to slice narrow index_select roll flip repeat tile repeat_interleave select mean "
        "index _unsafe_index adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
        "_adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d"
    ),
)
_PERMUTES = _packets("permute transpose t swapaxes swapdims mT movedim")


def keeps_shift(node: fx.Node) -> bool:
    """True if the op maps a constant per feature to the same constant."""
    if node.target is operator.getitem:  # of a split
        return True
    if is_dropout(node):
        return not dropout_is_active(node)
    if ir.is_call(node, *_packets("pad")):
        mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
        return mode != "constant"
    return ir.is_call(node, *_KEEP_SHIFT)


def follow_readers(value: fx.Node, axis: Axis) -> tuple[list[Reading], list[Blocked]]:
    """All readers of ``value`` through ops that treat the features along ``axis`` alike."""
    readings: list[Reading] = []
    blocked: list[Blocked] = []
    seen: set[fx.Node] = set()
    stack: list[tuple[fx.Node, Axis, tuple[fx.Node, ...], fx.Node | None]] = [
        (value, axis, (), None)
    ]
    while stack:
        at, where, path, shift = stack.pop()
        for user in dict.fromkeys(users(at)):
            if user.op == "output":
                reason = "is an output of the model" + (" (seen through views)" if path else "")
                blocked.append(Blocked(at, reason))
                continue
            if reads_metadata_only(user) or is_inert(user):
                continue
            linear = match_features(user, where.dims)
            if linear is not None:
                problem = _why_not(linear, at, where)
                if problem is None:
                    readings.append(Reading(linear, where, path, shift))
                else:
                    blocked.append(Blocked(user, problem))
                continue
            found = _through(user, at, where)
            if found is None:
                blocked.append(Blocked(user, _why_not_through(user, at)))
            elif user not in seen:
                seen.add(user)
                changed = shift or (None if keeps_shift(user) else user)
                stack.append((user, found, (*path, user), changed))
    return readings, blocked


def _why_not_through(user: fx.Node, value: fx.Node) -> str:
    others = [leaf_of(a) for a in user.all_input_nodes if a is not value]
    if any("nonfinite" in leaf.meta for leaf in others):
        return f"multiplies by a weight that {ir.why_no_weight(*others)}"
    return "is not a linear layer of these features"


def _why_not(linear: Linear, value: fx.Node, axis: Axis) -> str | None:
    if linear.input is not value or value in (linear.weight, linear.bias):
        return "reads it as a weight or bias, not as its input"
    if axis.dims != (linear.feature_in,):
        return f"is a linear layer along another dim than the features ({axis})"
    if not is_weight(linear.weight):
        return f"multiplies by a matrix that {ir.why_no_weight(linear.weight)}"
    return None


def _through(user: fx.Node, value: fx.Node, axis: Axis) -> Axis | None:
    """The axis behind ``user`` if it applies one linear map to every feature of ``value`` alone."""
    if not ir.is_tensor(user) or user.meta.get("mutated"):
        return None
    if is_dropout(user) and dropout_is_active(user):
        return axis if ir.is_call(user, aten.dropout) else None
    if len(axis.dims) > 1 and ir.is_call(user, *_PERMUTES):
        # the features must keep their order
        moved = [result_axis(user, value, Axis((d,))) for d in axis.dims]
        dims = [m.dims[0] for m in moved if m is not None]
        if len(dims) < len(axis.dims) or dims != sorted(dims):
            return None
    found = result_axis(user, value, axis)
    if found is None:
        return None
    links = operands(user, found)
    return found if links is not None and len(links) == 1 else None


def feature_axis(value: fx.Node, tensors: Iterable[fx.Node | None], dims: Iterable[int]) -> Axis:
    """The dims of ``value`` along which ``tensors`` (broadcast against it) vary.

    ``dims`` are taken where they do not vary at all. Gaps are filled, so that the features are
    neighbours in memory order.

    Raises:
        Refuse: one of the dims has no static size.
    """
    vary = {
        i - len(ir.shape(t))
        for t in tensors
        if t is not None
        for i, size in enumerate(ir.shape(t))
        if not ir.same_dim(size, 1)
    } or set(dims)
    axis = Axis(tuple(range(min(vary), max(vary) + 1)))
    if not all(isinstance(ir.shape(value)[d], int) for d in axis.dims):
        raise Refuse(f"the features (dims {list(axis.dims)}) have no static size", value)
    return axis


def check_readers(
    value: fx.Node, axis: Axis, *, gain: bool, shift: bool, copy_tied: bool
) -> list[Reading]:
    """The linear readers of ``value`` if all its readers can take a factor and a shift.

    Args:
        gain, shift: what is to move.
        copy_tied: accept heads whose weight is also an embedding table (a copy is made).

    Raises:
        Refuse: naming the reader that cannot.
    """
    readings, blocked = follow_readers(value, axis)
    if blocked:
        first = blocked[0]
        more = f" (and {len(blocked) - 1} more)" if len(blocked) > 1 else ""
        if first.node is value:
            raise Refuse(f"its result {first.reason}{more}", first.node)
        raise Refuse(f"one of its readers{more} {first.reason}", first.node)
    for r in readings:
        node = r.linear.node
        if shift:
            if r.linear.pads:
                raise Refuse(
                    "a reader pads its input with zeros, so a shift of the input is no shift of "
                    "the result",
                    node,
                )
            if r.linear.layout == "scaled_linear":
                raise Refuse("a reader multiplies its rows before it adds its bias", node)
            if r.linear.layout == "grouped_mm":
                raise Refuse("a reader picks a matrix per row, so the shift differs by row", node)
            if r.changes_shift is not None:
                raise Refuse("an op before a reader does not keep the shift", r.changes_shift)
            if r.linear.bias is not None and not is_weight(r.linear.bias):
                raise Refuse(f"the bias of a reader {ir.why_no_weight(r.linear.bias)}", node)
        table = table_user(r.linear.weight)
        if table is not None and not copy_tied:
            raise Refuse(
                "a reader's weight is tied to an embedding and would have to be copied "
                f"({'×'.join(map(str, ir.shape(r.linear.weight)))}); ask with "
                "copy_tied=True",
                node,
            )
    return readings


def fold_into_readers(
    builder: WeightBuilder,
    readings: Iterable[Reading],
    vector: Callable[[fx.Node], fx.Node],
    gain: fx.Node | float | None,
    shift: fx.Node | None,
) -> None:
    """Put ``gain`` and ``shift`` into the weights and biases of ``readings``.

    ``vector`` turns either into a vector over the value's features (numbers stay numbers).
    """
    for r in readings:

        def at(tensor: Any, axis: Axis = r.axis) -> Any:
            if not isinstance(tensor, fx.Node):
                return tensor
            return builder.tile(vector(tensor), axis.outer, axis.inner)

        weight, bias = builder.fold_in(r.linear, at(gain), at(shift))
        r.linear.rebuild(weight=weight, bias=bias)
