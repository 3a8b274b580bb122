"""Norms as plain modules, for people who build models by hand.

On CUDA and ROCm they call the kernels when those can compute the very function; elsewhere (CPU,
float64, no triton, under ``torch.compile``) the vocabulary op, which the compiler sees through.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..passes import ops
from .activations import ACTIVATIONS
from .lower_kernels import kernels_for

__all__ = ["GatedRMSNorm", "LayerNorm", "NormLinear", "RMSNorm"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _stat(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _kernels_for(*tensors: Tensor | None):
    """The kernel ops if every tensor is on one GPU in a dtype they take, else ``None``."""
    present = [t for t in tensors if t is not None]
    if not present[0].is_cuda or torch.compiler.is_compiling():
        return None
    if any(t.dtype not in _DTYPES or t.device != present[0].device for t in present):
        return None
    return kernels_for(present[0].device)


class _Norm(nn.Module):
    """Gain and bias over the last dim; the statistic in float32, gain and bias applied in float32."""

    _center = False

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        gain: bool = True,
        bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim, **factory)) if gain else None
        self.bias = nn.Parameter(torch.zeros(dim, **factory)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """``norm(x)``, or ``(norm(x + residual), x + residual)``."""
        op = _kernels_for(x, self.weight, self.bias, residual)
        stream = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        stat = _stat(stream)
        if op is not None and (residual is None or residual.shape == x.shape):
            rest = (
                self.weight,
                self.bias,
                self.eps,
                "layer" if self._center else "rms",
                stat,
                stream,
            )
            if residual is None:
                return op.norm(x, *rest)[0]
            return op.add_norm(x, residual, *rest)[:2]
        nf = torch.ops.normfuse
        args = ([-1], self.weight, self.bias, self.eps)
        casts = {"stat_dtype": stat, "norm_dtype": stat, "out_dtype": stream}
        if residual is None:
            return (nf.layer_norm if self._center else nf.rms_norm)(x, *args, **casts)
        pair = nf.add_layer_norm if self._center else nf.add_rms_norm
        return pair(x, residual, *args, **casts)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, eps={self.eps}, gain={self.weight is not None}, "
            f"bias={self.bias is not None}"
        )


class RMSNorm(_Norm):
    """``x·rsqrt(mean(x²) + eps)·weight + bias`` over the last dim."""


class LayerNorm(_Norm):
    """LayerNorm over the last dim."""

    _center = True

    def __init__(self, dim: int, eps: float = 1e-5, *, bias: bool = True, **options) -> None:
        super().__init__(dim, eps, bias=bias, **options)


class GatedRMSNorm(_Norm):
    """RMSNorm gated by its own low-rank projection; starts as the plain norm (``up = 0``)."""

    def __init__(self, dim: int, rank: int = 16, eps: float = 1e-6, **options) -> None:
        super().__init__(dim, eps, **options)
        factory = {k: options[k] for k in ("device", "dtype") if k in options}
        self.rank = rank
        self.down = nn.Parameter(torch.empty(rank, dim, **factory))
        self.up = nn.Parameter(torch.zeros(dim, rank, **factory))
        nn.init.normal_(self.down, std=dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        stat = _stat(x.dtype)
        op = (
            _kernels_for(x, self.weight, self.bias, self.down, self.up) if self.rank <= 64 else None
        )
        affine = (self.weight, self.bias, self.down, self.up, self.eps)
        if op is not None:
            return op.gated_norm(x, *affine, 2.0, stat, x.dtype)[0]
        return torch.ops.normfuse.gated_rms_norm(
            x, [-1], *affine, gate_scale=2.0, stat_dtype=stat, norm_dtype=stat, out_dtype=x.dtype
        )


class NormLinear(nn.Module):
    """``activation(norm(x) weightᵀ + bias)``: a gainless norm and a linear layer in one product.

    Args:
        glu: ``weight`` holds gate rows, then up rows; the result is ``activation(gate)·up``.
        center: LayerNorm instead of RMSNorm.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str = "identity",
        glu: bool = False,
        center: bool = False,
        eps: float = 1e-6,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}")
        rows = out_features * (2 if glu else 1)
        self.activation, self.glu, self.center, self.eps = activation, glu, center, eps
        self.weight = nn.Parameter(torch.empty(rows, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(rows, device=device, dtype=dtype)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        op = _kernels_for(x, self.weight, self.bias)
        # autocast chooses the product's dtype, which kernels do not see
        casting = torch.is_autocast_enabled(x.device.type)
        if op is not None and x.dtype == self.weight.dtype and not casting:
            kind = "layer" if self.center else "rms"
            weights, biases = (self.weight, None), (self.bias, None)
            if self.glu:
                weights = self.weight.chunk(2)
                biases = biases if self.bias is None else self.bias.chunk(2)
            (gate, up), (bias, up_bias) = weights, biases
            rest = (self.eps, kind, self.activation, None)
            return op.norm_linear(x, gate, bias, None, up, up_bias, None, *rest)[0]
        stat = _stat(x.dtype)
        norm = ops.layer_norm if self.center else ops.rms_norm
        h = norm(x, [-1], eps=self.eps, stat_dtype=stat, norm_dtype=stat, out_dtype=x.dtype)
        z = F.linear(h, self.weight, self.bias)
        act = ACTIVATIONS[self.activation]
        if not self.glu:
            return act(z)
        gate, up = z.chunk(2, -1)
        return act(gate) * up

    def extra_repr(self) -> str:
        return (
            f"{self.weight.shape[1]}, {self.weight.shape[0]}, activation={self.activation!r}, "
            f"glu={self.glu}, center={self.center}, eps={self.eps}"
        )
