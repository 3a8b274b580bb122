"""Members that normalize instead of orthogonalizing, without state: SCALE, SinkGD, SWAN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import Algorithm
from .muon import _Member
from .pipeline import Pipeline
from .stages import Momentum, NormalizeLines, Scale, Sinkhorn, Stage, StandardizeRows, Whiten


def _scale(group: Mapping[str, Any]) -> Pipeline:
    if group["lines"] not in ("rows", "cols"):
        raise ValueError(f"lines must be 'rows' or 'cols', got {group['lines']!r}")
    lines = NormalizeLines(-1 if group["lines"] == "rows" else -2, group["eps"])
    if not group["head"]:
        return Pipeline((lines,))
    return Pipeline((Momentum("ema", nesterov=False), lines), ("momentum",))


class SCALE(_Member):
    """Gradient with every output unit's row at RMS 1; momentum on the head only (2506.16659).

    A group with ``head=True`` (the LM head) averages its gradient with ``momentum`` 0.9 first, the
    only state there is; ``lines="cols"`` suits embeddings stored ``[tokens, width]``.
    """

    algorithm: ClassVar[Algorithm] = Algorithm(
        "scale",
        _scale,
        {
            "lr": 1e-3,
            "weight_decay": 0.0,
            "momentum": 0.9,
            "head": False,
            "lines": "rows",
            "eps": 1e-8,
        },
        unit=("momentum",),
        positive=("eps",),
    )


def _sinkgd(group: Mapping[str, Any]) -> Pipeline:
    if type(group["iterations"]) is not int or group["iterations"] < 1:
        raise ValueError(f"iterations must be a positive integer, got {group['iterations']!r}")
    factor = float(group["scale"])
    stages: tuple[Stage, ...] = (Sinkhorn(group["iterations"]), Scale("none", factor))
    return Pipeline(stages, decay_factor=factor)


class SinkGD(_Member):
    """Gradient multi-normalization: alternating row and column RMS 1 (2502.06742), stateless.

    ``scale`` 0.05 multiplies the learning rate, of the update and of the weight decay.
    """

    algorithm: ClassVar[Algorithm] = Algorithm(
        "sinkgd",
        _sinkgd,
        {"lr": 1e-3, "weight_decay": 0.0, "iterations": 5, "scale": 0.05},
        positive=("scale",),
    )


def _swan(group: Mapping[str, Any]) -> Pipeline:
    if type(group["iterations"]) is not int or group["iterations"] < 1:
        raise ValueError(f"iterations must be a positive integer, got {group['iterations']!r}")
    stages = (StandardizeRows(), Whiten(group["iterations"]), Scale("none", group["scale"]))
    return Pipeline(stages)


class SWAN(_Member):
    """Row-standardized, then whitened gradient at its own norm (2412.13148), stateless.

    ``iterations`` of the coupled Newton whitening (default 10; ports use 6, which leaves singular
    values of a Gaussian 64×256 at 0.67 and above).
    """

    algorithm: ClassVar[Algorithm] = Algorithm(
        "swan",
        _swan,
        {"lr": 1e-3, "weight_decay": 0.0, "iterations": 10, "scale": 1.0},
        positive=("scale",),
    )
