"""Members that orthogonalize or imitate it: Muon, NorMuon, ROOT, AuON, HybridAuON, MuonMuP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from . import coefficients as co
from . import polar
from .base import Algorithm, MatrixOptimizer
from .coefficients import CoefficientSpec
from .pipeline import Pipeline
from .stages import (
    SCALE_RULES,
    Batch,
    ClipOutliers,
    DivideByCosh,
    Momentum,
    NormalizeSecondMoment,
    Orthogonalize,
    Scale,
    Stage,
    UnitFrobenius,
    UnitSpectral,
    frobenius,
    safe_inverse,
)

JORDAN = (3.4445, -4.7750, 2.0315)

#: Group entries of every member that runs Newton–Schulz.
_NS_DEFAULTS: dict[str, Any] = {
    "ns_coefficients": JORDAN,
    "ns_steps": 5,
    "ns_dtype": None,
    "ns_method": "auto",
    "normalization": "frobenius",
    "eps": 0.0,
}
_MOMENTUM_DEFAULTS: dict[str, Any] = {
    "lr": 2e-2,
    "weight_decay": 0.0,
    "momentum": 0.95,
    "nesterov": True,
    "momentum_style": "ema",
    "adjust_lr_fn": None,
    "cautious": False,
}


def ns_settings(group: Mapping[str, Any]) -> polar.Settings:
    return polar.settings(
        coefficients=group["ns_coefficients"],
        steps=group["ns_steps"],
        method=group["ns_method"],
        normalization=group["normalization"],
        eps=group["eps"],
        ns_dtype=group["ns_dtype"],
    )


def momentum(group: Mapping[str, Any]) -> Momentum:
    if group["momentum_style"] not in ("ema", "heavy_ball"):
        raise ValueError(
            f"momentum_style must be 'ema' or 'heavy_ball', got {group['momentum_style']!r}"
        )
    return Momentum(group["momentum_style"], bool(group["nesterov"]))


def scale(group: Mapping[str, Any]) -> Scale:
    rule = group["adjust_lr_fn"]
    rule = "original" if rule is None else rule
    if rule not in SCALE_RULES:
        raise ValueError(
            f"Adjust learning rate function {rule} is not supported; one of "
            f"{', '.join(SCALE_RULES)}"
        )
    return Scale(rule)


def _pipeline(group: Mapping[str, Any], *stages: Stage, hyper: tuple[str, ...] = ()) -> Pipeline:
    return Pipeline(stages, ("momentum", *hyper), cautious=bool(group["cautious"]))


def _muon(group: Mapping[str, Any]) -> Pipeline:
    period = group["block_period"]
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise ValueError(f"block_period must be a positive integer, got {period!r}")
    return _pipeline(group, momentum(group), Orthogonalize(ns_settings(group)), scale(group))


MUON = Algorithm(
    "muon",
    _muon,
    {**_MOMENTUM_DEFAULTS, **_NS_DEFAULTS, "block_period": 1, "block_lr": 1.0},
    positive=("momentum", "eps", "block_lr"),
)


class Muon(MatrixOptimizer):
    """Momentum, orthogonalized (Jordan et al.), with ``torch.optim.Muon``'s arguments.

    Differences from torch: 2-D parameters only unless the group says ``view``; ``eps`` defaults to 0
    (exact scale invariance) instead of 1e-7; the iteration runs in ``ns_dtype`` (float32 on CPUs)
    instead of always bfloat16; a group with ``algorithm="adamw"`` is updated by AdamW.

    Args:
        adjust_lr_fn: ``None``/``"original"`` (``√max(1, r/c)``), ``"match_rms_adamw"``
            (``0.2·√max(r, c)``, Moonlight), ``"spectral"`` (``√(r/c)``) or ``"none"``.
        momentum_style: ``"ema"``, or ``"heavy_ball"`` as in Moonlight; the same direction, since
            the polar factor has no scale.
        cautious: decay only the entries that the update shrinks.
        block_period: for DTensor parameters, 2 or more: only every so many steps, from the first on,
            whole matrices are orthogonalized; in between each rank orthogonalizes its own shard,
            scaled by the shard's shape, without communication (MuonBP). The result then depends on
            the sharding. Plain parameters are whole at every step.
        block_lr: factor on the learning rate in the steps in between.
    """

    algorithm: ClassVar[Algorithm] = MUON

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: CoefficientSpec = JORDAN,
        eps: float = 0.0,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        momentum_style: str = "ema",
        ns_dtype: torch.dtype | None = None,
        ns_method: str = "auto",
        normalization: str = "frobenius",
        cautious: bool = False,
        block_period: int = 1,
        block_lr: float = 1.0,
        compile: bool = False,
        non_finite: str = "skip",
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "momentum_style": momentum_style,
            "ns_dtype": ns_dtype,
            "ns_method": ns_method,
            "normalization": normalization,
            "cautious": cautious,
            "block_period": block_period,
            "block_lr": block_lr,
        }
        super().__init__(params, defaults, compile=compile, non_finite=non_finite)


class _Member(MatrixOptimizer):
    """A member whose keyword arguments are its algorithm's group entries."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor | None = None,
        weight_decay: float | None = None,
        *,
        compile: bool = False,
        non_finite: str = "skip",
        **entries: Any,
    ) -> None:
        unknown = sorted(set(entries) - set(self.algorithm.defaults))
        if unknown:
            raise TypeError(
                f"{type(self).__name__} takes no argument {unknown[0]!r}; it takes "
                f"{', '.join(sorted(self.algorithm.defaults))}"
            )
        if lr is not None:
            entries["lr"] = lr
        if weight_decay is not None:
            entries["weight_decay"] = weight_decay
        super().__init__(params, entries, compile=compile, non_finite=non_finite)


