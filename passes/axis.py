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
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from . import ir
from .axis_base import (
    ADDS,
    SPLITS,
    Axis,
    Links,
    carries,
    constant_along,
    dropout_is_active,
    is_dropout,
    is_zeros,
    packets,
    through_reshape,
)
from .axis_rules import RULES, Back, Fore

aten = torch.ops.aten

__all__ = [
    "ADDS",
    "SPLITS",
    "Axis",
    "Links",
    "channel_scale",
    "constant_along",
    "dropout_is_active",
    "is_dropout",
    "is_inert",
    "is_zeros",
    "operands",
    "reads_metadata_only",
    "result_axis",
    "through_reshape",
    "users",
]


def _lookup(node: Any) -> tuple[Back, Fore] | None:
    if node.op != "call_function":
        return None
    packet = getattr(node.target, "overloadpacket", node.target)
    try:
        return RULES.get(packet)
    except TypeError:  # an unhashable target
        return None


def operands(node: Any, axis: Axis) -> Links | None:
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


def result_axis(node: Any, operand: fx.Node, axis: Axis) -> Axis | None:
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


def _flat_args(node: Any) -> Iterator[Any]:
    source = node.args[0] if node.target is operator.getitem else node
    for a in (*source.args, *source.kwargs.values()):
        if isinstance(a, (list, tuple)):
            yield from a
        else:
            yield a


def channel_scale(
    node: Any, axis: Axis, memo: dict[fx.Node, bool]
) -> tuple[fx.Node, fx.Node] | None:
    """``(value, scale)`` if ``node`` multiplies a value by one weight per feature (LayerScale).

    ``memo`` is that of :func:`ir.is_weight_expr`.
    """
    if not ir.is_call(node, aten.mul) or len(node.args) < 2:
        return None
    for x, s in (node.args[:2], node.args[1::-1]):
        if not (carries(x, axis, node) and carries(s, axis, node)) or not ir.is_weight_expr(
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
    packets(
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
