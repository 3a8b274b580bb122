"""Norm and linear in one product, products scaled per row, and their gated pairs, with gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import devices
from ..activations import ACTIVATIONS
from ..autotune_cache import tuned
from ..derivatives import once
from ..kernels import linear as kernels
from ..kernels import persistent, plans
from . import launch as run
from .launch import flat, launch, rows_of
from .norms import gradient, normalize, statistics

_CODES = {name: i for i, name in enumerate(ACTIVATIONS)}

#: Bound on mean²/variance beyond which a LayerNorm tile is computed again, centered first, by the
#: dtype of the product.
CENTER_LIMIT = {torch.float32: 1.0, torch.bfloat16: 64.0, torch.float16: 16.0}
#: The same where rows are rounded for the product with their mean still in them.
CENTER_LIMIT_ROUNDED = 0.5


def combines(x: torch.dtype, weight: torch.dtype) -> bool:
    """Whether rows of one dtype can be multiplied with weights of another before they are scaled.

    Rounding a row and scaling it commute up to the rounding itself, unless the row leaves the range:
    float16 holds normalized rows, but not any row. Narrow rows before float32 weights would be exact,
    but Triton 3.7 multiplies them in TF32 on sm_100.
    """
    return x == weight or weight == torch.bfloat16


def center_limit(x: torch.dtype, weight: torch.dtype) -> float:
    rounded = torch.finfo(x).eps < torch.finfo(weight).eps
    return CENTER_LIMIT_ROUNDED if rounded else CENTER_LIMIT[weight]


def _check_layers(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    act: str,
) -> None:
    """Raises ``ValueError`` for what no kernel multiplies."""
    run.check(x, bias, up_bias)
    if act not in ACTIVATIONS:
        raise ValueError(f"no activation is called {act!r}; known: {', '.join(ACTIVATIONS)}")
    if not (combines(x.dtype, weight.dtype) and weight.dtype in run.DTYPES):
        raise ValueError(f"input is {x.dtype} but weight is {weight.dtype}")
    if up is None:
        return
    if up.dtype != weight.dtype:
        raise ValueError(f"the pair's weights are {weight.dtype} and {up.dtype}")
    if up.shape != weight.shape:
        raise ValueError(f"the pair's weights have shapes {weight.shape} and {up.shape}")
    if (bias is None) != (up_bias is None):
        raise ValueError("both layers of a pair have a bias or none has")


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    colsum: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    up_colsum: Tensor | None,
    scale: Tensor | None,
    eps: float,
    code: int,
    act: str,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """``(act(z)·z_up, stats)``; ``code``: 0 scale given, else of :data:`~.launch.KINDS`."""
    if up is not None and up.stride() != weight.stride():
        weight, up = weight.contiguous(), up.contiguous()
    if weight.stride(1) != 1 and weight.numel() >= 1 << 31:
        # the kernels step along K in 32 bits
        weight, up = weight.contiguous(), run.contiguous(up)
    m, n, k = math.prod(x.shape[:-1]), weight.shape[0], x.shape[-1]
    dual, centered = up is not None, code == run.KINDS["layer"]
    out = x.new_empty((*x.shape[:-1], n), dtype=out_dtype or weight.dtype)
    stats = x.new_empty((min(code, 2), m), dtype=torch.float32)
    if run.empty(out):
        return out, stats
    x2, processors = rows_of(x), devices.processors(x.device)
    options = {"dual": dual, "mixed": True} if x.dtype != weight.dtype else {"dual": dual}
    plan = tuned("gemm", plans.gemm, x, m, n, k, weight.element_size(), processors, **options)
    tiles = plans.cdiv(m, plan.block_m) * plans.cdiv(n, plan.block_n)
    operands = {
        "x": x2,
        "w": weight,
        "w2": up,
        "M": m,
        "N": n,
        "K": k,
        "x_stride": x2.stride(0),
        "w_stride": weight.stride(0),
        "w_stride_k": weight.stride(1),
        "STATS": code,
        "DUAL": dual,
    }
    tiling = {
        "EVEN_K": plans.divides(plan.block_k, k),
        "PRECISION": run.precision(weight.dtype),
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
    }
    ending = {
        "bias": run.contiguous(bias),
        "bias2": run.contiguous(up_bias),
        "colsum": _column_sums(weight, colsum) if centered else None,
        "colsum2": _column_sums(up, up_colsum) if centered and up is not None else None,
        "scale": None if scale is None else scale.reshape(-1).contiguous(),
        "out": out,
        "stats": stats if code else None,
        "EPS": eps,
        "LIMIT": center_limit(x.dtype, weight.dtype),
        "HAS_BIAS": bias is not None,
        "ACT": _CODES[act],
    }
    if plan.descriptors and _described(x2, weight, up, code):
        # LayerNorm's second product needs shared memory, too
        tiling["num_stages"] = min(plan.num_stages, 3) if centered else plan.num_stages
        tiling |= {"GROUP": plan.group, "TRANSPOSED": weight.stride(1) != 1}
        kernel, grid = persistent.norm_linear_persistent, (min(tiles, processors),)
        launch(kernel, grid, x, workspace=True, **operands, **tiling, **ending)
    elif plan.splits == 1:
        tiling["GROUP"] = plan.group
        launch(kernels.norm_linear_kernel, (tiles,), x, **operands, **tiling, **ending)
    else:
        _split_product(x, plan, tiles, operands, tiling, ending)
    return out, stats


def _split_product(
    x: Tensor,
    plan: plans.GemmPlan,
    tiles: Any,
    operands: dict[str, Any],
    tiling: dict[str, Any],
    ending: dict[str, Any],
) -> None:
    """Partial products over parts of K, then a kernel that adds them up and finishes."""
    m, n, k = (operands[size] for size in "MNK")
    span = plans.cdiv(plans.cdiv(k, plan.splits), plan.block_k) * plan.block_k
    splits = plans.cdiv(k, span)
    partial = x.new_empty((splits, 2 if operands["DUAL"] else 1, m, n), dtype=torch.float32)
    sums = x.new_empty((splits, 2, m), dtype=torch.float32) if operands["STATS"] else None
    parts = {"partial": partial, "sums": sums}
    grid = (tiles, splits)
    launch(kernels.norm_linear_split, grid, x, span=span, **parts, **operands, **tiling)
    block_n, block_k = plans.finish(n)
    launch(
        kernels.norm_linear_finish,
        (m, plans.cdiv(n, block_n)),
        x,
        SPLITS=splits,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        **parts,
        **operands,
        **ending,
    )


def _described(x: Tensor, weight: Tensor, up: Tensor | None, code: int) -> bool:
    """Whether tensor descriptors can hold these operands: rows that begin at multiples of 16 bytes.

    Left to pointers: float32, whose products have no registers left, and LayerNorm of pairs and of
    rows in another dtype, whose second product does not fit shared memory beside the first.
    """
    if weight.dtype == torch.float32:
        return False
    if code == run.KINDS["layer"] and (up is not None or x.dtype != weight.dtype):
        return False
    inner = 1 if weight.stride(1) == 1 else 0
    if weight.stride(inner) != 1:
        return False
    rows = ((x, 1), (weight, inner), *(() if up is None else ((up, inner),)))
    return all(_aligned(t, t.stride(1 - dim), t.shape[dim]) for t, dim in rows)


def _aligned(t: Tensor, stride: int, length: int) -> bool:
    real = type(t) in (Tensor, torch.nn.Parameter)
    begin = t.data_ptr() if real else t.storage_offset() * t.itemsize
    return stride >= length and stride * t.itemsize % 16 == 0 and begin % 16 == 0


def _column_sums(weight: Tensor, given: Tensor | None) -> Tensor:
    if given is None:
        return weight.sum(1, dtype=torch.float32)
    if given.dtype != torch.float32:
        raise ValueError("column sums must be float32")
    return given.contiguous()


def _plain_norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    colsum: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    up_colsum: Tensor | None,
    eps: float,
    kind: str,
    act: str,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    h = normalize(x, None, None, eps, kind, torch.float32, weight.dtype)
    y = ACTIVATIONS[act](F.linear(h, weight, bias))
    if up is not None:
        y = y * F.linear(h, up, up_bias)
    return y.to(out_dtype or weight.dtype).contiguous(), statistics(x, eps, kind)


@run.op(_plain_norm_linear)
def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    colsum: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    up_colsum: Tensor | None,
    eps: float,
    kind: str,
    act: str,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """``(act(norm(x) weightᵀ + bias), stats)`` as one product.

    With ``up`` (same shape as ``weight``) a gated pair: ``act(norm(x) weightᵀ + bias)·(norm(x) upᵀ +
    up_bias)``. ``colsum`` and ``up_colsum`` are the weights' sums over K in float32, which LayerNorm
    needs; they are computed here where they are not given. ``x`` may have another dtype than the
    weights (see :func:`combines`): it is multiplied in theirs, as a cast behind the norm would have it.
    """
    code = run.check_kind(kind)
    _check_layers(x, weight, bias, up, up_bias, act)
    pair = (up, up_bias, up_colsum)
    # a result of no rows has values all the same, and one of no columns has statistics
    if run.empty(x) or run.empty(weight):
        return _plain_norm_linear(x, weight, bias, colsum, *pair, eps, kind, act, out_dtype)
    return _product(x, weight, bias, colsum, *pair, None, eps, code, act, out_dtype)


def _plain_scaled_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    act: str,
    out_dtype: torch.dtype | None,
) -> Tensor:
    def layer(w: Tensor, b: Tensor | None) -> Tensor:
        z = F.linear(x, w).float() * scale.float()
        return z if b is None else z + b.float()

    y = ACTIVATIONS[act](layer(weight, bias))
    if up is not None:
        y = y * layer(up, up_bias)
    return y.to(out_dtype or x.dtype).contiguous()


@run.op(_plain_scaled_linear)
def scaled_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    act: str,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """``act((x weightᵀ)·scale + bias)``, a gated pair with ``up``; ``scale``: one number per row."""
    _check_layers(x, weight, bias, up, up_bias, act)
    if x.dtype != weight.dtype:
        raise ValueError(f"input is {x.dtype} but weight is {weight.dtype}")
    if scale.dtype not in run.DTYPES or scale.dim() != x.dim() or scale.shape[:-1] != x.shape[:-1]:
        raise ValueError("scale must hold one floating-point number per row of the input")
    pair = (up, up_bias, None)
    return _product(x, weight, bias, None, *pair, scale, 0.0, 0, act, out_dtype)[0]


# --- gradients -------------------------------------------------------------------------------------


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
    if act == "sigmoid":
        return aten.sigmoid_backward(dy, torch.sigmoid(z))
    return dy


def _save_norm_linear(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, _, up, up_bias, _, _, ctx.kind, ctx.act, _ = inputs
    ctx.save_for_backward(x, weight, bias, up, up_bias, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_norm_linear(ctx: Any, dy: Tensor, _: Any) -> tuple:
    x, weight, bias, up, up_bias, stats = ctx.saved_tensors
    x2 = flat(x)
    h = x2.float()
    if ctx.kind == "layer":
        h = h - stats[1, :, None]
    h = (h * stats[0, :, None]).to(weight.dtype)

    def product(w: Tensor, b: Tensor | None) -> Tensor:
        z = (h @ w.t()).float()
        return z if b is None else z + b.float()

    dz, dz_up = _pair_gradients(product, dy, weight, bias, up, up_bias, ctx.act)
    low = dz.to(weight.dtype)
    dh = (low @ weight).float()
    dweight, dbias = low.t() @ h, None if bias is None else dz.sum(0).to(bias.dtype)
    dup = dup_bias = None
    if dz_up is not None:
        low = dz_up.to(weight.dtype)
        dh, dup = dh + (low @ up).float(), low.t() @ h
        dup_bias = None if up_bias is None else dz_up.sum(0).to(up_bias.dtype)
    dx = gradient(x2, dh, stats, ctx.kind)[0].to(x.dtype).reshape(x.shape)
    return dx, dweight, dbias, None, dup, dup_bias, None, None, None, None, None


def _pair_gradients(
    product: Any,
    dy: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the two pre-activations, float32; products are computed again where needed."""
    dy = flat(dy).float()
    if up is None and act == "identity":
        return dy, None
    z = product(weight, bias)
    if up is None:
        return _through_activation(z, dy, act), None
    z_up = product(up, up_bias)
    return _through_activation(z, dy * z_up, act), dy * ACTIVATIONS[act](z)


