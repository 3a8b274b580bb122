"""The norm vocabulary: the few ops that every spelling of a norm is rewritten to.

Each op has one definition, the plain torch function below, registered as a *composite implicit*
op: autograd, fake tensors, ``vmap``, ``torch.export`` and Inductor all see through it to ATen, in
any dtype including float64. Kernels for GPUs are separate ops that the runtime substitutes by a
graph pass, so this file never imports triton.

Cast order is part of an op's contract (design: "the precise cast order of the spelling")::

    h = x.to(stat_dtype)                   # the statistic and the scaling happen in stat_dtype
    y = h * rsqrt(mean(h², dims) + eps)    # layer_norm first subtracts mean(h, dims)
    y = y.to(norm_dtype)                   # rounded here, before the gain
    y = y * gain ; y = y + bias            # ordinary torch type promotion
    y = y.to(out_dtype)

``None`` for a dtype means "as it comes" (no cast at that point). With ``floor`` the statistic of an
RMSNorm is bounded from below instead: ``rsqrt(max(mean(h²), eps))``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.fx.traceback
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

__all__ = [
    "NORM_OPS",
    "ada_rms_norm",
    "add_layer_norm",
    "add_rms_norm",
    "affine_heads",
    "center",
    "crms_norm",
    "gate_heads",
    "gated_rms_norm",
    "layer_norm",
    "rms_norm",
    "row_rstd",
    "scaled_linear",
    "seed_norm",
    "self_gate",
]

_lib = torch.library.Library("normfuse", "DEF")

# The dispatcher drops arguments that equal the schema's default before it calls the Python body, so
# defaults here and in the functions below must be the same.
_NORM_ARGS = (
    "int[] dims, Tensor? gain=None, Tensor? bias=None, float eps={eps}, *, {floor}"
    "ScalarType? stat_dtype=None, ScalarType? norm_dtype=None, ScalarType? out_dtype=None"
)
_LAYER_ARGS = _NORM_ARGS.format(eps="1e-5", floor="")
_RMS_ARGS = _NORM_ARGS.format(eps="1e-6", floor="bool floor=False, ")


def _opmath(dtype: torch.dtype) -> torch.dtype:
    """The dtype PyTorch's own norm kernels accumulate in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _finish(
    y: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    norm_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    if norm_dtype is not None:
        y = y.to(norm_dtype)
    if gain is not None:
        y = y * gain
    if bias is not None:
        y = y + bias
    return y if out_dtype is None else y.to(out_dtype)


