"""Members that work in a rotated basis: Conda (Adam in the momentum's singular basis) and ARO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Algorithm
from .muon import _Member
from .pipeline import Pipeline
from .stages import Batch, Momentum, Scale, Stage, StateSpec, UnitRMS, frobenius, safe_inverse


@dataclass(frozen=True)
class AdamInSingularBasis(Stage):
    """Conda: second moment and division in the singular basis of the momentum.

    The basis (right singular vectors for tall matrices, left for wide ones) is refreshed every
    ``gap`` steps from the momentum that already holds this step's gradient; the second moment is not
    rotated then. ``eps`` is added before bias correction, as released.
    """

    gap: int = 2000
    eps: float = 1e-8
    counts_steps: ClassVar[bool] = True

    @property
    def period(self) -> int | None:
        return self.gap

    def states(self, rows: int, cols: int) -> dict[str, StateSpec]:
        side = min(rows, cols)
        return {
            "exp_avg": StateSpec((rows, cols)),
            "exp_avg_sq": StateSpec((rows, cols)),
            "basis": StateSpec((side, side), "eye", torch.float32),
        }

    def flops(self, rows: int, cols: int) -> float:
        return 6.0 * rows * cols * min(rows, cols)

    @staticmethod
    def _average(batch: Batch) -> Tensor:
        m = batch.state["exp_avg"]
        return m + (1 - batch.hyper["beta1"]) * (batch.update - m)

    def refresh(self, batch: Batch) -> dict[str, Tensor]:
        m = self._average(batch)
        u, _, vh = torch.linalg.svd(m, full_matrices=False)
        return {"basis": vh if m.shape[-2] >= m.shape[-1] else u}

    def __call__(self, batch: Batch) -> Batch:
        b1, b2 = batch.hyper["beta1"], batch.hyper["beta2"]
        m, v, q = self._average(batch), batch.state["exp_avg_sq"], batch.state["basis"]
        q = q.to(m.dtype)
        tall = m.shape[-2] >= m.shape[-1]

        def into(x: Tensor) -> Tensor:
            return x @ q.mT if tall else q.mT @ x

        v = b2 * v + (1 - b2) * into(batch.update).square()
        n = into(m) / (v.sqrt() + self.eps)
        assert batch.step is not None
        step = batch.step.to(b1.dtype)
        correction = ((1 - b2**step).sqrt() / (1 - b1**step)).to(m.dtype)
        out = (n @ q if tall else q @ n) * correction
        return batch.with_(out, exp_avg=m, exp_avg_sq=v)


def _conda(group: Mapping[str, Any]) -> Pipeline:
    if not isinstance(group["gap"], int) or group["gap"] < 1:
        raise ValueError(f"gap must be a positive integer, got {group['gap']!r}")
    stages = (AdamInSingularBasis(group["gap"], group["eps"]), Scale("none", group["scale"]))
    return Pipeline(stages, ("betas",), decay_order="after")


class Conda(_Member):
    """Adam in the column-normalizing singular basis of its own momentum (2509.24218).

    ``gap`` steps between decompositions, ``scale`` on the update (0.25 in the published scripts).
    Weight decay follows the update.
    """

    algorithm: ClassVar[Algorithm] = Algorithm(
        "conda",
        _conda,
        {
            "lr": 1e-3,
            "weight_decay": 0.0,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "gap": 2000,
            "scale": 1.0,
        },
        unit=("betas",),
        positive=("eps", "scale"),
    )


# An operator of its own, like SinkGD's: unrolled into a graph it takes a compiler a minute.
@torch.library.custom_op("normfuse_optim::simultaneous_sinkhorn", mutates_args=())
def simultaneous_sinkhorn(x: Tensor, iterations: int = 5) -> Tensor:
    """Divide by row and column norms at once, ``iterations`` times; RMS 1 at the end."""
    size = (x.shape[-2] * x.shape[-1]) ** 0.5
    x = x * safe_inverse(frobenius(x))
    for _ in range(iterations):
        r = safe_inverse(torch.linalg.vector_norm(x, dim=-1, keepdim=True))
        c = safe_inverse(torch.linalg.vector_norm(x, dim=-2, keepdim=True))
        x = x * r * c
        x = x * safe_inverse(frobenius(x))
    return (x * size).contiguous()


@simultaneous_sinkhorn.register_fake
def _(x, iterations=5):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rows_to_unit_rms(x: Tensor) -> Tensor:
    length = x.shape[-1] ** 0.5
    return x * (length * safe_inverse(torch.linalg.vector_norm(x, dim=-1, keepdim=True)))


#: Maps ARO may rotate; none may be rotation-equivariant, or the rotation cancels.
BASE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "sinkhorn": simultaneous_sinkhorn,
    "rows": rows_to_unit_rms,
    "sign": torch.sign,
}


@dataclass(frozen=True)
class Rotate(Stage):
    """ARO: ``R·f(Rᵀ·M)`` with ``R`` the orthogonal factor of ``M·f(R_prevᵀ·M)ᵀ``.

    Householder QR with the diagonal of its triangular factor made positive. ``side``: ``"short"``
    rotates the shorter side; ``"rows"`` always the rows (the paper's residual-stream dimension),
    where a tall matrix leaves the trailing columns of the rotation to rounding noise, which the base
    map then amplifies.
    """

    base: str = "sinkhorn"
    side: str = "short"

    def _rotates_cols(self, rows: int, cols: int) -> bool:
        return self.side == "short" and cols < rows

    def states(self, rows: int, cols: int) -> dict[str, StateSpec]:
        n = cols if self._rotates_cols(rows, cols) else rows
        return {"rotation": StateSpec((n, n), "eye", torch.float32)}

    def flops(self, rows: int, cols: int) -> float:
        n = cols if self._rotates_cols(rows, cols) else rows
        return 8.0 * n * rows * cols + 8.0 * n**3

    def __call__(self, batch: Batch) -> Batch:
        m, r = batch.update, batch.state["rotation"]
        turned = self._rotates_cols(*m.shape[-2:])
        x = m.mT if turned else m
        x = x * safe_inverse(frobenius(x))  # f and the orthogonal factor have no scale
        f = BASE_MAPS[self.base]
        r = r.to(x.dtype)
        q, upper = torch.linalg.qr(x @ f(r.mT @ x).mT)
        sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(x.dtype)
        q = q * sign[:, None, :]
        out = q @ f(q.mT @ x)
        return batch.with_(out.mT if turned else out, rotation=q)


def _aro(group: Mapping[str, Any]) -> Pipeline:
    if group["base"] not in BASE_MAPS or group["side"] not in ("rows", "short"):
        raise ValueError(
            f"base must be one of {sorted(BASE_MAPS)} and side 'rows' or 'short', got "
            f"{group['base']!r}, {group['side']!r}"
        )
    stages = (
        Momentum("ema", nesterov=False),
        Rotate(group["base"], group["side"]),
        UnitRMS(group["rms"]),
    )
    return Pipeline(stages, ("momentum",))


class ARO(_Member):
    """Adaptively rotated optimization (2602.09006): a base map applied in a learned rotation.

    ``base`` map (``"sinkhorn"``, ``"rows"``, ``"sign"``), updates of RMS ``rms`` 0.2. Defaults of β
    and RMS come from public ports; the paper's own are not published with code.
    """

    algorithm: ClassVar[Algorithm] = Algorithm(
        "aro",
        _aro,
        {
            "lr": 1e-3,
            "weight_decay": 0.0,
            "momentum": 0.95,
            "base": "sinkhorn",
            "side": "short",
            "rms": 0.2,
        },
        unit=("momentum",),
        positive=("rms",),
    )
