"""GatedNorm as an op, with gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...passes import ops as vocabulary
from .. import devices
from ..derivatives import once, self_gate_gradients
from ..kernels import gated as kernels
from ..kernels import plans
from . import launch as run
from .launch import ROUNDING, flat, launch, none_like, rows_of

MAX_RANK = 64


def _plain_gated_norm(
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    eps: float,
    gate_scale: float,
    norm_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    casts = {"stat_dtype": torch.float32, "norm_dtype": norm_dtype, "out_dtype": out_dtype}
    y = vocabulary.rms_norm(x, [-1], gain, bias, eps, **casts)
    t = flat(y @ down.to(y.dtype).t()).float()
    out = vocabulary.self_gate(y, down, up, gate_scale=gate_scale)
    stats = vocabulary.row_rstd(x, [-1], eps, stat_dtype=torch.float32).reshape(-1)
    return out.contiguous(), t, stats


def _plain_gated_norm_backward(
    x: Tensor,
    dout: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    t: Tensor,
    stats: Tensor,
    gate_scale: float,
    norm_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rstd, down, up = stats[:, None], down.float(), up.float()
    normed = flat(x).float() * rstd
    low = normed if norm_dtype is None else normed.to(norm_dtype).float()
    y = low if gain is None else low * gain.float()
    y = y if bias is None else y + bias.float()
    dy, ddown, dup = self_gate_gradients(y, flat(dout).float(), down, up, t, gate_scale)
    w = dy if gain is None else dy * gain.float()
    dx = (w - normed * (w * normed).mean(-1, keepdim=True)) * rstd
    return (
        dx.to(x.dtype).reshape(x.shape),
        none_like(stats) if gain is None else (dy * low).sum(0),
        none_like(stats) if bias is None else dy.sum(0),
        ddown,
        dup,
    )


@run.op(_plain_gated_norm)
def gated_norm(
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    eps: float,
    gate_scale: float,
    norm_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(result, y downᵀ as [rows, rank], rstd as [rows])``."""
    run.check(x, gain, bias)
    codes, result = run.cast_order(gain, bias, norm_dtype, out_dtype)
    d, rank, rows = x.shape[-1], down.shape[0], math.prod(x.shape[:-1])
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"the gate's rank must be 1 to {MAX_RANK}, got {rank}")
    if tuple(down.shape) != (rank, d) or tuple(up.shape) != (d, rank):
        raise ValueError(f"gate weights must be (r, d) and (d, r), got {down.shape}, {up.shape}")
    out = x.new_empty(x.shape, dtype=result)
    t = x.new_empty((rows, rank), dtype=torch.float32)
    stats = x.new_empty((rows,), dtype=torch.float32)
    if run.empty(x):
        return out, t, stats
    x2 = rows_of(x)
    plan = plans.gated(rows, d, rank, x.element_size(), devices.processors(x.device))
    launch(
        kernels.gated_fwd,
        (plans.cdiv(rows, plan.block_r),),
        x,
        x=x2,
        gain=run.contiguous(gain),
        bias=run.contiguous(bias),
        down=down.contiguous(),
        up=up.contiguous(),
        out=out,
        t_out=t,
        stats=stats,
        rows=rows,
        cols=d,
        rank=rank,
        x_stride=x2.stride(0),
        EPS=eps,
        GATE=gate_scale,
        HAS_GAIN=gain is not None,
        HAS_BIAS=bias is not None,
        OUT_DT=ROUNDING[result],
        PRECISION=run.precision(result),
        BLOCK_R=plan.block_r,
        BLOCK_C=plan.block_c,
        BLOCK_K=plan.block_k,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        **codes,
    )
    return out, t, stats


@run.op(_plain_gated_norm_backward)
def gated_norm_backward(
    x: Tensor,
    dout: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    t: Tensor,
    stats: Tensor,
    gate_scale: float,
    norm_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dgain, dbias, ddown, dup)``; all but dx in float32, empty where there is none."""
    codes, _ = run.cast_order(gain, bias, norm_dtype, None)
    d, rank, rows = x.shape[-1], down.shape[0], math.prod(x.shape[:-1])
    dx = x.new_empty(x.shape)
    has_gain, has_bias = gain is not None, bias is not None
    if run.empty(x):
        zeros = [stats.new_zeros(s) for s in ((d,), (d,), (rank, d), (d, rank))]
        return (
            dx,
            zeros[0] if has_gain else none_like(stats),
            zeros[1] if has_bias else none_like(stats),
            *zeros[2:],
        )
    x2, do2 = rows_of(x), rows_of(dout)
    size, processors = x.element_size(), devices.processors(x.device)
    plan = plans.gated(rows, d, rank, size, processors, backward=True)
    dt = torch.empty_like(t)
    common = {
        "x": x2,
        "dout": do2,
        "gain": run.contiguous(gain),
        "bias": run.contiguous(bias),
        "down": down.contiguous(),
        "up": up.contiguous(),
        "t_in": t,
        "stats": stats,
        "rows": rows,
        "cols": d,
        "rank": rank,
        "x_stride": x2.stride(0),
        "do_stride": do2.stride(0),
        "GATE": gate_scale,
        "HAS_GAIN": has_gain,
        "HAS_BIAS": has_bias,
        "PRECISION": run.precision(dout.dtype),
        "BLOCK_R": plan.block_r,
        "BLOCK_C": plan.block_c,
        "BLOCK_K": plan.block_k,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
        **codes,
    }
    grid = (plans.cdiv(rows, plan.block_r),)
    launch(kernels.gated_bwd_rows, grid, x, dx=dx, dt_out=dt, **common)
    parts = plan.splits
    dgain = stats.new_empty((parts, d)) if has_gain else none_like(stats)
    dbias = stats.new_empty((parts, d)) if has_bias else none_like(stats)
    ddown, dup = stats.new_empty((parts, d, rank)), stats.new_empty((parts, d, rank))
    launch(
        kernels.gated_bwd_columns,
        (plans.cdiv(d, plan.block_c), parts),
        x,
        dt_in=dt,
        dgain=dgain if has_gain else None,
        dbias=dbias if has_bias else None,
        ddown=ddown,
        dup=dup,
        rows_per_program=plans.cdiv(rows, parts),
        **common,
    )
    return (
        dx,
        dgain.sum(0) if has_gain else none_like(stats),
        dbias.sum(0) if has_bias else none_like(stats),
        ddown.sum(0).t().contiguous(),
        dup.sum(0),
    )


def _save_gated(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, gain, bias, down, up, _, ctx.gate_scale, ctx.norm_dtype, _ = inputs
    ctx.save_for_backward(x, gain, bias, down, up, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _backward_gated(ctx: Any, dout: Tensor, *_: Any) -> tuple:
    x, gain, bias, down, up, t, stats = ctx.saved_tensors
    dx, dgain, dbias, ddown, dup = gated_norm_backward(
        x, dout, gain, bias, down, up, t, stats, ctx.gate_scale, ctx.norm_dtype
    )
    return (
        dx,
        None if gain is None else dgain.to(gain.dtype),
        None if bias is None else dbias.to(bias.dtype),
        ddown.to(down.dtype),
        dup.to(up.dtype),
        None,
        None,
        None,
        None,
    )


gated_norm.register_autograd(once(_backward_gated), setup_context=_save_gated)