def _save_scaled(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, scale, bias, up, up_bias, ctx.act, _ = inputs
    ctx.save_for_backward(x, weight, scale, bias, up, up_bias)


def _backward_scaled(ctx: Any, dy: Tensor) -> tuple:
    x, weight, scale, bias, up, up_bias = ctx.saved_tensors
    x2, s = flat(x), scale.reshape(-1, 1).float()

    def product(w: Tensor, b: Tensor | None) -> Tensor:
        z = (x2 @ w.t()).float() * s
        return z if b is None else z + b.float()

    pre = _pair_gradients(product, dy, weight, bias, up, up_bias, ctx.act)
    dx: Any = 0
    dscale: Any = 0
    grads: list[tuple[Tensor | None, Tensor | None]] = []
    for dz, w, b in zip(pre, (weight, up), (bias, up_bias), strict=True):
        if dz is None:
            grads.append((None, None))
            continue
        du = (dz * s).to(x.dtype)
        dx = dx + (du @ w).float()
        dscale = dscale + (dz * (x2 @ w.t()).float()).sum(-1)
        grads.append((du.t() @ x2, None if b is None else dz.sum(0).to(b.dtype)))
    (dweight, dbias), (dup, dup_bias) = grads
    dx = dx.to(x.dtype).reshape(x.shape)
    dscale = dscale.to(scale.dtype).reshape(scale.shape)
    return dx, dweight, dscale, dbias, dup, dup_bias, None, None


norm_linear.register_autograd(once(_backward_norm_linear), setup_context=_save_norm_linear)
scaled_linear.register_autograd(_backward_scaled, setup_context=_save_scaled)
