"""Kernels as operators (namespace ``normfuse_kernels``), with gradients; needs triton.

Every op is a ``torch.library.triton_op``: in eager mode it launches, under ``torch.compile`` Inductor
sees the launches themselves. Bodies are written for fake and symbolic tensors: they allocate new
contiguous outputs, never look at data and never synchronize. Nothing here is atomic, so results do
not depend on scheduling. Importing this file registers the ops; ``runtime/lower_kernels.py`` puts
them into graphs.

Requirements (checked, ``ValueError``): float16, bfloat16 or float32; the norm runs over the last dim;
gain and bias are ``(d,)``.
"""

from __future__ import annotations

import contextlib
import math
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.library import triton_op, wrap_triton
from triton.runtime.jit import JITFunction

from . import devices
from .autotune_cache import tuned
from .kernels import gated as gated_kernels
from .kernels import linear as linear_kernels
from .kernels import norm as norm_kernels
from .kernels import plans

NAMESPACE = "normfuse_kernels"
ACTIVATIONS = {"identity": 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = 64

_ROUNDING = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


# --- plumbing --------------------------------------------------------------------------------------


def _op(fn: Callable) -> Any:
    """Register ``fn`` as an op of its own name, its schema read from its annotations."""
    fn.__annotations__ = typing.get_type_hints(fn)
    return triton_op(f"{NAMESPACE}::{fn.__name__}", fn, mutates_args={})


def _launch(kernel: Any, grid: tuple, on: Tensor, **arguments: Any) -> None:
    """Launch on ``on``'s device; as a graph node while tracing, directly under the interpreter."""
    wrapped = wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel
    with _device_of(on):
        wrapped[grid](**arguments)


def _device_of(x: Tensor) -> Any:
    real = type(x) in (Tensor, torch.nn.Parameter) and x.is_cuda
    if not real or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def _rows(x: Tensor) -> Tensor:
    """``[rows, d]`` with unit stride in d; a copy only where strides do not allow it."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _empty(x: Tensor) -> bool:
    return guard_or_false(x.numel() == 0)


def _none_like(x: Tensor) -> Tensor:
    """Stands for an output that was not asked for."""
    return x.new_empty((0,))


def _check(x: Tensor, *vectors: Tensor | None) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"kernels take float16, bfloat16 and float32, not {x.dtype}")
    for v in vectors:
        if v is None:
            continue
        if v.dim() != 1 or v.dtype not in DTYPES:
            raise ValueError(
                f"gain and bias must be floating-point vectors, got {v.dtype} {v.shape}"
            )


def _cast_order(
    gain: Tensor | None,
    bias: Tensor | None,
    norm_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> tuple[dict[str, Any], torch.dtype]:
    """Rounding codes of the kernels and the result's dtype, by torch's type promotion."""
    at_norm = norm_dtype or torch.float32
    at_gain = at_norm if gain is None else torch.promote_types(at_norm, gain.dtype)
    at_bias = at_gain if bias is None else torch.promote_types(at_gain, bias.dtype)
    codes = {
        "NORM_DT": _ROUNDING[at_norm],
        "GAIN_DT": _ROUNDING[at_gain],
        "BIAS_DT": _ROUNDING[at_bias],
    }
    return codes, out_dtype or at_bias


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


# --- norms -----------------------------------------------------------------------------------------


def _norm(
    x: Tensor,
    residual: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    norm_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
    write_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, stream, stats)``; what was not asked for is empty."""
    _check(x, gain, bias)
    codes, result = _cast_order(gain, bias, norm_dtype, out_dtype)
    shape, d = x.shape, x.shape[-1]
    if residual is not None:
        if residual.shape != shape or residual.dtype not in DTYPES:
            raise ValueError("the residual must have the input's shape and a floating dtype")
        sum_dtype = torch.promote_types(x.dtype, residual.dtype)
        stream = x.new_empty(shape, dtype=sum_dtype)
    else:
        sum_dtype, stream = x.dtype, _none_like(x)
    rows = math.prod(shape[:-1])
    y = x.new_empty(shape, dtype=result) if write_y else _none_like(x)
    stats = x.new_empty((2 if center else 1, rows), dtype=torch.float32)
    if _empty(x):
        return y, stream, stats
    x2, r2 = _rows(x), None if residual is None else _rows(residual)
    gain, bias = _contiguous(gain), _contiguous(bias)
    plan = tuned("norm_forward", plans.norm_forward, x, rows, d, devices.processors(x.device))
    common = {
        "rows": rows,
        "cols": d,
        "x_stride": x2.stride(0),
        "r_stride": 0 if r2 is None else r2.stride(0),
        "CENTER": center,
        "HAS_RESIDUAL": r2 is not None,
        "SUM_DT": _ROUNDING[sum_dtype],
    }
    affine = {"EPS": eps, "HAS_GAIN": gain is not None, "HAS_BIAS": bias is not None, **codes}
    stream_arg = None if residual is None else stream
    if plan.regime == "tile":
        _launch(
            norm_kernels.norm_fwd_tile,
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
    _launch(
        norm_kernels.norm_partials,
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
    h = x2 if residual is None else _rows(stream)
    _launch(
        norm_kernels.norm_apply,
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
        CENTER=center,
        WRITE_Y=write_y,
        SPLITS=splits,
        BLOCK_S=plans.next_power_of_2(splits),
        BLOCK_C=plan.block_c,
        num_warps=plan.num_warps,
        **affine,
    )
    return y, stream, stats


@_op
def norm(
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    norm_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm or (``center``) LayerNorm over the last dim; ``(y, stats)``."""
    y, _, stats = _norm(x, None, gain, bias, eps, center, norm_dtype, out_dtype, True)
    return y, stats


@_op
def add_norm(
    x: Tensor,
    residual: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    norm_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(norm(x + residual), x + residual, stats)``."""
    return _norm(x, residual, gain, bias, eps, center, norm_dtype, out_dtype, True)


@_op
def row_rstd(
    x: Tensor,
    eps: float,
) -> Tensor:
    """``rsqrt(mean(x²) + eps)`` over the last dim, kept, float32."""
    stats = _norm(x, None, None, None, eps, False, None, None, False)[2]
    return stats.reshape(*x.shape[:-1], 1)


@_op
def add_row_rstd(
    x: Tensor,
    residual: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``(row_rstd(x + residual), x + residual)``."""
    _, stream, stats = _norm(x, residual, None, None, eps, False, None, None, False)
    return stats.reshape(*x.shape[:-1], 1), stream


@_op
def norm_backward(
    h: Tensor,
    dy: Tensor,
    dstream: Tensor | None,
    gain: Tensor | None,
    stats: Tensor,
    center: bool,
    has_bias: bool,
    norm_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dh, dgain, dbias)``, the latter two float32 (empty where there is none)."""
    d, rows = h.shape[-1], math.prod(h.shape[:-1])
    has_gain = gain is not None
    dx = h.new_empty(h.shape)
    if _empty(h):
        zeros = stats.new_zeros((d,))
        return (
            dx,
            zeros if has_gain else _none_like(stats),
            zeros.clone() if has_bias else _none_like(stats),
        )
    h2, dy2 = _rows(h), _rows(dy)
    ds2 = None if dstream is None else _rows(dstream)
    gain = _contiguous(gain)
    plan = tuned("norm_backward", plans.norm_backward, h, rows, d, devices.processors(h.device))
    dgain = stats.new_empty((plan.splits, d)) if has_gain else _none_like(stats)
    dbias = stats.new_empty((plan.splits, d)) if has_bias else _none_like(stats)
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
        "CENTER": center,
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
    rounding = _ROUNDING[norm_dtype or torch.float32]
    if plan.regime == "tile":
        _launch(
            norm_kernels.norm_bwd_tile,
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
        _launch(norm_kernels.norm_bwd_loop, (rows,), h, **source, **stream)
        if has_gain or has_bias:
            _launch(
                norm_kernels.norm_bwd_columns,
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
        dgain.sum(0) if has_gain else _none_like(stats),
        dbias.sum(0) if has_bias else _none_like(stats),
    )


def _save_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, gain, bias, _, ctx.center, ctx.norm_dtype, _ = inputs
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
        h, dy, ds, gain, stats, ctx.center, ctx.bias_dtype is not None, ctx.norm_dtype
    )
    return (
        dh,
        None if gain is None else dgain.to(gain.dtype),
        None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
    )


def _backward_norm(ctx: Any, dy: Tensor | None, _: Any) -> tuple:
    return *_norm_gradients(ctx, ctx.saved_tensors[0], dy, None), None, None, None, None


def _save_add_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, gain, bias, _, ctx.center, ctx.norm_dtype, _ = inputs
    ctx.save_for_backward(output[1], gain, output[2])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.dtypes = x.dtype, residual.dtype
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward_add_norm(ctx: Any, dy: Tensor | None, ds: Tensor | None, _: Any) -> tuple:
    dh, dgain, dbias = _norm_gradients(ctx, ctx.saved_tensors[0], dy, ds)
    dx, dr = (None, None) if dh is None else (dh.to(t) for t in ctx.dtypes)
    return dx, dr, dgain, dbias, None, None, None, None


norm.register_autograd(_backward_norm, setup_context=_save_norm)
add_norm.register_autograd(_backward_add_norm, setup_context=_save_add_norm)


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


# --- norm and linear in one product ----------------------------------------------------------------


def _precision(dtype: torch.dtype) -> str:
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


#: Bound on mean²/variance beyond which a LayerNorm tile is computed again, centered first.
_CENTER_LIMIT = {torch.float32: 1.0, torch.bfloat16: 64.0, torch.float16: 16.0}


def _product(
    x: Tensor,
    weight: Tensor,
    colsum: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    statistic: int,
    act: str,
    glu: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """``(act(scaled product + bias), stats)``; ``statistic``: 0 scale given, 1 RMS, 2 layer norm."""
    _check(x, bias)
    if weight.dtype != x.dtype:
        raise ValueError(f"input is {x.dtype} but weight is {weight.dtype}")
    if act not in ACTIVATIONS:
        raise ValueError(f"no activation is called {act!r}; known: {', '.join(ACTIVATIONS)}")
    if glu and weight.shape[0] % 2:
        raise ValueError("a gated product needs an even number of weight rows, gate first")
    k = x.shape[-1]
    n = weight.shape[0] // 2 if glu else weight.shape[0]
    m = math.prod(x.shape[:-1])
    out = x.new_empty((*x.shape[:-1], n), dtype=out_dtype or x.dtype)
    stats = x.new_empty((statistic, m), dtype=torch.float32)
    if _empty(out):
        return out, stats
    x2, bias = _rows(x), _contiguous(bias)
    scale = None if scale is None else scale.reshape(-1).contiguous()
    processors = devices.processors(x.device)
    plan = tuned(
        "gemm",
        plans.gemm,
        x,
        m,
        n,
        k,
        x.element_size(),
        processors,
        dual=glu,
        split_allowed=statistic < 2,
    )
    tiles = plans.cdiv(m, plan.block_m) * plans.cdiv(n, plan.block_n)
    product = {
        "x": x2,
        "w": weight,
        "M": m,
        "N": n,
        "K": k,
        "x_stride": x2.stride(0),
        "w_stride": weight.stride(0),
        "w_stride_k": weight.stride(1),
        "STATS": statistic,
        "DUAL": glu,
        "EVEN_K": plans.divides(plan.block_k, k),
        "PRECISION": _precision(x.dtype),
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }
    ending = {
        "bias": bias,
        "scale": scale,
        "out": out,
        "stats": stats if statistic else None,
        "EPS": eps,
        "HAS_BIAS": bias is not None,
        "ACT": ACTIVATIONS[act],
    }
    if plan.splits == 1:
        _launch(
            linear_kernels.norm_linear_kernel,
            (tiles,),
            x,
            colsum=_contiguous(colsum),
            LIMIT=_CENTER_LIMIT[x.dtype],
            GROUP=plan.group,
            **product,
            **ending,
        )
        return out, stats
    span = plans.cdiv(plans.cdiv(k, plan.splits), plan.block_k) * plan.block_k
    splits = plans.cdiv(k, span)
    partial = x.new_empty((splits, 2 if glu else 1, m, n), dtype=torch.float32)
    squares = x.new_empty((splits, m), dtype=torch.float32)
    _launch(
        linear_kernels.norm_linear_split,
        (tiles, splits),
        x,
        partial=partial,
        squares=squares if statistic else None,
        span=span,
        **product,
    )
    block_n = min(plans.next_power_of_2(n), 256) if type(n) is int else 256
    _launch(
        linear_kernels.norm_linear_finish,
        (m, plans.cdiv(n, block_n)),
        x,
        partial=partial,
        squares=squares if statistic else None,
        M=m,
        N=n,
        K=k,
        STATS=statistic,
        DUAL=glu,
        SPLITS=splits,
        BLOCK_N=block_n,
        num_warps=4,
        **ending,
    )
    return out, stats


@_op
def norm_linear(
    x: Tensor,
    weight: Tensor,
    colsum: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    act: str,
    glu: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """``(act(norm(x) weightᵀ + bias), stats)`` as one product.

    ``colsum`` is ``weight.sum(1)`` in float32 (computed here when a LayerNorm comes without it). With
    ``glu`` the weight's first half are gate rows: ``act(gate)·up``.
    """
    if center and colsum is None:
        colsum = weight.sum(1, dtype=torch.float32)
    elif colsum is not None and colsum.dtype != torch.float32:
        raise ValueError("colsum must be float32")
    return _product(x, weight, colsum, bias, None, eps, 2 if center else 1, act, glu, out_dtype)


@_op
def scaled_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    act: str,
    glu: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """``act((x weightᵀ)·scale + bias)``; ``scale`` holds one number per row."""
    if scale.dtype not in DTYPES or scale.dim() != x.dim() or scale.shape[:-1] != x.shape[:-1]:
        raise ValueError("scale must hold one floating-point number per row of the input")
    return _product(x, weight, None, bias, scale, 0.0, 0, act, glu, out_dtype)[0]


def _through_activation(z: Tensor, dy: Tensor, act: str) -> Tensor:
    aten = torch.ops.aten
    if act == "relu":
        return torch.where(z < 0, 0.0, dy)
    if act == "silu":
        return aten.silu_backward(dy, z)
    if act == "gelu":
        return aten.gelu_backward(dy, z)
    if act == "gelu_tanh":
        return aten.gelu_backward(dy, z, approximate="tanh")
    return dy


_FORWARD = {
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "identity": lambda z: z,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
}


def _pre_activation_gradient(z: Tensor, dy: Tensor, act: str, glu: bool) -> Tensor:
    if not glu:
        return _through_activation(z, dy, act)
    gate, up = z.chunk(2, -1)
    return torch.cat([_through_activation(gate, dy * up, act), dy * _FORWARD[act](gate)], -1)


def _save_norm_linear(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, _, bias, _, ctx.center, ctx.act, ctx.glu, _ = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_norm_linear(ctx: Any, dy: Tensor, _: Any) -> tuple:
    x, weight, bias, stats = ctx.saved_tensors
    x2 = x.reshape(-1, x.shape[-1])
    dy = dy.reshape(-1, dy.shape[-1]).float()
    h = x2.float()
    if ctx.center:
        h = h - stats[1, :, None]
    h = h * stats[0, :, None]
    low = h.to(x.dtype)
    if ctx.glu or ctx.act != "identity":
        z = (low @ weight.t()).float()
        if bias is not None:
            z = z + bias.float()
        dy = _pre_activation_gradient(z, dy, ctx.act, ctx.glu)
    dz = dy.to(x.dtype)
    w = (dz @ weight).float()
    dx = w - h * (w * h).mean(-1, keepdim=True)
    if ctx.center:
        dx = dx - w.mean(-1, keepdim=True)
    dx = (dx * stats[0, :, None]).to(x.dtype).reshape(x.shape)
    dbias = None if bias is None else dy.sum(0).to(bias.dtype)
    return dx, dz.t() @ low, None, dbias, None, None, None, None, None


def _save_scaled(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, scale, bias, ctx.act, ctx.glu, _ = inputs
    ctx.save_for_backward(x, weight, scale, bias)


def _backward_scaled(ctx: Any, dy: Tensor) -> tuple:
    x, weight, scale, bias = ctx.saved_tensors
    x2, s = x.reshape(-1, x.shape[-1]), scale.reshape(-1, 1).float()
    dy = dy.reshape(-1, dy.shape[-1]).float()
    u = (x2 @ weight.t()).float()
    if ctx.glu or ctx.act != "identity":
        z = u * s if bias is None else u * s + bias.float()
        dy = _pre_activation_gradient(z, dy, ctx.act, ctx.glu)
    du = (dy * s).to(x.dtype)
    dscale = (dy * u).sum(-1).to(scale.dtype).reshape(scale.shape)
    dbias = None if bias is None else dy.sum(0).to(bias.dtype)
    return (du @ weight).reshape(x.shape), du.t() @ x2, dscale, dbias, None, None, None


norm_linear.register_autograd(_backward_norm_linear, setup_context=_save_norm_linear)
scaled_linear.register_autograd(_backward_scaled, setup_context=_save_scaled)


# --- gated norm ------------------------------------------------------------------------------------


@_op
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
    _check(x, gain, bias)
    codes, result = _cast_order(gain, bias, norm_dtype, out_dtype)
    d, rank, rows = x.shape[-1], down.shape[0], math.prod(x.shape[:-1])
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"the gate's rank must be 1 to {MAX_RANK}, got {rank}")
    if tuple(down.shape) != (rank, d) or tuple(up.shape) != (d, rank):
        raise ValueError(f"gate weights must be (r, d) and (d, r), got {down.shape}, {up.shape}")
    out = x.new_empty(x.shape, dtype=result)
    t = x.new_empty((rows, rank), dtype=torch.float32)
    stats = x.new_empty((rows,), dtype=torch.float32)
    if _empty(x):
        return out, t, stats
    x2 = _rows(x)
    plan = plans.gated(rows, d, rank, devices.processors(x.device))
    _launch(
        gated_kernels.gated_fwd,
        (plans.cdiv(rows, plan.block_r),),
        x,
        x=x2,
        gain=_contiguous(gain),
        bias=_contiguous(bias),
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
        OUT_DT=_ROUNDING[result],
        PRECISION=_precision(result),
        BLOCK_R=plan.block_r,
        BLOCK_C=plan.block_c,
        BLOCK_K=plan.block_k,
        num_warps=plan.num_warps,
        **codes,
    )
    return out, t, stats


@_op
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
    codes, _ = _cast_order(gain, bias, norm_dtype, None)
    d, rank, rows = x.shape[-1], down.shape[0], math.prod(x.shape[:-1])
    dx = x.new_empty(x.shape)
    has_gain, has_bias = gain is not None, bias is not None
    if _empty(x):
        zeros = [stats.new_zeros(s) for s in ((d,), (d,), (rank, d), (d, rank))]
        return (
            dx,
            zeros[0] if has_gain else _none_like(stats),
            zeros[1] if has_bias else _none_like(stats),
            *zeros[2:],
        )
    x2, do2 = _rows(x), _rows(dout)
    plan = plans.gated(rows, d, rank, devices.processors(x.device), backward=True)
    dt = torch.empty_like(t)
    common = {
        "x": x2,
        "dout": do2,
        "gain": _contiguous(gain),
        "bias": _contiguous(bias),
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
        "PRECISION": _precision(dout.dtype),
        "BLOCK_R": plan.block_r,
        "BLOCK_C": plan.block_c,
        "BLOCK_K": plan.block_k,
        "num_warps": plan.num_warps,
        **codes,
    }
    grid = (plans.cdiv(rows, plan.block_r),)
    _launch(gated_kernels.gated_bwd_rows, grid, x, dx=dx, dt_out=dt, **common)
    parts = plan.splits
    dgain = stats.new_empty((parts, d)) if has_gain else _none_like(stats)
    dbias = stats.new_empty((parts, d)) if has_bias else _none_like(stats)
    ddown, dup = stats.new_empty((parts, d, rank)), stats.new_empty((parts, d, rank))
    _launch(
        gated_kernels.gated_bwd_columns,
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
        dgain.sum(0) if has_gain else _none_like(stats),
        dbias.sum(0) if has_bias else _none_like(stats),
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


gated_norm.register_autograd(_backward_gated, setup_context=_save_gated)
