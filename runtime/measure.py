"""Side-by-side timing that a noisy machine does not fool.

Variants run interleaved, one call each per round in an order that changes, so that drift hits all of
them. The figure reported is the median of the per-round ratios, with a bootstrap interval.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Ratio:
    """A paired ratio of times, ``baseline / variant``: above 1 the variant is faster.

    Attributes:
        value: median over rounds.
        low, high: 95 % bootstrap interval of that median.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}× [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Timing:
    """Times of one variant in seconds per call."""

    median: float
    fastest: float
    rounds: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def paired_ratio(
    baseline: list[float], variant: list[float], resamples: int = 2000, seed: int = 0
) -> Ratio:
    """Median of ``baseline[i] / variant[i]`` with its 95 % bootstrap interval."""
    if len(baseline) != len(variant) or not baseline:
        raise ValueError("paired samples of equal, positive length are needed")
    ratios = [b / v for b, v in zip(baseline, variant, strict=True)]
    rng = random.Random(seed)
    medians = sorted(
        statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(resamples)
    )
    low, high = (medians[int(q * (resamples - 1))] for q in (0.025, 0.975))
    return Ratio(statistics.median(ratios), low, high)


def synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleaved(
    variants: Mapping[str, Callable[[], Any]],
    rounds: int = 30,
    sample_seconds: float = 0.02,
    warmup: int = 3,
    seed: int = 0,
    on_round: Callable[[], Any] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call for every variant and round.

    Args:
        sample_seconds: fast calls are repeated until a sample takes about this long; all variants
            repeat equally often.
        warmup: untimed calls of each variant first (compilation is over after them).
        on_round: called after every round, e.g. to advance a progress bar.
    """
    for f in variants.values():
        for _ in range(warmup):
            f()
    synchronize()
    slowest = 0.0
    for f in variants.values():
        start = time.perf_counter()
        f()
        synchronize()
        slowest = max(slowest, time.perf_counter() - start)
    calls = max(1, min(1000, int(sample_seconds / max(slowest, 1e-7))))
    order = list(variants)
    rng = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            f = variants[name]
            synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                f()
            synchronize()
            times[name].append((time.perf_counter() - start) / calls)
        if on_round is not None:
            on_round()
    return times


def timings(times: Mapping[str, list[float]]) -> dict[str, Timing]:
    return {name: Timing(statistics.median(t), min(t), len(t)) for name, t in times.items()}


def environment() -> dict[str, Any]:
    """Where a measurement was taken: what a reader needs to judge or repeat it."""
    import datetime
    import importlib.metadata
    import platform

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    device = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "device": device,
        "device_type": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "normfuse": version("normfuse"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