def _normuon(group: Mapping[str, Any]) -> Pipeline:
    form, reduce = group["form"], group["reduce"]
    if form not in ("code", "paper") or reduce not in ("cols", "rows", "short"):
        raise ValueError(
            f"form must be 'code' or 'paper' and reduce 'cols', 'rows' or 'short'; got {form!r}, "
            f"{reduce!r}"
        )
    second = NormalizeSecondMoment(reduce, form)
    last = scale(group) if form == "code" else Scale()
    ortho = Orthogonalize(ns_settings(group))
    return _pipeline(group, momentum(group), ortho, second, last, hyper=("beta2",))


class NorMuon(_Member):
    """Muon with a running second moment per row of the orthogonalized direction (2510.05491).

    ``form="code"`` (default, as released) restores the direction's Frobenius norm and scales like
    Muon; ``form="paper"`` makes every update's RMS ``0.2·lr``. ``reduce``: dimension averaged over,
    ``"cols"`` (released), ``"rows"`` or ``"short"`` (modded-nanogpt). ``beta2`` 0.95.
    """

    algorithm: ClassVar[Algorithm] = Algorithm(
        "normuon",
        _normuon,
        {
            **_MOMENTUM_DEFAULTS,
            **_NS_DEFAULTS,
            "beta2": 0.95,
            "form": "code",
            "reduce": "cols",
        },
        unit=("beta2",),
        positive=("momentum", "eps"),
    )


#: ROOT's published coefficients by (min, max) of the shape; any other shape uses Jordan's.
ROOT_COEFFICIENTS: dict[tuple[int, int], co.Triple] = {
    (2048, 2048): (3.4916, -4.8224, 2.1095),
    (2048, 3072): (3.4509, -4.5790, 1.9325),
    (2048, 8192): (2.9794, -3.6674, 1.6207),
    (2048, 16384): (3.1943, -3.8221, 1.5322),
}


@dataclass(frozen=True)
class ShapeKeyedOrthogonalize(Stage):
    """ROOT: Newton–Schulz with coefficients looked up by shape.

    With ``guarded`` a tuple whose certified band leaves [0, 2] after the given number of steps is
    replaced by Jordan's: the published 2048² tuple overshoots its unstable fixed point, and a
    singular value of 0.559 becomes 3.31 after five steps and 679 after six.
    """

    settings: polar.Settings
    guarded: bool = True
    transposable: ClassVar[bool] = True

    def schedule(self, rows: int, cols: int) -> co.Schedule:
        steps = len(self.settings.schedule)
        triple = ROOT_COEFFICIENTS.get((min(rows, cols), max(rows, cols)), JORDAN)
        chosen = (triple,) * steps
        if self.guarded and co.certify(chosen, 0.0, 1.001).high > co.MAX_GAIN:
            return (JORDAN,) * steps
        return chosen

    def __call__(self, batch: Batch) -> Batch:
        s = self.settings._replace(schedule=self.schedule(*batch.update.shape[-2:]))
        return batch.with_(polar.apply_settings(batch.update, s))


def _root(group: Mapping[str, Any]) -> Pipeline:
    if not 0 <= group["quantile"] <= 1:
        raise ValueError(f"quantile must lie in [0, 1], got {group['quantile']}")
    ortho: Stage = Orthogonalize(ns_settings(group))
    if group["shape_coefficients"]:
        ortho = ShapeKeyedOrthogonalize(ns_settings(group), group["shape_coefficients"] != "raw")
    clip = ClipOutliers(float(group["quantile"]))
    return _pipeline(group, momentum(group), clip, ortho, scale(group))


