"""Facts about means: which weights, writers and streams are zero-mean by construction.

Structural only: a ``normfuse::center`` in a weight or on an activation, a LayerNorm without affine,
and what keeps a zero mean. Values are never looked at.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from . import ir
from .axis import Axis, is_zeros, operands
from .linear import Linear
from .residual import Stream, Writer

nf = torch.ops.normfuse


def weight_is_centered(node: Any, axis: Axis) -> bool:
    """True if a weight expression is zero-mean along ``axis`` by construction.

    Looks through casts, row scalings and shape ops for a ``normfuse::center``.
    """
    seen = 0
    stack: list[tuple[Any, Axis]] = [(node, axis)]
    while stack:
        cur, at = stack.pop()
        seen += 1
        if seen > 1000:
            return False
        if not isinstance(cur, fx.Node):
            return False
        if is_zeros(cur):
            continue
        if ir.is_call(cur, nf.center):
            dims: Any = cur.args[1]
            if at.whole and tuple(dims) == at.dims:
                continue
            return False
        links = operands(cur, at) if cur.op == "call_function" else None
        if links is None:
            return False
        stack.extend(links)
    return True


def writer_is_centered(writer: Writer, known: set[fx.Node] | None = None) -> bool:
    """True if the writer's result is zero-mean along the stream's features by construction.

    Args:
        known: norm nodes whose input is known to be zero-mean (for RMSNorms without affine).
    """
    if writer.gates:
        return False
    axis = writer.source_axis
    source: Any = writer.source
    if writer.kind in ("zeros",):
        return True
    if writer.kind == "weight":
        return weight_is_centered(writer.node, axis)
    if writer.kind == "embedding":
        return axis.whole and weight_is_centered(source.args[0], Axis((-1,)))
    if writer.kind == "center":
        return axis.whole and tuple(source.args[1]) == axis.dims
    if writer.kind == "norm":
        return _norm_is_centered(writer.source, axis, known or set())
    if writer.linear is not None:
        found = linear_out_axis(writer.linear, axis)
        if found is None:
            return False
        bias = writer.linear.bias
        return weight_is_centered(writer.linear.weight, found) and (
            bias is None or weight_is_centered(bias, Axis((-1,), axis.outer, axis.inner))
        )
    return False


def _norm_is_centered(node: Any, axis: Axis, known: set[fx.Node]) -> bool:
    norm = node.args[0] if node.target is operator.getitem else node
    if ir.is_call(norm, nf.gated_rms_norm, nf.seed_norm, nf.crms_norm):
        return False
    args = ir.NormArgs(norm)
    if args.bias is not None or not axis.whole or tuple(args.dims) != axis.dims:
        return False
    gain = args.gain
    if gain is not None and not all(
        -d > len(ir.shape(gain)) or ir.same_dim(ir.shape(gain)[d], 1) for d in axis.dims
    ):
        return False
    return ir.is_call(norm, nf.layer_norm, nf.add_layer_norm) or norm in known


def linear_out_axis(linear: Linear, axis: Axis) -> Axis | None:
    """Where a stream's features live in the weight of the linear that writes it.

    ``None`` if the layer's output features cannot be mixed by changing its weight alone (grouped
    convolutions: each group sees other inputs).
    """
    if axis.dims != (linear.feature_out,) or linear.groups != 1:
        return None
    return Axis((linear.out_dim,), axis.outer, axis.inner)


def centered_writers(found: list[Stream]) -> set[Writer]:
    """The writers of ``found`` that are zero-mean along their stream's features by construction."""
    result: set[Writer] = set()
    known: set[fx.Node] = set()
    for stream in found:
        result.update(w for w in stream.writers if writer_is_centered(w, known))
        if result.issuperset(stream.writers):
            known.update(r.node for r in stream.norms)
    return result


def centered_streams(found: list[Stream]) -> list[bool]:
    """For each stream, whether it is zero-mean along its features by construction."""
    writers = centered_writers(found)
    return [writers.issuperset(s.writers) for s in found]
