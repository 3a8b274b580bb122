"""Norms and row statistics as ops, with gradients. ``kind`` is ``"rms"``, ``"layer"`` or ``"crms"``
(a zero-mean row without its last element, see ``normfuse::crms_norm``)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...passes import ops as vocabulary
from .. import devices
from ..autotune_cache import tuned
from ..derivatives import once
from ..kernels import norms as kernels
from ..kernels import plans
from . import launch as run
from .launch import ROUNDING, flat, launch, none_like, rows_of

# --- in plain torch: what the ops compute, and what runs where a kernel fails -----------------------


def normalize(
    h: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    norm_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """The vocabulary's formula, the statistic in float32."""
    casts = {"stat_dtype": torch.float32, "norm_dtype": norm_dtype, "out_dtype": out_dtype}
    if kind == "crms":
        return vocabulary.crms_norm(h, gain, bias, eps, **casts)
    formula = vocabulary.layer_norm if kind == "layer" else vocabulary.rms_norm
    return formula(h, [-1], gain, bias, eps, **casts)


def statistics(h: Tensor, eps: float, kind: str) -> Tensor:
    """``[1 or 2, rows]`` float32: rstd, then the mean (``layer``) or the sum (``crms``)."""
    h = flat(h).float()
    if kind == "layer":
        mean = h.mean(-1)
        centered = h - mean[:, None]
        rest = centered.mean(-1)
        square = (centered - rest[:, None]).square().mean(-1)
        return torch.stack([torch.rsqrt(square + eps), mean + rest])
    if kind == "crms":
        total = h.sum(-1)
        square = (h.square().sum(-1) + total.square()) / (h.shape[-1] + 1)
        return torch.stack([torch.rsqrt(square + eps), total])
    return torch.rsqrt(h.square().mean(-1) + eps)[None]


