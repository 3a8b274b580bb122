"""Elementwise rules of the normal form: the fact of one ATen call, from its arguments' facts."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from . import ir
from .normal_facts import (
    _SLICES,
    FLAW_CANCEL,
    FLAW_CLAMP,
    FLAW_ROOT_EPS,
    Fact,
    Norm,
    Number,
    Root,
    Scaled,
    Square,
    Stat,
    Value,
    _short,
    _times,
    is_cast,
    settled,
    unexpanded,
    widens,
)
from .normal_form import NormalForm, rule
from .ops import _opmath

aten = torch.ops.aten

# ---------------------------------------------------------------------------------------------
# Products


def _inverse(fact: Fact | None) -> Root | None:
    """``1/fact`` for a statistic or a root of one."""
    if isinstance(fact, Stat) and fact.power == 2:
        return Root(fact, -1.0, fact.dtype, fact.kept, f"({fact.text})")
    if isinstance(fact, Root) and fact.gain is None:
        text = fact.text if fact.q > 0 else f"({fact.text})"
        return replace(fact, q=-fact.q, c=1.0 / fact.c, p=-fact.p, text=text)
    return None


def _raised(form: NormalForm, node: fx.Node, a: fx.Node, e: float, how: str) -> Fact | None:
    """``a ** e``."""
    fact, v = form.fact(a), form.value(a)
    if e == 2.0:
        if isinstance(fact, Root) and fact.gain is None:
            return _power(fact, 2.0, f"{fact.text}²")
        return None if v is None else Square(v, 1.0, v.dtype, f"{v.text}²", mean=_mean_of(fact))
    if not isinstance(fact, (Stat, Root)) or e not in (0.5, -0.5, -1.0):
        return None
    text = f"(1/{fact.text})" if how == "1/" else f"{how}({fact.text})"
    if isinstance(fact, Stat) and fact.power == 2:
        return Root(fact, e, fact.dtype, fact.kept, text)
    if isinstance(fact, Root) and fact.gain is None:
        return _power(fact, e, text)
    return None


def _mean_of(fact: Fact | None) -> Stat | None:
    return fact if isinstance(fact, Stat) and fact.power == 1 and fact.is_mean else None


def _power(root: Root, e: float, text: str) -> Fact | None:
    if root.c < 0:
        return None
    return _collapsed(replace(root, q=root.q * e, c=root.c**e, p=root.p * e, text=text))


def _collapsed(root: Root) -> Fact | None:
    """A root to the power one is a statistic again."""
    if root.q != 1.0:
        return root if root.q in (0.5, -0.5, -1.0) else None
    return _scaled_stat(root.stat, root.c, root.p, root.text, root.flaw)


def _scaled_stat(stat: Stat, c: float, p: float, text: str, flaw: str | None) -> Stat | None:
    factor = c
    if (stat.shift or stat.floor) and p:
        if not isinstance(stat.n, int):
            return None
        factor *= float(stat.n) ** p
    return replace(
        stat,
        c=stat.c * c,
        p=stat.p + p,
        shift=stat.shift * factor,
        floor=stat.floor * factor,
        text=text,
        flaw=stat.flaw or flaw or (FLAW_CLAMP if stat.floor and c < 0 else None),
    )


def _scale(
    form: NormalForm, node: fx.Node, a: Any, number: Number, sign: int, symbol: str
) -> Fact | None:
    """``a`` times a number, or divided by it."""
    fact, v = form.fact(a), form.value(a)
    if fact is not None and getattr(fact, "dtype", None) not in (None, ir.dtype(node)):
        return None
    if isinstance(fact, Stat):
        scaled = _times(1.0, 0.0, number, fact.n, sign)
        text = f"{fact.text}{symbol}" if fact.text.endswith(")") else f"({fact.text}){symbol}"
        return None if scaled is None else _scaled_stat(fact, *scaled, text, None)
    if isinstance(fact, (Root, Scaled)):
        stat = fact.stat if isinstance(fact, Root) else fact.root.stat if fact.root else None
        scaled = _times(fact.c, fact.p, number, stat.n if stat else None, sign)
        if scaled is None:
            return None
        text = fact.text if number.value == 1 else f"{fact.text}{symbol}"
        return replace(fact, c=scaled[0], p=scaled[1], text=text)
    if isinstance(fact, Square):
        if isinstance(number.value, (torch.SymInt, torch.SymFloat)):
            return None
        return replace(fact, c=fact.c * number.value**sign)
    if isinstance(fact, Norm) or v is None or v.dtype != ir.dtype(node):
        return None
    scaled = _times(1.0, 0.0, number, None, sign)
    return None if scaled is None else Scaled(v, v.dtype, v.text, c=scaled[0], p=scaled[1])


def _relation(v: Value, stat: Stat) -> str | None:
    """Empty if ``stat`` is of ``v``; a flaw if it is of a relative of ``v``; else ``None``."""
    s = stat.v
    if s.number == v.number:
        if v.center is not None and v.center.dims != stat.dims:
            return _axes(v.center.dims, stat.dims)
        return ""
    if s.center is not None and v.center is not None:
        if s.center.x.number == v.center.x.number:
            if v.center.dims != s.center.dims:
                return _axes(v.center.dims, s.center.dims)
            return (
                f"the mean is removed in {_short(v.dtype)} but the variance is taken in "
                f"{_short(s.dtype)}"
            )
        return None
    if s.center is not None and s.center.x.number == v.number:
        return "the variance is of x − mean(x), but x itself is scaled"
    if v.center is not None and v.center.x.number == s.number:
        return "x − mean(x) is scaled by the mean square of x, not of x − mean(x)"
    if v.node is not None and s.node is not None:
        part: Any = s.node
        if part.op == "call_function" and part.target is operator.getitem:
            part = part.args[0]
        if ir.is_call(part, *_SLICES) and part.args[0] is v.node:
            return "the statistic reads only a part of the tensor it scales"
        if (is_cast(s.node) and s.node.args[0] is v.node) or (
            is_cast(v.node) and v.node.args[0] is s.node
        ):
            return (
                f"the statistic reads the tensor in {_short(s.node.meta['val'].dtype)}, "
                f"the scaling in {_short(v.node.meta['val'].dtype)}"
            )
    return None


def _related(
    form: NormalForm, v: Value, fact: Fact | None, stat: Stat
) -> tuple[Scaled, Stat, str] | None:
    """The scaled value and the statistic as functions of one tensor, and what is wrong with them.

    Either may be written with a constant factor on that tensor: ``x·rsqrt(Σ (x/√d)² + eps)``.
    """
    values = [Scaled(v, v.dtype, v.text)]
    if isinstance(fact, Scaled) and fact.root is None:
        values.append(fact)
    stats = [stat]
    inner = form.fact(stat.v.node)
    if isinstance(inner, Scaled) and inner.root is None and inner.gain is None and not inner.p:
        if inner.flaw is None and inner.dtype == stat.v.dtype:
            # the factor guards narrow dtypes against overflow: accumulate as the guard intends
            wide = stat.wide or abs(inner.c) != 1.0
            c = stat.c * inner.c**2
            stats.append(replace(stat, v=replace(inner.v, dtype=inner.dtype), c=c, wide=wide))
    best = None
    for value in values:
        for s in stats:
            flaw = _relation(value.v, s)
            if flaw == "":
                return value, s, ""
            if flaw is not None and best is None:
                best = value, s, flaw
    return best


def _axes(mean: tuple[int, ...], square: tuple[int, ...]) -> str:
    return f"the mean runs over dims {list(mean)}, the mean square over dims {list(square)}"


def _aligned(stat: Stat, kept: bool) -> bool:
    """True if the reduced tensor broadcasts back along the dims it was reduced over."""
    if kept:
        return True
    rank = len(ir.shape(stat.v.base))
    return tuple(stat.dims) == tuple(range(-rank, -rank + len(stat.dims)))


def _value_times_root(
    form: NormalForm, node: fx.Node, x: Any, root: Root, symbol: str
) -> Scaled | None:
    v, fact = form.value(x), form.fact(x)
    d = ir.dtype(node)
    if v is None:
        return None
    found = _related(form, v, fact, root.stat)
    if found is None:
        return None
    base, stat, flaw = found
    root = replace(root, stat=stat)
    if base.gain is not None and (
        root.gain is not None or form.gain_fits(base.gain, base.v.base, root.stat.dims) is None
    ):
        return None
    if not _aligned(root.stat, root.kept):
        flaw = flaw or "the statistic is broadcast along another dim than it was taken over"
    if d != root.dtype or not widens(base.dtype, d) or (base.gain and base.dtype != d):
        flaw = flaw or (
            f"the statistic is in {_short(root.dtype)}, the value in {_short(base.dtype)} and "
            f"their product in {_short(d)}"
        )
    return Scaled(
        base.v,
        d,
        f"{base.text}{symbol}{root.text}",
        root=root,
        c=base.c * root.c,
        p=base.p + root.p,
        gain=base.gain or root.gain,
        flaw=base.flaw or flaw or None,
        origin=node,
    )


def _root_times_root(node: fx.Node, a: Root, b: Root) -> Fact | None:
    if a.stat != b.stat or a.gain is not None or b.gain is not None:
        return None
    q = a.q + b.q
    text = f"{a.text}*{b.text}"
    return _collapsed(replace(a, q=q, c=a.c * b.c, p=a.p + b.p, flaw=a.flaw or b.flaw, text=text))


def _product(form: NormalForm, node: fx.Node, a: Any, b: Any) -> Fact | None:
    va, vb = form.value(a), form.value(b)
    if va is None or vb is None:
        return None
    fa, fb = form.fact(a), form.fact(b)
    if isinstance(fa, Root) and isinstance(fb, Root):
        return _root_times_root(node, fa, fb)
    for x, root in ((a, fb), (b, fa)):
        if isinstance(root, Root):
            scaled = _value_times_root(form, node, x, root, "*")
            if scaled is not None:
                return scaled
    if va.number == vb.number:
        wider = va if widens(vb.dtype, va.dtype) else vb
        return Square(wider, 1.0, ir.dtype(node), f"{va.text}²", mean=_mean_of(fa))
    for gain, x in ((a, b), (b, a)):
        fact = _times_gain(form, node, gain, x)
        if fact is not None:
            return fact
    return None


def _times_gain(form: NormalForm, node: fx.Node, gain: Any, x: fx.Node) -> Fact | None:
    gain = unexpanded(gain)
    if not form.is_weight(gain):
        return None
    fact, v = form.fact(x), form.value(x)
    d = ir.dtype(node)
    if isinstance(fact, Norm):
        fitting = form.gain_fits(gain, fact.x, fact.dims)
        if fact.stage > 1 or fitting is None or not _same_as_input(node, fact):
            return None
        return form._extend(node, x, gain=fitting, stage=2)
    if isinstance(fact, Root):
        # γ·rstd first, then the value: the same dtype throughout, only the order differs
        stat = fact.stat
        fitting = form.gain_fits(gain, stat.v.base, stat.dims)
        if fact.gain or fitting is None or d != fact.dtype:
            return None
        return replace(fact, gain=fitting, text=f"({fact.text}*γ)")
    if fact is None or (isinstance(fact, Scaled) and fact.gain is None):
        scaled = fact if isinstance(fact, Scaled) else None
        if scaled is None and v is not None:
            scaled = Scaled(v, v.dtype, v.text)
        if scaled is None or scaled.dtype != d:
            return None
        base = scaled.v.base
        every = tuple(range(-len(ir.shape(base)), 0))
        fitting = form.gain_fits(gain, base, scaled.root.stat.dims if scaled.root else every)
        if fitting is None or not ir.same_shape(ir.shape(node), ir.shape(base)):
            return None
        return replace(scaled, gain=fitting, text=f"{scaled.text}*γ")
    return None


def _same_as_input(node: fx.Node, norm: Norm) -> bool:
    return ir.same_shape(ir.shape(node), ir.shape(norm.x))


@rule(aten.mul)
def _mul(form: NormalForm, node: fx.Node) -> Fact | None:
    a, b = node.args[0], node.args[1]
    for x, other in ((a, b), (b, a)):
        number = form.constant(other)
        if number is not None:
            return _scale(form, node, x, number, 1, f"*{_name(number)}")
    return _product(form, node, a, b)


@rule(aten.div, aten.true_divide)
def _div(form: NormalForm, node: fx.Node) -> Fact | None:
    if node.kwargs.get("rounding_mode") is not None:
        return None
    a, b = node.args[0], node.args[1]
    number = form.constant(b)
    if number is not None:
        return _scale(form, node, a, number, -1, f"/{_name(number)}")
    inverse = _inverse(form.fact(b))
    if inverse is None or not _root_power(inverse):
        return None
    number = form.constant(a)
    if number is not None:
        scaled = _times(inverse.c, inverse.p, number, inverse.stat.n, 1)
        if scaled is None or ir.dtype(node) != inverse.dtype:
            return None
        text = f"({_name(number)}/{inverse.text})"
        return replace(inverse, c=scaled[0], p=scaled[1], text=text)
    fa = form.fact(a)
    if isinstance(fa, Root):
        return _root_times_root(node, fa, inverse)
    return _value_times_root(form, node, a, inverse, "/")


def _root_power(root: Root) -> bool:
    return root.q in (0.5, -0.5, -1.0)


def _name(number: Number) -> str:
    value = number.value
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _first(node: fx.Node) -> Any:
    return node.args[0]


@rule(aten.neg)
def _neg(form: NormalForm, node: fx.Node) -> Fact | None:
    return _scale(form, node, node.args[0], Number(-1.0), 1, "")


@rule(aten.square)
def _square(form: NormalForm, node: fx.Node) -> Fact | None:
    return _raised(form, node, _first(node), 2.0, "square")


@rule(aten.sqrt)
def _sqrt(form: NormalForm, node: fx.Node) -> Fact | None:
    return _raised(form, node, _first(node), 0.5, "sqrt")


@rule(aten.rsqrt)
def _rsqrt(form: NormalForm, node: fx.Node) -> Fact | None:
    return _raised(form, node, _first(node), -0.5, "rsqrt")


@rule(aten.reciprocal)
def _reciprocal(form: NormalForm, node: fx.Node) -> Fact | None:
    return _raised(form, node, _first(node), -1.0, "1/")


@rule(aten.pow)
def _pow(form: NormalForm, node: fx.Node) -> Fact | None:
    base, exponent = node.args[0], node.args[1]
    e = form.constant(exponent)
    if e is None or not isinstance(base, fx.Node) or not isinstance(e.value, (int, float)):
        return None
    if ir.dtype(node) != ir.dtype(base):
        return None
    return _raised(
        form, node, base, float(e.value), {0.5: "sqrt", -0.5: "rsqrt"}.get(e.value, "1/")
    )


@rule(aten.addcmul)
def _addcmul(form: NormalForm, node: fx.Node) -> Fact | None:
    args = ir.bind(node)
    bias = unexpanded(args["self"])
    # rounded once at the end in narrow dtypes, where the norm's affine part rounds twice
    if args["value"] != 1 or ir.dtype(node) != _opmath(ir.dtype(node)):
        return None
    for x, gain in ((args["tensor1"], args["tensor2"]), (args["tensor2"], args["tensor1"])):
        fact = form.fact(x)
        if not isinstance(fact, Norm) or fact.stage > 1 or not _same_as_input(node, fact):
            continue
        fitting = form.gain_fits(gain, fact.x, fact.dims)
        if fitting is None or not _bias_fits(form, bias, replace(fact, gain=fitting)):
            continue
        return form._extend(node, x, gain=fitting, bias=bias, stage=3)
    return None


# ---------------------------------------------------------------------------------------------
# Sums


def _bias_fits(form: NormalForm, bias: Any, norm: Norm) -> bool:
    """True if ``bias`` varies along the normalized dims alone, or just like the gain."""
    if not form.is_weight(bias):
        return False
    full, shape = ir.shape(norm.x), ir.shape(bias)
    if norm.gain is not None and ir.same_shape(shape, ir.shape(norm.gain)):
        return True
    if len(shape) > len(full):
        return False
    sizes = {i - len(shape): s for i, s in enumerate(shape)}
    varies = [d for d, s in sizes.items() if not ir.same_dim(s, 1)]
    fits = all(ir.same_dim(sizes[d], full[d]) and d in norm.dims for d in varies)
    return fits and (bool(varies) or norm.gain is None or not _varies(norm.gain))


def _varies(node: fx.Node) -> bool:
    return any(not ir.same_dim(s, 1) for s in ir.shape(node))


def _add_number(form: NormalForm, node: fx.Node, x: Any, number: Number, factor: float) -> Any:
    fact = form.fact(x)
    if isinstance(fact, Stat):
        number = settled(number)
    if isinstance(number.value, (torch.SymInt, torch.SymFloat)):
        return None
    if isinstance(fact, Stat) and fact.power == 2 and ir.dtype(node) == fact.dtype:
        shift = fact.shift + factor * number.value
        flaw = fact.flaw or (FLAW_CLAMP if fact.floor and number.value else None)
        return replace(fact, shift=shift, text=f"{fact.text}+eps", flaw=flaw)
    if isinstance(fact, Root) and number.value != 0:
        flaw = fact.flaw or FLAW_ROOT_EPS
        return replace(fact, flaw=flaw, text=f"({fact.text}+eps)")
    return None


@rule(aten.add)
def _add(form: NormalForm, node: fx.Node) -> Fact | None:
    args = ir.bind(node)
    a, b, alpha = args["self"], args["other"], args.get("alpha", 1)
    if not isinstance(alpha, (int, float)):
        return None
    number = form.constant(b)
    if number is not None:
        return _add_number(form, node, a, number, float(alpha))
    number = form.constant(a)
    if number is not None:
        return _add_number(form, node, b, number, 1.0) if alpha == 1 else None
    if alpha != 1:
        return None
    for x, other in ((a, unexpanded(b)), (b, unexpanded(a))):
        fact = form.fact(x)
        if isinstance(fact, Norm) and fact.stage <= 2 and _bias_fits(form, other, fact):
            if _same_as_input(node, fact):
                return form._extend(node, x, bias=other, stage=3)
        if isinstance(fact, Stat) and fact.power == 2 and ir.is_tensor(other):
            if ir.val(other).numel() == 1 and form.is_weight(other):
                name = other.meta.get("fqn", other.name)
                return replace(
                    fact,
                    text=f"{fact.text}+eps",
                    flaw=fact.flaw or f"eps is the tensor {name!r}, not a number",
                )
    return None


@rule(aten.sub)
def _sub(form: NormalForm, node: fx.Node) -> Fact | None:
    args = ir.bind(node)
    return _difference(form, node, args["self"], args["other"], args.get("alpha", 1))


@rule(aten.rsub)
def _rsub(form: NormalForm, node: fx.Node) -> Fact | None:
    args = ir.bind(node)
    if args.get("alpha", 1) != 1:
        return None
    return _difference(form, node, args["other"], args["self"], 1)


def _difference(form: NormalForm, node: fx.Node, a: Any, b: Any, alpha: Any) -> Fact | None:
    """``a − alpha·b``."""
    if not isinstance(alpha, (int, float)):
        return None
    number = form.constant(b)
    if number is not None:
        return _add_number(form, node, a, number, -float(alpha))
    if alpha != 1:
        return None
    fa, fb, d = form.fact(a), form.fact(b), ir.dtype(node)
    if isinstance(fa, Stat) and isinstance(fb, Square) and fb.mean is not None and fb.c == 1.0:
        first = fb.mean
        if fa.power == 2 and fa.is_mean and first.v.number == fa.v.number:
            if first.dims == fa.dims and first.kept == fa.kept:
                v = form.centered(replace(fa.v, dtype=d), fa.dims, None)
                text = f"{fa.text}-mean({fa.v.text})²"
                return replace(fa, v=v, flaw=FLAW_CANCEL, text=text)
        return None
    for x, mean, sign in ((a, fb, 1.0), (b, fa, -1.0)):
        value = form.value(x)
        if value is None or not isinstance(mean, Stat) or mean.power != 1 or not mean.is_mean:
            continue
        if mean.flaw or mean.v.number != value.number or not _aligned(mean, mean.kept):
            continue
        if mean.dtype != d or mean.v.dtype != d or not widens(value.dtype, d):
            continue
        if not ir.same_shape(ir.shape(node), ir.shape(x)):
            continue
        centered = form.centered(replace(value, dtype=d), mean.dims, node)
        if sign > 0:
            form.values[node] = centered
            return None
        return Scaled(replace(centered, node=None), d, centered.text, c=-1.0)
    return None
