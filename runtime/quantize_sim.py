"""Simulated low-bit linears: what W4A4 would cost, without any low-bit kernel.

Every linear layer of a captured graph gets weights rounded per output channel and inputs rounded per
token, both symmetric and dynamic (the scale is the largest magnitude over ``2^(bits−1) − 1``). The
arithmetic stays in floating point, which is what such simulations do in the literature; biases,
norms, embeddings and attention products are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx

from ..passes import ir
from ..passes.errors import NormfuseError
from ..passes.linear import Linear, match_linear
from ..passes.snapshot import copy_graph

aten = torch.ops.aten


def fake_quantize(x: Tensor, bits: int, dims: Sequence[int]) -> Tensor:
    """``x`` rounded to ``2^bits − 1`` evenly spaced levels, symmetric around zero.

    Args:
        x: any floating tensor; computed in float32 (float64 stays) and returned in its dtype.
        bits: 2 to 16.
        dims: dims that share one scale.

    An all-zero group stays zero; a non-finite entry makes its group non-finite.
    """
    if not isinstance(bits, int) or not 2 <= bits <= 16:
        raise NormfuseError(f"bits must be a whole number from 2 to 16, got {bits!r}")
    wide = x if x.dtype == torch.float64 else x.float()
    top = 2 ** (bits - 1) - 1
    step = wide.abs().amax(tuple(dims), keepdim=True) / top
    step = torch.where(step == 0, torch.ones_like(step), step)
    return ((wide / step).round().clamp(-top, top) * step).to(x.dtype)


def quantize_linears(
    gm: fx.GraphModule,
    weight_bits: int | None = 4,
    activation_bits: int | None = 4,
    skip: Iterable[str] = (),
) -> fx.GraphModule:
    """A copy of a captured graph whose linear layers are simulated at low precision.

    Args:
        gm: from ``passes.capture``; shares its parameters with the result.
        weight_bits, activation_bits: ``None`` leaves weights or inputs as they are.
        skip: regular expressions searched in the layers' module paths (``["lm_head"]``).

    The result's ``meta["quantized"]`` lists the layers' module paths.
    """
    patterns = [re.compile(p) for p in skip]
    new = fx.GraphModule(gm, copy_graph(gm.graph))
    new.meta = {**gm.meta, "quantized": []}
    done: dict[tuple[fx.Node, tuple[int, ...], int], fx.Node] = {}
    for node in list(new.graph.nodes):
        linear = match_linear(node)
        if linear is None or not ir.is_weight_expr(linear.weight):
            continue
        path = ir.module_path(node)
        if any(p.search(path) for p in patterns):
            continue
        changes = {}
        if activation_bits is not None:
            dims = (linear.feature_in,)
            changes["input"] = _rounded(new, linear.input, activation_bits, dims, done, node)
        if weight_bits is not None:
            shared = _weight_dims(linear)
            changes["weight"] = _rounded(new, linear.weight, weight_bits, shared, done, node)
        linear.rebuild(**changes)
        new.meta["quantized"].append(path)
    if not new.meta["quantized"]:
        raise NormfuseError("the graph has no linear layer to quantize")
    ir.stable_sort(new.graph)
    ir.check(new)
    new.recompile()
    return new


def _weight_dims(linear: Linear) -> tuple[int, ...]:
    """The weight's dims that one output channel spans."""
    if "conv" in linear.layout:
        rank = len(ir.shape(linear.weight))
        return tuple(d for d in range(-rank, 0) if d != linear.out_dim)
    return (linear.in_dim,)


def _rounded(
    gm: fx.GraphModule,
    x: fx.Node,
    bits: int,
    dims: tuple[int, ...],
    done: dict[tuple[fx.Node, tuple[int, ...], int], fx.Node],
    before: fx.Node,
) -> fx.Node:
    """The rounded value of ``x``; readers of one value share it."""
    key = (x, dims, bits)
    if key not in done:
        with gm.graph.inserting_before(before):
            done[key] = gm.graph.call_function(fake_quantize, (x, bits, dims))
        ir.inherit(done[key], before)
        ir.set_val(done[key])
    return done[key]
