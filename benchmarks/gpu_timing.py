"""Timing on a GPU, shared by ``kernels.py`` and ``gpu_models.py``: CUDA graphs, medians, floors.

What needs no GPU (floors, tables, ratios) is plain arithmetic on numbers, so that it can be tested
anywhere.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

#: The user's allowance for a kernel's error beyond 1.5× eager's own: what one rounding can do.
SLACK = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-22}


def require_gpu() -> torch.device:
    """The current GPU; ends the program with what to do where there is none."""
    if not torch.cuda.is_available():
        sys.exit(
            "no GPU here: this measures CUDA or ROCm devices and nothing was measured. "
            "Where there is one, install torch with its support and run the same command."
        )
    return torch.device("cuda", torch.cuda.current_device())


@dataclass(frozen=True)
class Floors:
    """What the device was measured to do: bytes per second (copy), FLOPs per second (product)."""

    bandwidth: float
    flops: float

    def seconds(self, moved: float, flops: float) -> float:
        """No program that moves these bytes and does these FLOPs is faster."""
        return max(moved / self.bandwidth, flops / self.flops)


def measure_floors(dtype: torch.dtype) -> Floors:
    x = torch.empty(1 << 28, device="cuda", dtype=torch.uint8)
    y = torch.empty_like(x)
    a = torch.randn(8192, 8192, device="cuda").to(dtype)
    return Floors(
        2 * x.numel() / graph_seconds([lambda: y.copy_(x)]),
        2 * 8192**3 / graph_seconds([lambda: a @ a]),
    )


def copies(nbytes: int, cache: int) -> int:
    """How many buffer sets of that size it takes so that none is still in a cache of ``cache`` bytes
    when its turn comes again (2 to 64)."""
    return max(2, min(64, 2 * cache // max(nbytes, 1) + 1))


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def graph_seconds(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Median seconds of one call; ``calls`` do the same on different buffers, replayed as one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (*calls, *calls):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return _median(graph.replay, repeats) / len(calls)


def plain_seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """The same without a graph, for what cannot be captured."""
    for _ in range(3):
        call()
    return _median(call, repeats)


def _median(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


#: Elements compared at a time: float64 copies of a whole model's gradients would not fit.
_PIECE = 1 << 26


def error(y: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference relative to the largest number of ``truth``; NaN counts as infinite."""
    assert y.shape == truth.shape, (y.shape, truth.shape)
    worst = largest = torch.zeros((), dtype=torch.float64, device=truth.device)
    for a, b in zip(y.flatten().split(_PIECE), truth.flatten().split(_PIECE), strict=True):
        worst = torch.maximum(worst, (a.double() - b.double()).abs().max())
        largest = torch.maximum(largest, b.double().abs().max())
    d = worst / largest.clamp_min(1e-300)
    return math.inf if torch.isnan(d) else d.item()


def worst(ys: Any, truths: Any) -> float:
    """:func:`error` over one tensor or several."""
    if isinstance(ys, torch.Tensor):
        ys, truths = (ys,), (truths,)
    return max(error(y, t) for y, t in zip(ys, truths, strict=True))


def is_right(ours: float, eager: float, dtype: torch.dtype) -> bool:
    return ours <= 1.5 * eager + SLACK[dtype]


def failed(row: dict[str, Any], peer: str, problem: Exception) -> dict[str, Any]:
    """Name in a row what could not be run, and why."""
    row.setdefault("failed", {})[peer] = f"{type(problem).__name__}: {problem}"[:300]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return row


def problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the rows in which ours is wrong or did not run."""
    return [r["name"] for r in rows if r.get("wrong") or "ours" in r.get("failed", {})]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


#: Columns of the tables: what was measured, fastest reference last.
PEERS = ("ours", "without kernels", "max-autotune", "eager", "liger")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: microseconds, speed over max-autotune, and the share of the floor that is reached."""
    peers = [p for p in PEERS if any(p in r["seconds"] for r in rows)]
    head = ["what", *(f"{p} µs" for p in peers), "× max-autotune", "floor µs", "of floor"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for r in rows:
        t = r["seconds"]
        cells = [r["name"]]
        bad = ""
        if r.get("wrong"):
            bad = f"**wrong**: error {r['error']:.2g}, eager {r['eager_error']:.2g}"
        elif "ours" in r.get("failed", {}):
            bad = f"**failed**: {r['failed']['ours']}".replace("|", "¦").splitlines()[0]
        if bad:
            cells += [bad, *[""] * (len(head) - 2)]
        else:
            cells += [f"{t[p] * 1e6:.1f}" if p in t else "" for p in peers]
            both = "ours" in t and "max-autotune" in t
            cells.append(f"{t['max-autotune'] / t['ours']:.2f}" if both else "")
            cells.append(f"{r['floor'] * 1e6:.1f}")
            cells.append(f"{r['floor'] / t['ours']:.0%}" if "ours" in t else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "device_type": "cuda",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def write(kind: str, floors: Floors, rows: list[dict[str, Any]], **more: Any) -> Path:
    """JSON and Markdown into ``results/``, named after the device."""
    result = {"environment": environment(), "floors": asdict(floors), **more, "rows": rows}
    name = "".join(c if c.isalnum() else "_" for c in result["environment"]["device"])
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{kind}-{name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    e = result["environment"]
    title = f"# {kind} on {e['device']}\n\ntorch {e['torch']}, triton {e['triton']}, {e['date']}. "
    title += (
        f"Copy {floors.bandwidth / 1e12:.2f} TB/s, product {floors.flops / 1e12:.0f} TFLOP/s.\n\n"
    )
    file.with_suffix(".md").write_text(title + table(rows) + "\n")
    return file
