"""Batched products of a Newton–Schulz iteration: symmetric results at half the work, and an addend.

Callers: ``optim/products.py``, under ``no_grad``. Gradients exist all the same, in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from .. import devices
from ..autotune_cache import tuned
from ..kernels import plans
from ..kernels import symmetric as kernels
from . import launch as run
from .launch import launch


def runs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels can multiply there; the ops compute their formula where not."""
    if dtype not in run.DTYPES:
        return False
    if device.type == "cuda":
        return devices.unsupported(device) is None
    return device.type == "cpu" and not isinstance(
        kernels.batched_product, JITFunction
    )  # the interpreter


def is_tf32(dtype: torch.dtype) -> bool:
    return run.precision(dtype) == "tf32"


def _check(x: Tensor, w: Tensor, base: Tensor | None) -> None:
    """Raises ``ValueError``: shapes, dtypes or devices of ``x wᵀ + base`` do not agree."""
    shapes = f"{tuple(x.shape)} and {tuple(w.shape)} (transposed)"
    if x.dim() != 3 or w.dim() != 3 or x.shape[0] != w.shape[0] or x.shape[2] != w.shape[2]:
        raise ValueError(f"batches of matrices of one length are needed, got {shapes}")
    for t in (w, base):
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise ValueError(
                f"one dtype and device is needed, got {x.dtype} on {x.device} and {t.dtype} on {t.device}"
            )
    if base is not None and base.shape != (*x.shape[:2], w.shape[1]):
        raise ValueError(f"the product of {shapes} cannot be added to {tuple(base.shape)}")


def _launch(
    x: Tensor,
    w: Tensor,
    base: Tensor | None,
    alpha: float,
    beta: float,
    programs: Any,
    symmetric: bool,
    blocks: tuple[int, int, int],
    plan: Any,
) -> Tensor:
    batch, m, k = x.shape
    n = w.shape[1]
    out = x.new_empty((batch, m, n))
    at = (0, 0, 0) if base is None else base.stride()
    launch(
        kernels.batched_product,
        (batch * programs,),
        x,
        x=x,
        w=w,
        base=base,
        out=out,
        M=m,
        N=n,
        K=k,
        x_batch_stride=x.stride(0),
        x_stride=x.stride(1),
        x_stride_k=x.stride(2),
        w_batch_stride=w.stride(0),
        w_stride=w.stride(1),
        w_stride_k=w.stride(2),
        base_batch_stride=at[0],
        base_stride=at[1],
        base_stride_n=at[2],
        alpha=alpha,
        beta=beta,
        SYMMETRIC=symmetric,
        HAS_BASE=base is not None,
        WIDE=any(_wide(t) for t in (x, w, base, out) if t is not None),
        EVEN_K=plans.divides(plan.block_k, k),
        PRECISION=run.precision(x.dtype),
        GROUP=plan.group,
        BLOCK_M=blocks[0],
        BLOCK_N=blocks[1],
        BLOCK_K=blocks[2],
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    return out


def _wide(x: Tensor) -> bool:
    """Whether offsets inside one matrix may not fit 32 bits; sizes that are not known count as small."""
    # tiles reach beyond the edges
    reach = sum(
        (size + 255) * abs(step) for size, step in zip(x.shape[1:], x.stride()[1:], strict=True)
    )
    return type(reach) is int and reach >= 1 << 31


def _plain(x: Tensor, w: Tensor, base: Tensor | None, alpha: float, beta: float) -> Tensor:
    if base is not None:
        return torch.baddbmm(base, x, w.mT, beta=beta, alpha=alpha)
    y = torch.bmm(x, w.mT)
    return y if alpha == 1.0 else y * alpha


def _plain_symmetric(
    x: Tensor, w: Tensor, base: Tensor | None, alpha: float, beta: float
) -> Tensor:
    # Mirrored like the kernel's: rounding makes s·tᵀ unsymmetric, which iterations amplify.
    low = _plain(x, w, base, alpha, beta).tril()
    return low + low.tril(-1).mT


@run.op(_plain_symmetric)
def symmetric_product(
    x: Tensor, w: Tensor, base: Tensor | None, alpha: float, beta: float
) -> Tensor:
    """``alpha·x wᵀ + beta·base``, ``[B, m, k]`` to ``[B, m, m]``, for symmetric ``x wᵀ`` and ``base``.

    That they are is the caller's promise: only the lower triangle is computed, and copied. The result is
    symmetric bit for bit. For symmetric ``s`` and ``t`` that commute, ``x = s, w = t`` is ``s·t``.
    """
    _check(x, w, base)
    if x.shape != w.shape:
        raise ValueError(f"x wᵀ of {tuple(x.shape)} and {tuple(w.shape)} is not symmetric")
    if not runs(x.dtype, x.device) or run.empty(x):
        return _plain_symmetric(x, w, base, alpha, beta)
    batch, m, _ = x.shape
    sizes = (batch, m, x.element_size(), devices.processors(x.device))
    plan = tuned("symmetric", plans.symmetric, x, *sizes, tf32=is_tf32(x.dtype))
    blocks = (plan.block, plan.block, plan.block_k)
    return _launch(x, w, base, alpha, beta, plan.tiles(m), True, blocks, plan)


@run.op(_plain)
def add_product(x: Tensor, w: Tensor, base: Tensor | None, alpha: float, beta: float) -> Tensor:
    """``alpha·x wᵀ + beta·base``; ``[B, m, k]`` and ``[B, n, k]`` to ``[B, m, n]``.

    Unlike ``baddbmm`` it reads ``base`` where it adds it, instead of copying it into the result first.
    """
    _check(x, w, base)
    if not runs(x.dtype, x.device) or run.empty(x) or run.empty(w):
        return _plain(x, w, base, alpha, beta)
    m, n = x.shape[1], w.shape[1]
    plan = tuned("addend", plans.addend, x, m, n, x.element_size(), tf32=is_tf32(x.dtype))
    tiles = plans.cdiv(m, plan.block_m) * plans.cdiv(n, plan.block_n)
    blocks = (plan.block_m, plan.block_n, plan.block_k)
    return _launch(x, w, base, alpha, beta, tiles, False, blocks, plan)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, w, base, ctx.alpha, ctx.beta = inputs
    ctx.save_for_backward(x, w)
    ctx.has_base = base is not None


def _backward(ctx: Any, g: Tensor) -> tuple:
    """Of the product as a function of independent arguments."""
    x, w = ctx.saved_tensors
    return (
        torch.bmm(g, w) * ctx.alpha if ctx.needs_input_grad[0] else None,
        torch.bmm(g.mT, x) * ctx.alpha if ctx.needs_input_grad[1] else None,
        g * ctx.beta if ctx.has_base else None,
        None,
        None,
    )


symmetric_product.register_autograd(_backward, setup_context=_setup)
add_product.register_autograd(_backward, setup_context=_setup)