def _is_native(
    x: Tensor,
    dims: Sequence[int],
    gain: Tensor | None,
    bias: Tensor | None,
    stat_dtype: torch.dtype | None,
    norm_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> bool:
    """True where ``F.layer_norm``/``F.rms_norm`` compute exactly this cast order."""
    opmath = _opmath(x.dtype)
    if list(dims) != list(range(-len(dims), 0)):
        return False
    if (stat_dtype or x.dtype) != opmath or (norm_dtype or opmath) != opmath:
        return False
    if out_dtype is not None and out_dtype != x.dtype:
        return False
    if out_dtype is None and opmath != x.dtype:
        return False
    shape = tuple(x.shape[x.dim() - len(dims) :])
    return all(t is None or (t.dtype == x.dtype and tuple(t.shape) == shape) for t in (gain, bias))


def _rstd(h: Tensor, dims: Sequence[int], eps: float, floor: bool = False) -> Tensor:
    square = h.square().mean(dims, keepdim=True)
    # the bound lies under the root: a root of zero has no gradient, even one that is not used
    return torch.rsqrt(square.clamp_min(eps) if floor else square + eps)


def layer_norm(
    x: Tensor,
    dims: Sequence[int],
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    stat_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm (Ba et al., 2016, eq. 4; biased variance, eps inside the root).

    Args:
        x: ``(..., d)`` floating-point tensor.
        dims: negative dims that the statistic runs over, ascending, e.g. ``[-1]``.
        gain, bias: tensors broadcastable to ``x``; may be ``None``.
        eps: added to the variance inside the square root.
        stat_dtype, norm_dtype, out_dtype: the cast order, see the module docstring.
    """
    if _is_native(x, dims, gain, bias, stat_dtype, norm_dtype, out_dtype) and (
        gain is not None or bias is None
    ):
        return F.layer_norm(x, tuple(x.shape[x.dim() - len(dims) :]), gain, bias, eps)
    h = x if stat_dtype is None else x.to(stat_dtype)
    h = h - h.mean(dims, keepdim=True)
    y = h * _rstd(h, dims, eps)
    return _finish(y, gain, bias, norm_dtype, out_dtype)


def rms_norm(
    x: Tensor,
    dims: Sequence[int],
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    floor: bool = False,
    stat_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """RMSNorm (Zhang & Sennrich, 2019, eq. 4). Arguments as for :func:`layer_norm`.

    With ``floor``, ``eps`` is the least mean square that is divided by, and nothing is added:
    ``F.normalize(x, dim=-1)·√d`` is this with ``eps = 1e-24/d``.
    """
    h = x if stat_dtype is None else x.to(stat_dtype)
    y = h * _rstd(h, dims, eps, floor)
    return _finish(y, gain, bias, norm_dtype, out_dtype)


def crms_norm(
    x: Tensor,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    stat_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compressed RMSNorm of a zero-mean vector whose last coordinate was dropped.

    ``x`` is ``(..., d-1)``; the dropped coordinate is minus the sum of the others
    (Jiang et al., "Pre-RMSNorm and Pre-CRMSNorm Transformers", 2023, section 3.2).
    """
    h = x if stat_dtype is None else x.to(stat_dtype)
    total = h.square().sum(-1, keepdim=True) + h.sum(-1, keepdim=True).square()
    y = h * torch.rsqrt(total / (x.shape[-1] + 1) + eps)
    return _finish(y, gain, bias, norm_dtype, out_dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    dims: Sequence[int],
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    floor: bool = False,
    stat_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual add and RMSNorm: ``(norm(x + residual), x + residual)``.

    The statistic reads the *rounded* sum, as eager PyTorch does.
    """
    stream = x + residual
    return (
        rms_norm(
            stream,
            dims,
            gain,
            bias,
            eps,
            floor=floor,
            stat_dtype=stat_dtype,
            norm_dtype=norm_dtype,
            out_dtype=out_dtype,
        ),
        stream,
    )


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    dims: Sequence[int],
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    stat_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual add and LayerNorm: ``(norm(x + residual), x + residual)``; rounded sum is read."""
    stream = x + residual
    return (
        layer_norm(
            stream,
            dims,
            gain,
            bias,
            eps,
            stat_dtype=stat_dtype,
            norm_dtype=norm_dtype,
            out_dtype=out_dtype,
        ),
        stream,
    )


def row_rstd(
    x: Tensor,
    dims: Sequence[int],
    eps: float = 1e-6,
    *,
    floor: bool = False,
    stat_dtype: torch.dtype | None = None,
) -> Tensor:
    """``rsqrt(mean(x²) + eps)`` over ``dims``, kept dims, in ``stat_dtype``.

    With ``floor``: ``rsqrt(max(mean(x²), eps))``.
    """
    return _rstd(x if stat_dtype is None else x.to(stat_dtype), dims, eps, floor)


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``(x Wᵀ)·scale + bias``: a linear layer whose row scale is applied after the product.

    Args:
        x: ``(..., in)``; weight: ``(out, in)``; scale: ``(..., 1)``, often float32; bias: ``(out,)``.

    The scale multiplies *before* the bias (FlashNorm, 2024, section 2: deferred normalization).
    """
    y = F.linear(x, weight) * scale
    if bias is not None:
        y = y + bias
    return y if out_dtype is None else y.to(out_dtype)


def center(x: Tensor, dims: Sequence[int], *, stat_dtype: torch.dtype | None = None) -> Tensor:
    """``x − mean(x, dims)``, computed in ``stat_dtype`` and returned in ``x``'s dtype."""
    h = x if stat_dtype is None else x.to(stat_dtype)
    return (h - h.mean(dims, keepdim=True)).to(x.dtype)


def gated_rms_norm(
    x: Tensor,
    dims: Sequence[int],
    gain: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    eps: float = 1e-6,
    *,
    gate_scale: float = 2.0,
    stat_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """GatedNorm: ``y ⊙ gate_scale·σ(silu(y downᵀ) upᵀ)`` with ``y = rms_norm(x)``.

    ``down`` is ``(r, d)``, ``up`` is ``(d, r)`` ("outlier-driven rescaling", 2026, section 3.4).
    With ``up = 0`` and ``gate_scale = 2`` the gate is exactly 1 in every dtype.
    """
    y = rms_norm(
        x,
        dims,
        gain,
        bias,
        eps,
        stat_dtype=stat_dtype,
        norm_dtype=norm_dtype,
        out_dtype=out_dtype,
    )
    return self_gate(y, down, up, gate_scale=gate_scale)


@contextlib.contextmanager
def _made_again() -> Iterator[None]:
    """While a compiler traces: what is made inside is made once more for the backward, not kept.

    For what is as large as the input and cheap to make. Eager autograd keeps what it keeps.
    """
    if not fx.traceback.has_preserved_node_meta():
        yield
        return
    meta = fx.traceback.current_meta
    outside = meta.get("recompute")
    meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    try:
        yield
    finally:
        del meta["recompute"]
        if outside is not None:
            meta["recompute"] = outside


def self_gate(y: Tensor, down: Tensor, up: Tensor, *, gate_scale: float = 2.0) -> Tensor:
    """The gate of :func:`gated_rms_norm` on a vector that is normalized already (LayerNorm…).

    ``y`` is ``(..., d)``, ``down`` ``(r, d)``, ``up`` ``(d, r)``; the result has ``y``'s dtype.
    """
    # On rows of a matrix the two parts of y's gradient are added by the product that makes one of
    # them (addmm). Behind a view they are not, and the norm's backward would read both, every time.
    flat = y.flatten(0, -2) if y.dim() > 2 and y.is_contiguous() else y
    inner = F.silu(F.linear(flat, down.to(y.dtype)))
    with _made_again():
        logits = F.linear(inner, up.to(y.dtype))
    gate = torch.sigmoid(logits)
    out = flat * (gate * gate_scale)
    return out if flat is y else out.view(y.shape)


def seed_norm(
    x: Tensor,
    dims: Sequence[int],
    gain: Tensor | None,
    bias: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    eps: float = 1e-6,
    *,
    heads: int = 1,
    stat_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """SeeDNorm: ``(tanh(x·βᵀ)·α + gain) ⊙ x/rms(x) + bias`` ("Self-rescaled dynamic norm", 2025).

    ``x`` is ``(..., d)``; ``alpha`` and ``beta`` are ``(d,)``. The dot product reads the raw input.
    With ``heads`` > 1 each of as many contiguous slices has its own dot product, while the RMS runs
    over all of ``d``. With ``beta = 0`` the result equals :func:`rms_norm` in every dtype.
    """
    h = x if stat_dtype is None else x.to(stat_dtype)
    y = h * _rstd(h, dims, eps)
    if norm_dtype is not None:
        y = y.to(norm_dtype)
    wide = h.to(_opmath(h.dtype))
    product = wide * beta.to(wide.dtype)
    score = torch.tanh(product.unflatten(-1, (heads, -1)).sum(-1, keepdim=True))
    dynamic = (score * alpha.to(wide.dtype).unflatten(-1, (heads, -1))).flatten(-2)
    if gain is None:
        y = y * (dynamic + 1).to(y.dtype)
    else:
        y = y * (dynamic.to(gain.dtype) + gain)
    if bias is not None:
        y = y + bias
    return y if out_dtype is None else y.to(out_dtype)


def ada_rms_norm(
    x: Tensor,
    dims: Sequence[int],
    gain: Tensor | None,
    bias: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    eps: float = 1e-6,
    *,
    ada_eps: float = 1e-6,
    stat_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """AdaRMSN: ``x/rms(x) · sqrt((mean((α⊙x + β)²) + ε₂)/(1 + ε₂))``, then gain and bias.

    After "Towards a graph transformer…" (PPGT, 2025), with two changes: the factor is divided by
    ``sqrt(1 + ε₂)``, so that ``alpha = 0, beta = 1`` is exactly :func:`rms_norm`, and the norm's own
    gain stays. ``alpha = 1, beta = 0`` undoes the normalization (up to the epsilons).
    """
    h = x if stat_dtype is None else x.to(stat_dtype)
    y = h * _rstd(h, dims, eps)
    wide = h.to(_opmath(h.dtype))
    inner = alpha.to(wide.dtype) * wide + beta.to(wide.dtype)
    square = inner.square().mean(dims, keepdim=True)
    # numerator and denominator are rounded alike, so their ratio is exactly 1 at insertion
    scale = torch.sqrt((square + ada_eps) / (torch.ones_like(square) + ada_eps))
    return _finish(y * scale.to(y.dtype), gain, bias, norm_dtype, out_dtype)


def _per_head(t: Tensor, heads: int) -> Tensor:
    """``(..., tokens, heads·w)`` to ``(..., heads, tokens, w)``."""
    return t.unflatten(-1, (heads, -1)).transpose(-2, -3)


def gate_heads(y: Tensor, x: Tensor, weight: Tensor, *, gate_scale: float = 2.0) -> Tensor:
    """Gated attention: ``y ⊙ gate_scale·σ(x Wᵀ)``, by head or by element.

    Args:
        y: ``(batch, heads, tokens, w)``, the output of attention.
        x: ``(batch, tokens, d)``, what the queries were computed from.
        weight: ``(heads, d)`` (one gate per head) or ``(heads·w, d)`` (one per element).

    ("Gated attention for large language models", 2025, position G1.) With ``weight = 0`` and
    ``gate_scale = 2`` the gate is exactly 1 in every dtype.
    """
    gate = torch.sigmoid(F.linear(x, weight.to(x.dtype)))
    return y * (_per_head(gate, y.shape[-3]) * gate_scale).to(y.dtype)


def affine_heads(
    y: Tensor,
    value: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Affine-scaled attention around a finished ``y = softmax(…) value``: ``α·y + β·Σ value``.

    ``α = clip((x Wᵀ + bias + 5)/10, 0, 1)`` per query and head, ``β = (mean − α)/N``, the sum runs
    over the keys a query sees and ``N`` is the number of *all* keys ("Affine-scaled attention",
    2026; the paper leaves ``N`` open: with the number of visible keys every row would sum to
    ``mean`` whatever ``α`` is).

    Args:
        y: ``(batch, heads, queries, w)``; value: ``(batch, kv heads, keys, w)``.
        x: ``(batch, queries, d)``; weight: ``(heads, d)``; bias: ``(heads,)``.
        mean: ``(heads,)`` the running mean of α.
        mask: bool, broadcastable to ``(batch, heads, queries, keys)``; True where a key is seen.
        is_causal: query ``i`` sees keys up to ``i``; needs as many queries as keys.

    Returns:
        The result and ``(heads,)`` the mean of α over batch and queries, detached.

    With ``weight = 0``, ``bias = 5`` and ``mean = 1`` the result equals ``y`` in every dtype.
    """
    heads = y.shape[-3]
    logits = F.linear(x, weight.to(x.dtype), bias.to(x.dtype))
    wide = _opmath(y.dtype)
    alpha = _per_head(((logits.to(wide) + 5) / 10).clamp(0, 1), heads)
    v = value.to(wide)
    if is_causal:
        seen = v.cumsum(-2)
    elif mask is not None:
        groups = heads // v.shape[-3]
        v = v if groups == 1 else v.repeat_interleave(groups, -3)
        seen = mask.to(wide) @ v
    else:
        seen = v.sum(-2, keepdim=True)
    seen = seen / value.shape[-2]
    if seen.shape[-3] != heads:
        seen = seen.repeat_interleave(heads // seen.shape[-3], -3)
    beta = mean.to(wide).reshape(-1, 1, 1) - alpha
    out = y * alpha.to(y.dtype) + (beta * seen).to(y.dtype)
    return out, alpha.detach().mean((-1, -2)).reshape(-1, heads).mean(0)


_lib.define(f"layer_norm(Tensor x, {_LAYER_ARGS}) -> Tensor")
_lib.define(f"rms_norm(Tensor x, {_RMS_ARGS}) -> Tensor")
_lib.define(f"add_layer_norm(Tensor x, Tensor residual, {_LAYER_ARGS}) -> (Tensor, Tensor)")
_lib.define(f"add_rms_norm(Tensor x, Tensor residual, {_RMS_ARGS}) -> (Tensor, Tensor)")
_lib.define(
    "crms_norm(Tensor x, Tensor? gain=None, Tensor? bias=None, float eps=1e-5, *, "
    "ScalarType? stat_dtype=None, ScalarType? norm_dtype=None, ScalarType? out_dtype=None) -> Tensor"
)
_lib.define(
    "row_rstd(Tensor x, int[] dims, float eps=1e-6, *, bool floor=False, "
    "ScalarType? stat_dtype=None) -> Tensor"
)
_lib.define(
    "scaled_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, *, "
    "ScalarType? out_dtype=None) -> Tensor"
)
_lib.define("center(Tensor x, int[] dims, *, ScalarType? stat_dtype=None) -> Tensor")
_lib.define(
    "gated_rms_norm(Tensor x, int[] dims, Tensor? gain, Tensor? bias, Tensor down, Tensor up, "
    "float eps=1e-6, *, float gate_scale=2.0, ScalarType? stat_dtype=None, "
    "ScalarType? norm_dtype=None, ScalarType? out_dtype=None) -> Tensor"
)

_lib.define("self_gate(Tensor y, Tensor down, Tensor up, *, float gate_scale=2.0) -> Tensor")
_lib.define(
    "seed_norm(Tensor x, int[] dims, Tensor? gain, Tensor? bias, Tensor alpha, Tensor beta, "
    "float eps=1e-6, *, int heads=1, ScalarType? stat_dtype=None, ScalarType? norm_dtype=None, "
    "ScalarType? out_dtype=None) -> Tensor"
)
_lib.define(
    "ada_rms_norm(Tensor x, int[] dims, Tensor? gain, Tensor? bias, Tensor alpha, Tensor beta, "
    "float eps=1e-6, *, float ada_eps=1e-6, ScalarType? stat_dtype=None, "
    "ScalarType? norm_dtype=None, ScalarType? out_dtype=None) -> Tensor"
)
_lib.define("gate_heads(Tensor y, Tensor x, Tensor weight, *, float gate_scale=2.0) -> Tensor")
_lib.define(
    "affine_heads(Tensor y, Tensor value, Tensor x, Tensor weight, Tensor bias, Tensor mean, *, "
    "Tensor? mask=None, bool is_causal=False) -> (Tensor, Tensor)"
)

_FORMULAS = {
    f.__name__: f
    for f in (
        layer_norm,
        rms_norm,
        crms_norm,
        add_rms_norm,
        add_layer_norm,
        row_rstd,
        scaled_linear,
        center,
        gated_rms_norm,
        self_gate,
        seed_norm,
        ada_rms_norm,
        gate_heads,
        affine_heads,
    )
}
for _name, _formula in _FORMULAS.items():
    _lib.impl(_name, _formula, "CompositeImplicitAutograd")

#: Vocabulary ops that are norms of their first argument, as graph targets.
NORM_OPS = frozenset(
    getattr(torch.ops.normfuse, name).default for name in ("layer_norm", "rms_norm", "crms_norm")
)


def _norm_shape(
    x: Tensor,
    dims: Sequence[int],
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    *,
    floor: bool = False,
    stat_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | None:
    if out_dtype is None or not x.is_contiguous():
        return None
    return torch.empty_like(x, dtype=out_dtype)


def _row_rstd_shape(
    x: Tensor,
    dims: Sequence[int],
    eps: float = 0.0,
    *,
    floor: bool = False,
    stat_dtype: torch.dtype | None = None,
) -> Tensor:
    kept = [1 if i - x.dim() in dims else s for i, s in enumerate(x.shape)]
    return x.new_empty(kept, dtype=stat_dtype or x.dtype)


#: Shape functions: the result on fake tensors without running the formula, ``None`` where only the
#: formula tells (layouts, promotion). Passes re-compute values often, and formulas are slow to fake.
SHAPES = {
    torch.ops.normfuse.layer_norm.default: _norm_shape,
    torch.ops.normfuse.rms_norm.default: _norm_shape,
    torch.ops.normfuse.row_rstd.default: _row_rstd_shape,
}


def formula(target: torch._ops.OpOverload):
    """The defining formula of a vocabulary op, given its graph target."""
    return _FORMULAS[target._schema.name.split("::")[1]]
