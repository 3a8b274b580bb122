"""Spectral diagnostics of weights: cheap enough to call every few hundred steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def as_matrix(weight: Tensor) -> Tensor:
    """``[rows, cols]`` float32 (float64 stays) view of a weight; convolutions are flattened."""
    if weight.ndim < 2:
        raise ValueError(f"a matrix is needed, got shape {tuple(weight.shape)}")
    w = weight.detach().reshape(weight.shape[0], -1)
    return w if w.dtype == torch.float64 else w.float()


def stable_rank(weight: Tensor, iterations: int = 8) -> float:
    """``‖W‖_F² / ‖W‖₂²`` by power iteration on the shorter side."""
    w = as_matrix(weight)
    gram = w @ w.mT if w.shape[0] <= w.shape[1] else w.mT @ w
    total = float(gram.diagonal().sum())
    if total == 0:
        return 0.0
    v = gram[int(gram.diagonal().argmax())]
    for _ in range(iterations):
        v = gram @ (v / v.norm())
    return total / float(v.norm())


def singular_summary(weight: Tensor) -> dict[str, float]:
    """Largest, smallest, median singular value, stable rank, effective rank (entropy)."""
    s = torch.linalg.svdvals(as_matrix(weight)).double()
    energy = s.square()
    total = float(energy.sum())
    if total == 0:
        return {"max": 0.0, "min": 0.0, "median": 0.0, "stable_rank": 0.0, "effective_rank": 0.0}
    share = s / s.sum()
    entropy = -(share * share.clamp(min=1e-300).log()).sum()
    return {
        "max": float(s[0]),
        "min": float(s[-1]),
        "median": float(s.median()),
        "stable_rank": total / float(energy[0]),
        "effective_rank": float(entropy.exp()),
    }


def heavy_tail_exponent(
    weight: Tensor, *, aspect: float = 1.0, side: int = 2000, windows: int = 10
) -> float:
    """Hill exponent of the spectrum's upper half, over windows of one aspect ratio.

    The exponent of a whole matrix depends on its shape; windows of a fixed ``aspect`` (rows over
    columns), at most ``side`` rows and ``windows`` positions along each axis, make layers comparable
    (2506.06280). ``1 + k / Σ log(λ_i/λ_min)`` over the largest half of all windows' eigenvalues.
    """
    w = as_matrix(weight)
    rows, cols = w.shape
    height = max(1, min(rows, side, int(cols * aspect)))
    width = max(1, min(cols, round(height / aspect)))
    values = []
    for top in _starts(rows, height, windows):
        for left in _starts(cols, width, windows):
            window = w[top : top + height, left : left + width]
            values.append(torch.linalg.svdvals(window).double().square())
    eigenvalues = torch.cat(values).sort().values
    eigenvalues = eigenvalues[eigenvalues > 0]
    if len(eigenvalues) < 4:
        return float("nan")
    tail = eigenvalues[len(eigenvalues) // 2 :]
    excess = (tail / tail[0]).log().sum()
    return float("inf") if float(excess) == 0 else 1 + len(tail) / float(excess)


def _starts(length: int, window: int, most: int) -> list[int]:
    room = length - window
    count = min(most, room // max(window // 2, 1) + 1)
    return sorted({round(room * i / max(count - 1, 1)) for i in range(count)})


class SpectralMonitor:
    """Records :func:`singular_summary` of matrices every ``every`` calls.

    ``monitor = SpectralMonitor(model); ...; optimizer.register_step_post_hook(monitor)``.
    """

    def __init__(
        self, model: nn.Module, every: int = 100, names: Iterable[str] | None = None
    ) -> None:
        wanted = None if names is None else set(names)
        self.weights = {
            n: p
            for n, p in model.named_parameters()
            if p.ndim >= 2 and (wanted is None or n in wanted)
        }
        self.every, self.calls = every, 0
        self.history: list[dict[str, Any]] = []

    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls % self.every == 0:
            values = {n: singular_summary(p) for n, p in self.weights.items()}
            self.history.append({"step": self.calls, "layers": values})
