"""Members that adapt per entry: AdamW, and AdamP and SGDP, which remove the radial part of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .base import Algorithm, register
from .muon import _Member
from .pipeline import Pipeline
from .stages import Batch, Stage, StateSpec


@dataclass(frozen=True)
class AdamMoments(Stage):
    """``m̂ / (√v̂ + eps)`` with bias correction; ``nesterov`` looks one gradient ahead."""

    eps: float = 1e-8
    nesterov: bool = False
    elementwise: ClassVar[bool] = True
    transposable: ClassVar[bool] = True
    counts_steps: ClassVar[bool] = True

    def states(self, rows: int, cols: int) -> dict[str, StateSpec]:
        return {"exp_avg": StateSpec((rows, cols)), "exp_avg_sq": StateSpec((rows, cols))}

    def __call__(self, batch: Batch) -> Batch:
        g, b1, b2 = batch.update, batch.hyper["beta1"], batch.hyper["beta2"]
        m, v = batch.state["exp_avg"], batch.state["exp_avg_sq"]
        m = torch.lerp(m, g, (1 - b1).to(g.dtype))
        v = torch.addcmul(b2 * v, (1 - b2) * g, g)  # lerp makes NaN of squares that overflow
        assert batch.step is not None
        step = batch.step.to(b1.dtype)
        root, first = (1 - b2**step).sqrt(), 1 - b1**step
        top = torch.lerp(g, m, b1.to(g.dtype)) if self.nesterov else m
        # m/first / (√v/root + eps), the corrections multiplied out: they are numbers, not matrices
        bottom = v.sqrt() * (first / root).to(g.dtype) + (first * self.eps).to(g.dtype)
        return batch.with_(top / bottom, exp_avg=m, exp_avg_sq=v)


@dataclass(frozen=True)
class RemoveRadial(Stage):
    """AdamP/SGDP: drop the part of the update along the weight where gradient ⟂ weight.

    Tried per row (``[out, rest]``), then over the whole tensor; the first view in which every
    ``|cos(grad, weight)|`` is below ``delta/√length`` is used, and the weight decay of that tensor
    becomes ``wd_ratio``. 0-D and 1-D parameters are left alone.
    """

    delta: float = 0.1
    wd_ratio: float = 0.1
    eps: float = 1e-8
    reads_param: ClassVar[bool] = True
    reads_ndim: ClassVar[bool] = True

    def __call__(self, batch: Batch) -> Batch:
        p, g, u = batch.param, batch.grad, batch.update
        assert p is not None
        flat_p, flat_g, flat_u = (x.flatten(1).unsqueeze(1) for x in (p, g, u))
        eligible = batch.constants["is_vector"] == 0
        by_row = eligible & self._orthogonal(g, p)
        by_all = eligible & ~by_row & self._orthogonal(flat_g, flat_p)
        rows, whole = self._project(u, p), self._project(flat_u, flat_p).view_as(u)
        out = torch.where(by_row, rows, torch.where(by_all, whole, u))
        ratio = torch.where(by_row | by_all, self.wd_ratio, 1.0).to(u.dtype)
        decay = ratio if batch.decay is None else ratio * batch.decay
        return replace(batch.with_(out), decay=decay)

    def _orthogonal(self, g: Tensor, p: Tensor) -> Tensor:
        cos = cosine_similarity(g, p, dim=-1, eps=self.eps).abs()
        limit = self.delta / math.sqrt(g.shape[-1])
        return (cos.amax(-1) < limit)[:, None, None]

    def _project(self, u: Tensor, p: Tensor) -> Tensor:
        unit = p / (torch.linalg.vector_norm(p, dim=-1, keepdim=True) + self.eps)
        return u - unit * (unit * u).sum(-1, keepdim=True)


@dataclass(frozen=True)
class Dampened(Stage):
    """``buf = μ·buf + (1-dampening)·g``; SGDP's momentum. Divides the decay by ``1-μ``."""

    dampening: float = 0.0
    nesterov: bool = False
    elementwise: ClassVar[bool] = True
    transposable: ClassVar[bool] = True

    def states(self, rows: int, cols: int) -> dict[str, StateSpec]:
        return {"momentum_buffer": StateSpec((rows, cols))}

    def __call__(self, batch: Batch) -> Batch:
        g, mu = batch.update, batch.hyper["momentum"]
        buf = mu * batch.state["momentum_buffer"] + (1 - self.dampening) * g
        out = batch.with_(g + mu * buf if self.nesterov else buf, momentum_buffer=buf)
        ones = torch.ones_like(g[:, :1, :1])
        return replace(out, decay=ones / (1 - mu))


_ADAM = {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}


def _adamw(group: Mapping[str, Any]) -> Pipeline:
    cautious = bool(group.get("cautious", False))
    return Pipeline((AdamMoments(group["eps"]),), ("betas",), matrix=False, cautious=cautious)


#: Also the algorithm of groups with ``algorithm="adamw"`` in any member, with the defaults usual
#: beside Muon.
ADAMW = register(
    Algorithm(
        "adamw",
        _adamw,
        {"lr": 3e-4, "weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-8},
        unit=("betas",),
        positive=("eps",),
    )
)


class AdamW(_Member):
    """AdamW with ``torch.optim.AdamW``'s defaults, on the family's machinery."""

    algorithm: ClassVar[Algorithm] = ADAMW

    @classmethod
    def _own_defaults(cls) -> dict[str, Any]:
        return {**_ADAM, "weight_decay": 1e-2}


def _adamp(group: Mapping[str, Any]) -> Pipeline:
    moments = AdamMoments(group["eps"], bool(group["nesterov"]))
    radial = RemoveRadial(group["delta"], group["wd_ratio"], group["eps"])
    return Pipeline((moments, radial), ("betas",), matrix=False)


class AdamP(_Member):
    """AdamW whose update loses its radial part on scale-invariant weights (2006.08217)."""

    algorithm: ClassVar[Algorithm] = Algorithm(
        "adamp",
        _adamp,
        {**_ADAM, "delta": 0.1, "wd_ratio": 0.1, "nesterov": False},
        unit=("betas",),
        positive=("eps", "delta", "wd_ratio"),
    )


def _sgdp(group: Mapping[str, Any]) -> Pipeline:
    first = Dampened(float(group["dampening"]), bool(group["nesterov"]))
    radial = RemoveRadial(group["delta"], group["wd_ratio"], group["eps"])
    return Pipeline((first, radial), ("momentum",), matrix=False)


class SGDP(_Member):
    """SGD with momentum, with the same projection; its decay is divided by ``1 - momentum``."""

    algorithm: ClassVar[Algorithm] = Algorithm(
        "sgdp",
        _sgdp,
        {
            "lr": 1e-3,
            "weight_decay": 0.0,
            "momentum": 0.0,
            "dampening": 0.0,
            "nesterov": False,
            "eps": 1e-8,
            "delta": 0.1,
            "wd_ratio": 0.1,
        },
        unit=("momentum",),
        positive=("eps", "delta", "wd_ratio", "dampening"),
    )
