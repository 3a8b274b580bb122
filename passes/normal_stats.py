"""Rules of the normal form for statistics, and for PyTorch's own norms."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from . import ir
from .normal_facts import (
    FLAW_CLAMP,
    FLAW_UNBIASED,
    Fact,
    Norm,
    Root,
    Square,
    Stat,
    _short,
    settled,
    widens,
)
from .normal_form import NormalForm, rule
from .ops import _opmath

aten = torch.ops.aten

# ---------------------------------------------------------------------------------------------
# Statistics


def _reduced(form: NormalForm, node: fx.Node, name: str, p: float) -> Fact | None:
    args = ir.bind(node)
    x, dims, keep, to = args["self"], args.get("dim"), args.get("keepdim", False), args["dtype"]
    v, fact = form.value(x), form.fact(x)
    if isinstance(fact, Square):
        stat = form.stat(node, fact.v, 2, dims, keep, f"{name}({fact.text})")
        flaw = fact.flaw
        if ir.dtype(node) != fact.dtype or fact.dtype != fact.v.dtype:
            flaw = flaw or (
                f"x² is rounded to {_short(fact.dtype)} before it is averaged in "
                f"{_short(ir.dtype(node))}"
            )
        return replace(stat, c=fact.c, p=p, flaw=flaw)
    if v is None:
        return None
    if to is not None and to != v.dtype:
        if not widens(v.dtype, to):
            return None
        v = replace(v, dtype=to, center=None)
    return replace(form.stat(node, v, 1, dims, keep, f"{name}({v.text})"), p=p)


@rule(aten.mean)
def _mean(form: NormalForm, node: fx.Node) -> Fact | None:
    return _reduced(form, node, "mean", -1.0)


@rule(aten.sum)
def _sum(form: NormalForm, node: fx.Node) -> Fact | None:
    return _reduced(form, node, "sum", 0.0)


def _variance(form: NormalForm, node: fx.Node, name: str) -> tuple[Stat, Stat] | None:
    """Variance and mean of the argument, as ``var`` and its kin compute them."""
    args = ir.bind(node)
    v = form.value(args["self"])
    if v is None:
        return None
    if "correction" in args:
        correction = 1 if args["correction"] is None else args["correction"]
    else:
        correction = 1 if args["unbiased"] else 0
    dims, keep = args.get("dim"), args.get("keepdim", False)
    mean = replace(form.stat(node, v, 1, dims, keep, f"mean({v.text})"), p=-1.0)
    variance = form.stat(
        node, form.centered(v, mean.dims, None), 2, dims, keep, f"{name}({v.text})"
    )
    flaw = None
    if correction == 1:
        flaw = FLAW_UNBIASED
    elif correction != 0:
        flaw = f"the variance is divided by d − {correction}, not d"
    return replace(variance, p=-1.0, wide=True, flaw=flaw), mean


@rule(aten.var)
def _var(form: NormalForm, node: fx.Node) -> Fact | None:
    both = _variance(form, node, "var")
    return both and both[0]


@rule(aten.std)
def _std(form: NormalForm, node: fx.Node) -> Fact | None:
    both = _variance(form, node, "std")
    return both and _std_root(both[0])


def _std_root(variance: Stat) -> Root:
    return Root(variance, 0.5, variance.dtype, variance.kept, variance.text)


@rule(aten.var_mean)
def _var_mean(form: NormalForm, node: fx.Node) -> Fact | None:
    return _variance(form, node, "var")


@rule(aten.std_mean)
def _std_mean(form: NormalForm, node: fx.Node) -> Fact | None:
    both = _variance(form, node, "std")
    return both and (_std_root(both[0]), both[1])


@rule(operator.getitem)
def _getitem(form: NormalForm, node: fx.Node) -> Fact | None:
    fact = form.fact(node.args[0])
    if not isinstance(fact, tuple) or not isinstance(node.args[1], int):
        return None
    part = fact[node.args[1]]
    return replace(part, core=node, end=node) if isinstance(part, Norm) else part


@rule(aten.linalg_vector_norm, aten.linalg_norm, aten.norm, aten.frobenius_norm)
def _vector_norm(form: NormalForm, node: fx.Node) -> Fact | None:
    args = ir.bind(node)
    order = args.get("ord", args.get("p", 2))
    dims = args.get("dim")
    v = form.value(args["self"])
    if v is None or order not in (None, 2, 2.0):
        return None
    count = len(dims) if isinstance(dims, (list, tuple)) and dims else len(ir.shape(args["self"]))
    if count > 1 and ir.is_call(node, aten.linalg_norm) and order is not None:
        return None  # the spectral norm
    to = args.get("dtype")
    if to is not None and to != v.dtype:
        if not widens(v.dtype, to):
            return None
        v = replace(v, dtype=to, center=None)
    stat = form.stat(node, v, 2, dims, args.get("keepdim", False), f"‖{v.text}‖")
    return Root(replace(stat, wide=True), 0.5, stat.dtype, stat.kept, f"‖{v.text}‖")


@rule(aten.linalg_vecdot)
def _vecdot(form: NormalForm, node: fx.Node) -> Fact | None:
    args = ir.bind(node)
    a, b = form.value(args["x"]), form.value(args["y"])
    if a is None or b is None or a.number != b.number or a.dtype != b.dtype:
        return None
    stat = form.stat(node, a, 2, args["dim"], False, f"{a.text}·{a.text}")
    return replace(stat, wide=True)


@rule(aten.clamp_min, aten.clamp, aten.clip, aten.maximum, aten.relu)
def _clamp(form: NormalForm, node: fx.Node) -> Fact | None:
    a = node.args[0]
    args = ir.bind(node)
    if ir.is_call(node, aten.relu):
        low: Any = 0.0
    else:
        low = args.get("min", args.get("other"))
    fact = form.fact(a)
    if not isinstance(fact, (Stat, Root)):
        a, low = low, a
        fact = form.fact(a)
    if not isinstance(fact, (Stat, Root)):
        return None
    number = form.constant(low)
    number = None if number is None else settled(number)
    bounded = None
    above = args.get("max") is not None
    if not above and number is not None and isinstance(number.value, (int, float)):
        # the bound as the op's own dtype holds it: 1e-12 is zero in float16
        bound = float(torch.tensor(number.value, dtype=ir.dtype(node)))
        bounded = _bounded_root(fact, bound) if isinstance(fact, Root) else _bounded(fact, bound)
    if bounded is not None:
        return bounded
    return replace(fact, flaw=fact.flaw or FLAW_CLAMP, text=f"max({fact.text},eps)")


def _bounded(stat: Stat, bound: float) -> Stat | None:
    """``max(stat, bound)``."""
    if stat.power != 2 or stat.c < 0 or stat.shift < 0 or stat.flaw:
        return None
    if bound <= max(stat.shift, stat.floor):
        return stat  # never smaller in the first place
    if stat.shift or not math.isfinite(bound):
        return None
    return replace(stat, floor=bound, text=f"max({stat.text},eps)")


def _bounded_root(root: Root, bound: float) -> Root | None:
    """``max(c·N^p·sqrt(stat), bound)``: the root of the bounded statistic."""
    if bound <= 0 and root.c >= 0:
        return None if _bounded(root.stat, bound) is None else root
    if root.q != 0.5 or root.c <= 0 or root.gain is not None or root.flaw:
        return None
    factor = root.c
    if root.p:
        if not isinstance(root.stat.n, int) or root.stat.n < 1:
            return None
        factor *= float(root.stat.n) ** root.p
    stat = _bounded(root.stat, (bound / factor) ** 2)
    return None if stat is None else replace(root, stat=stat, text=f"max({root.text},eps)")


# ---------------------------------------------------------------------------------------------
# PyTorch's own norms


def _native(
    node: fx.Node, kind: str, form: NormalForm, eps: float | None, text: str
) -> Norm | None:
    args = ir.bind(node)
    x, gain, bias = args["input"], args["weight"], args.get("bias")
    dtype = ir.dtype(x)
    opmath = _opmath(dtype)
    if eps is None:
        eps = float(torch.finfo(opmath).eps)
    if not isinstance(eps, (int, float)):
        return None
    v = form.value(x)
    exact = dtype == opmath
    if bias is not None:
        stage = 3 if exact else 4
    elif gain is not None:
        stage = 2 if exact else 4
    else:
        stage = 0 if exact else 1
    absorbed = gain is not None or bias is not None
    return Norm(
        kind=kind,
        x=v.node if v is not None and v.node is not None else x,
        dims=tuple(range(-len(args["normalized_shape"]), 0)),
        eps=float(eps),
        floor=False,
        stat_dtype=opmath,
        norm_dtype=opmath if absorbed or exact else dtype,
        out_dtype=dtype,
        core=node,
        end=node,
        text=text,
        gain=gain,
        bias=bias,
        stage=stage,
        native=True,
    )


@rule(aten.layer_norm)
def _layer_norm(form: NormalForm, node: fx.Node) -> Fact | None:
    return _native(node, "layer_norm", form, ir.bind(node)["eps"], "F.layer_norm")


@rule(aten.rms_norm)
def _rms_norm(form: NormalForm, node: fx.Node) -> Fact | None:
    return _native(node, "rms_norm", form, ir.bind(node)["eps"], "F.rms_norm")


@rule(aten.native_layer_norm)
def _native_layer_norm(form: NormalForm, node: fx.Node) -> Fact | None:
    norm = _native(node, "layer_norm", form, ir.bind(node)["eps"], "aten.native_layer_norm")
    return (norm, None, None)


@rule(aten._fused_rms_norm)
def _fused_rms_norm(form: NormalForm, node: fx.Node) -> Fact | None:
    norm = _native(node, "rms_norm", form, ir.bind(node)["eps"], "aten._fused_rms_norm")
    return (norm, None)