class ROOT(_Member):
    """Muon on momentum whose outliers are clipped, with coefficients by shape (2511.20626).

    ``quantile`` 0.9: magnitudes above it are clamped. ``shape_coefficients``: ``True`` the published
    table where it is stable, ``"raw"`` all of it, ``False`` only ``ns_coefficients``.
    """

    algorithm: ClassVar[Algorithm] = Algorithm(
        "root",
        _root,
        {
            **_MOMENTUM_DEFAULTS,
            **_NS_DEFAULTS,
            "lr": 1e-3,
            "weight_decay": 0.1,
            "momentum_style": "heavy_ball",
            "adjust_lr_fn": "match_rms_adamw",
            "quantile": 0.9,
            "shape_coefficients": True,
        },
        positive=("momentum", "eps"),
    )


@dataclass(frozen=True)
class CoshOfUnit(Stage):
    """AuON as released: ``G / (RMS(cosh(1.5·G/‖G‖_F)) + eps)``, the magnitude of ``G`` kept."""

    factor: float = 1.5
    eps: float = 1e-8
    transposable: ClassVar[bool] = True

    def __call__(self, batch: Batch) -> Batch:
        u = batch.update
        unit = batch.with_(u * safe_inverse(frobenius(u)))
        shrunk = DivideByCosh(self.factor, self.eps)(unit).update
        return batch.with_(shrunk * frobenius(u))


def _auon(group: Mapping[str, Any], first: tuple[Stage, ...] = (UnitFrobenius(),)) -> Pipeline:
    if group["form"] not in ("paper", "code"):
        raise ValueError(f"form must be 'paper' or 'code', got {group['form']!r}")
    tail: tuple[Stage, ...] = (*first, DivideByCosh())
    if group["form"] == "code" and first == (UnitFrobenius(),):
        tail = (CoshOfUnit(),)
    elif group["form"] == "code":
        tail = (*first, DivideByCosh(1.5))
    return _pipeline(group, momentum(group), *tail, scale(group))


def _hybrid(group: Mapping[str, Any]) -> Pipeline:
    return _auon(group, (Orthogonalize(ns_settings(group)),))


_AUON = {**_MOMENTUM_DEFAULTS, "lr": 0.24, "adjust_lr_fn": "none", "form": "paper"}


class AuON(_Member):
    """Frobenius-normalized momentum divided by RMS(cosh) (2509.24320); *not* orthogonal.

    The divisor is ``1 + 1/(2rc)`` to machine precision, so the paper's form is normalized momentum
    and ``form="code"`` (cosh of 1.5 times the normalized matrix, applied to the raw momentum) is
    Nesterov SGD. The update's RMS is ``1/√(rc)``: learning rates are about ``√(rc)`` times Muon's.
    """

    algorithm: ClassVar[Algorithm] = Algorithm("auon", _auon, _AUON, positive=("momentum",))


class HybridAuON(_Member):
    """AuON after one Newton–Schulz step (``ns_steps`` to change; the released default is 5)."""

    algorithm: ClassVar[Algorithm] = Algorithm(
        "hybrid_auon", _hybrid, {**_NS_DEFAULTS, **_AUON, "ns_steps": 1}, positive=("momentum",)
    )


def _mup(group: Mapping[str, Any]) -> Pipeline:
    ortho = Orthogonalize(ns_settings(group))
    return _pipeline(group, momentum(group), ortho, UnitSpectral(), scale(group))


class MuonMuP(_Member):
    """Muon with the μP spectral condition on updates: ``‖ΔW‖₂ = lr·√(out/in)`` (2310.17813).

    The orthogonalized direction is divided by its largest singular value (two power iterations) and
    scaled by ``√(r/c)``, so that a learning rate transfers across widths. This is the spectral
    condition, not the algorithm published as Muon++.
    """

    algorithm: ClassVar[Algorithm] = Algorithm(
        "muon_mup",
        _mup,
        {**_MOMENTUM_DEFAULTS, **_NS_DEFAULTS, "adjust_lr_fn": "spectral"},
        positive=("momentum", "eps"),
    )


def spectral_init_(weight: torch.Tensor, iterations: int = 20) -> torch.Tensor:
    """Rescale ``weight [out, in]`` in place to spectral norm ``√(out/in)``, μP's initial condition."""
    with torch.no_grad():
        flat = weight.detach().reshape(1, weight.shape[0], -1)
        unit = UnitSpectral(iterations)
        batch = Batch(flat, flat, None, {}, {}, {})
        out, cols = flat.shape[-2:]
        weight.copy_((unit(batch).update * (out / cols) ** 0.5).reshape(weight.shape))
    return weight