def gradient(h: Tensor, w: Tensor, stats: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """``(dh, normalized h)`` in float32 of rows ``[rows, d]``; ``w`` is the gradient times gain."""
    h, w, rstd = h.float(), w.float(), stats[0, :, None]
    if kind == "layer":
        h = (h - stats[1, :, None]) * rstd
        d = w - h * (w * h).mean(-1, keepdim=True) - w.mean(-1, keepdim=True)
    elif kind == "crms":
        h = h * rstd
        dot = (w * h).sum(-1, keepdim=True) / (h.shape[-1] + 1)
        d = w - (h + stats[1, :, None] * rstd) * dot
    else:
        h = h * rstd
        d = w - h * (w * h).mean(-1, keepdim=True)
    return d * rstd, h


def _plain(
    x: Tensor,
    residual: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    norm_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    h = x if residual is None else x + residual
    y = normalize(h, gain, bias, eps, kind, norm_dtype, out_dtype).contiguous()
    return y, h.contiguous(), statistics(h, eps, kind)


def _plain_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, _, stats = _plain(x, None, *rest)
    return y, stats


def _plain_row_rstd(x: Tensor, eps: float) -> Tensor:
    return vocabulary.row_rstd(x, [-1], eps, stat_dtype=torch.float32)


def _plain_add_row_rstd(x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    stream = (x + residual).contiguous()
    return _plain_row_rstd(stream, eps), stream


def _plain_backward(
    h: Tensor,
    dy: Tensor,
    dstream: Tensor | None,
    gain: Tensor | None,
    stats: Tensor,
    kind: str,
    has_bias: bool,
    norm_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dy = flat(dy).float()
    w = dy if gain is None else dy * gain.float()
    dx, normed = gradient(flat(h), w, stats, kind)
    if dstream is not None:
        dx = dx + flat(dstream).float()
    if norm_dtype is not None:
        normed = normed.to(norm_dtype).float()
    return (
        dx.to(h.dtype).reshape(h.shape),
        none_like(stats) if gain is None else (dy * normed).sum(0),
        dy.sum(0) if has_bias else none_like(stats),
    )


# --- forward ---------------------------------------------------------------------------------------


def _norm(
    x: Tensor,
    residual: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    norm_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
    write_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, stream, stats)``; what was not asked for is empty."""
    run.check(x, gain, bias)
    code = run.check_kind(kind)
    codes, result = run.cast_order(gain, bias, norm_dtype, out_dtype)
    shape, d = x.shape, x.shape[-1]
    if residual is not None:
        if residual.shape != shape or residual.dtype not in run.DTYPES:
            raise ValueError("the residual must have the input's shape and a floating dtype")
        sum_dtype = torch.promote_types(x.dtype, residual.dtype)
        stream = x.new_empty(shape, dtype=sum_dtype)
    else:
        sum_dtype, stream = x.dtype, none_like(x)
    rows = math.prod(shape[:-1])
    y = x.new_empty(shape, dtype=result) if write_y else none_like(x)
    stats = x.new_empty((1 if kind == "rms" else 2, rows), dtype=torch.float32)
    if run.empty(x):
        return y, stream, stats
    x2, r2 = rows_of(x), None if residual is None else rows_of(residual)
    gain, bias = run.contiguous(gain), run.contiguous(bias)
    plan = tuned("norm_forward", plans.norm_forward, x, rows, d, devices.processors(x.device))
    common = {
        "rows": rows,
        "cols": d,
        "x_stride": x2.stride(0),
        "r_stride": 0 if r2 is None else r2.stride(0),
        "KIND": code,
        "HAS_RESIDUAL": r2 is not None,
        "SUM_DT": ROUNDING[sum_dtype],
    }
    affine = {"EPS": eps, "HAS_GAIN": gain is not None, "HAS_BIAS": bias is not None, **codes}
    stream_arg = None if residual is None else stream
    if plan.regime == "tile":
        launch(
            kernels.norm_fwd_tile,
            (plans.cdiv(rows, plan.block_r),),
            x,
            x=x2,
            residual=r2,
            gain=gain,
            bias=bias,
            y=y if write_y else None,
            stream=stream_arg,
            stats=stats,
            WRITE_Y=write_y,
            BLOCK_R=plan.block_r,
            BLOCK_C=plan.block_c,
            num_warps=plan.num_warps,
            **common,
            **affine,
        )
        return y, stream, stats
    # whole tiles, so that a span never begins beyond the row's end
    span = plans.cdiv(plans.cdiv(d, plan.splits), plan.block_c) * plan.block_c
    splits = plan.splits
    partials = x.new_empty((rows, splits, 3), dtype=torch.float32)
    launch(
        kernels.norm_partials,
        (rows, splits),
        x,
        x=x2,
        residual=r2,
        stream=stream_arg,
        partials=partials,
        span=span,
        SPLITS=splits,
        BLOCK_C=plan.block_c,
        num_warps=plan.num_warps,
        **common,
    )
    h = x2 if residual is None else rows_of(stream)
    launch(
        kernels.norm_apply,
        (rows, splits),
        x,
        h_ptr=h,
        gain=gain,
        bias=bias,
        y=y if write_y else None,
        stats=stats,
        partials=partials,
        rows=rows,
        cols=d,
        h_stride=h.stride(0),
        span=span,
        KIND=code,
        WRITE_Y=write_y,
        SPLITS=splits,
        BLOCK_S=plans.next_power_of_2(splits),
        BLOCK_C=plan.block_c,
        num_warps=plan.num_warps,
        **affine,
    )
    return y, stream, stats


@run.op(_plain_norm)
def norm(
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    norm_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """A norm over the last dim; ``(y, stats)``."""
    y, _, stats = _norm(x, None, gain, bias, eps, kind, norm_dtype, out_dtype, True)
    return y, stats


@run.op(_plain)
def add_norm(
    x: Tensor,
    residual: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    norm_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(norm(x + residual), x + residual, stats)``."""
    return _norm(x, residual, gain, bias, eps, kind, norm_dtype, out_dtype, True)


@run.op(_plain_row_rstd)
def row_rstd(
    x: Tensor,
    eps: float,
) -> Tensor:
    """``rsqrt(mean(x²) + eps)`` over the last dim, kept, float32."""
    stats = _norm(x, None, None, None, eps, "rms", None, None, False)[2]
    return stats.reshape(*x.shape[:-1], 1)


@run.op(_plain_add_row_rstd)
def add_row_rstd(
    x: Tensor,
    residual: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``(row_rstd(x + residual), x + residual)``."""
    _, stream, stats = _norm(x, residual, None, None, eps, "rms", None, None, False)
    return stats.reshape(*x.shape[:-1], 1), stream


# --- backward --------------------------------------------------------------------------------------


@run.op(_plain_backward)
def norm_backward(
    h: Tensor,
    dy: Tensor,
    dstream: Tensor | None,
    gain: Tensor | None,
    stats: Tensor,
    kind: str,
    has_bias: bool,
    norm_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dh, dgain, dbias)``, the latter two float32 (empty where there is none)."""
    d, rows = h.shape[-1], math.prod(h.shape[:-1])
    has_gain = gain is not None
    dx = h.new_empty(h.shape)
    if run.empty(h):
        zeros = stats.new_zeros((d,))
        return (
            dx,
            zeros if has_gain else none_like(stats),
            zeros.clone() if has_bias else none_like(stats),
        )
    h2, dy2 = rows_of(h), rows_of(dy)
    ds2 = None if dstream is None else rows_of(dstream)
    gain = run.contiguous(gain)
    plan = tuned("norm_backward", plans.norm_backward, h, rows, d, devices.processors(h.device))
    dgain = stats.new_empty((plan.splits, d)) if has_gain else none_like(stats)
    dbias = stats.new_empty((plan.splits, d)) if has_bias else none_like(stats)
    per_program = plans.cdiv(rows, plan.splits)
    shares = {"dgain": dgain if has_gain else None, "dbias": dbias if has_bias else None}
    source = {
        "h_ptr": h2,
        "dy": dy2,
        "stats": stats,
        "rows": rows,
        "cols": d,
        "h_stride": h2.stride(0),
        "dy_stride": dy2.stride(0),
        "KIND": run.KINDS[kind],
        "HAS_GAIN": has_gain,
        "BLOCK_C": plan.block_c,
        "num_warps": plan.num_warps,
    }
    stream = {
        "dstream": ds2,
        "ds_stride": 0 if ds2 is None else ds2.stride(0),
        "HAS_DSTREAM": ds2 is not None,
        "gain": gain,
        "dx": dx,
    }
    rounding = ROUNDING[norm_dtype or torch.float32]
    if plan.regime == "tile":
        launch(
            kernels.norm_bwd_tile,
            (plan.splits,),
            h,
            rows_per_program=per_program,
            HAS_BIAS=has_bias,
            NORM_DT=rounding,
            BLOCK_R=plan.block_r,
            **source,
            **stream,
            **shares,
        )
    else:
        launch(kernels.norm_bwd_loop, (rows,), h, **source, **stream)
        if has_gain or has_bias:
            launch(
                kernels.norm_bwd_columns,
                (plans.cdiv(d, 128), plan.splits),
                h,
                rows_per_program=per_program,
                HAS_BIAS=has_bias,
                NORM_DT=rounding,
                BLOCK_R=plan.block_r,
                **{**source, "BLOCK_C": 128, "num_warps": 4},
                **shares,
            )
    return (
        dx,
        dgain.sum(0) if has_gain else none_like(stats),
        dbias.sum(0) if has_bias else none_like(stats),
    )


def _save_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, gain, bias, _, ctx.kind, ctx.norm_dtype, _ = inputs
    ctx.save_for_backward(x, gain, output[1])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _norm_gradients(ctx: Any, h: Tensor, dy: Tensor | None, ds: Tensor | None) -> tuple:
    """``(dh, dgain, dbias)`` in their own dtypes."""
    _, gain, stats = ctx.saved_tensors
    if dy is None:
        return ds, None, None
    dh, dgain, dbias = norm_backward(
        h, dy, ds, gain, stats, ctx.kind, ctx.bias_dtype is not None, ctx.norm_dtype
    )
    return (
        dh,
        None if gain is None else dgain.to(gain.dtype),
        None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
    )


def _backward_norm(ctx: Any, dy: Tensor | None, _: Any) -> tuple:
    return *_norm_gradients(ctx, ctx.saved_tensors[0], dy, None), None, None, None, None


def _save_add_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, gain, bias, _, ctx.kind, ctx.norm_dtype, _ = inputs
    ctx.save_for_backward(output[1], gain, output[2])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.dtypes = x.dtype, residual.dtype
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward_add_norm(ctx: Any, dy: Tensor | None, ds: Tensor | None, _: Any) -> tuple:
    dh, dgain, dbias = _norm_gradients(ctx, ctx.saved_tensors[0], dy, ds)
    dx, dr = (None, None) if dh is None else (dh.to(t) for t in ctx.dtypes)
    return dx, dr, dgain, dbias, None, None, None, None


norm.register_autograd(once(_backward_norm), setup_context=_save_norm)
add_norm.register_autograd(once(_backward_add_norm), setup_context=_save_add_norm)


def _rstd_gradient(h: Tensor, rstd: Tensor, g: Tensor) -> Tensor:
    """Gradient of ``rsqrt(mean(h²) + eps)``: ``-g·rstd³·h/d``."""
    return (h * (g * rstd.pow(3) * (-1.0 / h.shape[-1]))).to(h.dtype)


def _save_rstd(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _backward_rstd(ctx: Any, g: Tensor) -> tuple:
    h, rstd = ctx.saved_tensors
    return _rstd_gradient(h, rstd, g), None


def _save_add_rstd(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[1], output[0])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _backward_add_rstd(ctx: Any, g: Tensor, ds: Tensor) -> tuple:
    h, rstd = ctx.saved_tensors
    dh = _rstd_gradient(h, rstd, g) + ds
    return dh.to(ctx.dtypes[0]), dh.to(ctx.dtypes[1]), None


row_rstd.register_autograd(_backward_rstd, setup_context=_save_rstd)
add_row_rstd.register_autograd(_backward_add_rstd, setup_context=_save_add_rstd)
