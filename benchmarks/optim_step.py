"""Optimizer steps side by side: ours, torch's, the plain loop, and installed peers.

    python benchmarks/optim_step.py                 # all sets, float32 (minutes)
    python benchmarks/optim_step.py --quick         # a few small matrices (seconds)
    python benchmarks/optim_step.py --sets gpt2-small --dtype bfloat16 --device cuda

Every contestant steps on its own copy of the same matrices; contestants are interleaved, medians
and ratios are of one run. The floor is the symmetric-aware FLOP count of the better form over the
GEMM rate measured in the same run. A contestant whose estimated time exceeds ``--budget`` seconds a
step is reported as skipped with the estimate, not left out silently.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from normfuse import optim
from normfuse.optim import coefficients as co
from normfuse.optim import newton_schulz as ns
from torch import nn

SETS: dict[str, list[tuple[int, tuple[int, int]]]] = {
    "gpt2-small": [(12, (2304, 768)), (12, (768, 768)), (12, (3072, 768)), (12, (768, 3072))],
    "vit-tiny": [(12, (576, 192)), (12, (192, 192)), (12, (768, 192)), (12, (192, 768))],
    "llama-like": [(8, (1024, 1024)), (4, (4096, 1024)), (4, (2816, 1024)), (4, (1024, 2816))],
    "experts": [(64, (256, 512)), (64, (512, 256))],
    "tiny": [(24, (64, 64)), (8, (64, 256)), (8, (256, 64)), (2, (256, 512))],
}
JORDAN = (3.4445, -4.7750, 2.0315)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PlainLoop(torch.optim.Optimizer):
    """Keller Jordan's formula, one matrix after another, iterating in ``dtype``."""

    def __init__(self, params, lr, dtype):  # type: ignore[no-untyped-def]
        super().__init__(params, {"lr": lr})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[no-untyped-def]
        a, b, c = JORDAN
        for group in self.param_groups:
            for p in group["params"]:
                buf = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buf.lerp_(p.grad, 0.05)
                x = p.grad.lerp(buf, 0.95).to(self.dtype)
                tall = x.shape[0] > x.shape[1]
                x = x.mT if tall else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = a * x + (b * gram + c * gram @ gram) @ x
                x = x.mT if tall else x
                p.mul_(1 - group["lr"] * 0.1)
                p.add_(x, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def contestants(dtype: torch.dtype, compiled: bool) -> dict[str, Callable[[list], object]]:
    """Name to a function from parameters to an object with ``step``."""
    out: dict[str, Callable[[list], object]] = {
        "normfuse": lambda ps: optim.Muon(ps, lr=1e-3, ns_dtype=dtype),
        "normfuse direct": lambda ps: optim.Muon(ps, lr=1e-3, ns_dtype=dtype, ns_method="direct"),
        "plain loop": lambda ps: PlainLoop(ps, 1e-3, dtype),
    }
    if dtype == torch.bfloat16:
        out["torch.optim.Muon"] = lambda ps: torch.optim.Muon(ps, lr=1e-3)
    if compiled:
        out["normfuse compiled"] = lambda ps: optim.Muon(ps, lr=1e-3, ns_dtype=dtype, compile=True)
        if dtype == torch.bfloat16:
            out["torch.optim.Muon compiled"] = lambda ps: _Compiled(torch.optim.Muon(ps, lr=1e-3))
    if dtype == torch.bfloat16 and importlib.util.find_spec("heavyball"):
        import heavyball

        out["heavyball"] = lambda ps: heavyball.Muon(ps, lr=1e-3)
    if dtype == torch.bfloat16 and importlib.util.find_spec("pytorch_optimizer"):
        import pytorch_optimizer

        out["pytorch-optimizer"] = lambda ps: pytorch_optimizer.Muon(
            [{"params": ps, "use_muon": True}], lr=1e-3
        )
    return out


class _Compiled:
    def __init__(self, opt: torch.optim.Optimizer) -> None:
        self.step = torch.compile(opt.step)


def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a square product, best of several; the size grows until it takes a while."""
    size, rate = 256, 0.0
    while True:
        a = torch.randn(size, size, device=device).to(dtype)
        best = min(_timed(lambda a=a: a @ a, device) for _ in range(3))
        rate = max(rate, 2 * size**3 / best)
        if best > 0.02 or size >= 4096:
            return rate
        size *= 2


def _timed(f: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    f()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def parameters(name: str, device: str) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    out = []
    for count, shape in SETS[name]:
        for _ in range(count):
            p = nn.Parameter(torch.randn(shape, generator=g).to(device) * 0.02)
            p.grad = torch.randn(shape, generator=g).to(device)
            out.append(p)
    return out


def floor_flops(name: str) -> float:
    schedule = co.resolve(JORDAN)
    return sum(
        count * min(ns.flops(*shape, schedule, r, 0.5) for r in (None, ()))
        for count, shape in SETS[name]
    )


def plain_flops(name: str) -> float:
    schedule = co.resolve(JORDAN)
    return sum(count * ns.flops(*shape, schedule, None) for count, shape in SETS[name])


def measure(name: str, args: argparse.Namespace) -> dict:
    dtype = DTYPES[args.dtype]
    rate = gemm_rate(dtype, args.device)
    estimate = plain_flops(name) / rate
    rows: dict[str, dict] = {}
    live: dict[str, object] = {}
    for label, make in contestants(dtype, args.compiled).items():
        if estimate > args.budget:
            rows[label] = {"skipped": f"estimated {estimate:.0f} s a step at the measured rate"}
            continue
        opt = make(parameters(name, args.device))
        rows[label] = {"first": _timed(opt.step, args.device), "times": []}  # type: ignore[attr-defined]
        live[label] = opt
    for _ in range(args.repeats):
        for label, opt in live.items():
            rows[label]["times"].append(_timed(opt.step, args.device))  # type: ignore[attr-defined]
    floor = floor_flops(name) / rate
    for row in rows.values():
        if row.get("times"):
            row["median"] = statistics.median(row["times"])
            row["floors"] = row["median"] / floor
    base = rows["plain loop"].get("median")
    for row in rows.values():
        if base and "median" in row:
            row["speedup"] = base / row["median"]
    return {
        "set": name,
        "dtype": args.dtype,
        "matrices": sum(c for c, _ in SETS[name]),
        "gemm_gflops": rate / 1e9,
        "floor": floor,
        "rows": rows,
    }


def markdown(results: list[dict]) -> str:
    lines = []
    for r in results:
        lines += [
            f"### {r['set']}, {r['matrices']} matrices, {r['dtype']}",
            f"GEMM {r['gemm_gflops']:.0f} GFLOP/s; symmetric-aware floor {r['floor'] * 1e3:.1f} ms",
            "",
            "| step | median ms | × plain loop | × floor | first step s |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for label, row in r["rows"].items():
            if "skipped" in row:
                lines.append(f"| {label} | skipped: {row['skipped']} | | | |")
            else:
                lines.append(
                    f"| {label} | {row['median'] * 1e3:.1f} | {row['speedup']:.2f} | "
                    f"{row['floors']:.2f} | {row['first']:.2f} |"
                )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", nargs="+", default=[s for s in SETS if s != "tiny"])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds a step at most")
    parser.add_argument("--compiled", action="store_true", help="also compiled steps")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for JSON and Markdown")
    args = parser.parse_args()
    if args.quick:
        args.sets, args.repeats = ["tiny"], 3
    unknown = set(args.sets) - set(SETS)
    if unknown:
        parser.error(f"unknown sets {sorted(unknown)}; known: {', '.join(SETS)}")
    results = [measure(name, args) for name in args.sets]
    text = markdown(results)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        record = {
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "results": results,
        }
        stem = f"optim_step-{args.device}-{args.dtype}"
        (args.out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.out / f"{stem}.md").write_text(text)


if __name__ == "__main__":
    main()
