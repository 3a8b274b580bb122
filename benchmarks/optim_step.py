"""Optimizer steps side by side: ours, torch's, the plain loop, and installed peers.

    python benchmarks/optim_step.py --compiled      # all sets, float32 (a quarter of an hour)
    python benchmarks/optim_step.py --quick         # a few small matrices (seconds)
    python benchmarks/optim_step.py --bytes         # what is bound by memory, against its floor
    python benchmarks/optim_step.py --sets gpt2-small --dtype bfloat16 --device cuda

Every contestant steps on its own copy of the same matrices; contestants are interleaved, medians
and ratios are of one run. Peers fix their dtype: they run as shipped where the machine multiplies
fast in it, and, for a comparison in one dtype, with that cast patched. The floor is the
symmetric-aware FLOP count of the better form over the best GEMM rate measured in the same run; what
large GEMMs reach between the steps, for half a second at a time, stands beside it. Slow
contestants take fewer repeats, and what is too slow in its shipped dtype (twice a step's estimate above
``--budget`` seconds) is reported as skipped with the estimate.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from normfuse import optim
from normfuse.optim import coefficients as co
from normfuse.optim import kernel_products
from normfuse.optim import newton_schulz as ns
from normfuse.optim.base import Algorithm, MatrixOptimizer
from normfuse.optim.pipeline import Pipeline
from normfuse.optim.stages import (
    ClipOutliers,
    Momentum,
    NormalizeSecondMoment,
    Scale,
    Sinkhorn,
    Stage,
)
from normfuse.runtime.measure import environment
from records import earlier
from render_tables import bytes_section, step_section
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


@dataclass
class Contestant:
    """A way to make a stepper from parameters; ``shipped`` is the dtype it insists on, if any."""

    make: Callable[[list[nn.Parameter]], Any]
    shipped: torch.dtype | None = None
    patch: Callable[[torch.dtype], Any] | None = None  # context in which it iterates in a dtype


def _patch_method(dtype: torch.dtype) -> Any:
    """``tensor.bfloat16()`` gives a copy in ``dtype`` instead: torch.optim.Muon's only cast."""
    return mock.patch.object(torch.Tensor, "bfloat16", lambda t: t.to(dtype, copy=True))


def _patch_gram(dtype: torch.dtype) -> Any:
    """gram-newton-schulz names its dtype inside a closure: ``torch.float16``."""
    return mock.patch.object(torch, "float16", dtype)


@contextlib.contextmanager
def _patch_pytorch_optimizer(dtype: torch.dtype) -> Iterator[None]:
    from pytorch_optimizer.optimizer.muon import base

    names = ("zero_power_via_newton_schulz_5", "zero_power_via_gram_newton_schulz")
    with contextlib.ExitStack() as stack:
        for name in names:
            bound = functools.partial(getattr(base, name), dtype=dtype)
            stack.enter_context(mock.patch.object(base, name, bound))
        yield


@contextlib.contextmanager
def _patch_heavyball(dtype: torch.dtype) -> Iterator[None]:
    from heavyball import utils

    def round_(ref: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
        return ref.to(dtype) if source is None else source.to(ref.dtype)

    with mock.patch.object(utils, "stochastic_round_", round_):
        yield


def contestants(dtype: torch.dtype, compiled: bool) -> tuple[dict[str, Contestant], list[str]]:
    """Ours, torch's, the plain loop and the installed peers; names of those not installed."""
    muon = functools.partial(optim.Muon, lr=1e-3, ns_dtype=dtype)
    half = torch.bfloat16
    out = {
        "normfuse": Contestant(muon),
        "normfuse direct": Contestant(functools.partial(muon, ns_method="direct")),
        "plain loop": Contestant(lambda ps: PlainLoop(ps, 1e-3, dtype)),
        "torch.optim.Muon": Contestant(
            lambda ps: torch.optim.Muon(ps, lr=1e-3), half, _patch_method
        ),
    }
    if compiled:
        out["normfuse compiled"] = Contestant(functools.partial(muon, compile=True))
        out["torch.optim.Muon compiled"] = Contestant(
            lambda ps: _Compiled(torch.optim.Muon(ps, lr=1e-3)), half
        )
    if torch.cuda.is_available():  # elsewhere there is nothing to leave out
        out["normfuse without kernels"] = Contestant(lambda ps: _WithoutKernels(muon(ps)))
    missing = []
    if importlib.util.find_spec("gram_newton_schulz"):
        from gram_newton_schulz import GramNewtonSchulz

        def gram(ps: list[nn.Parameter]) -> Any:
            iteration = GramNewtonSchulz(
                ns_use_kernels=False, ns_coefficients=[list(JORDAN)] * 5, compile_kwargs=None
            )
            return BatchedLoop(ps, 1e-3, iteration)

        out["gram-newton-schulz"] = Contestant(gram, torch.float16, _patch_gram)
    else:
        missing.append("gram-newton-schulz")
    if importlib.util.find_spec("heavyball"):

        def heavy(ps: list[nn.Parameter]) -> Any:
            import heavyball

            # its own default compiles every helper with max-autotune: minutes before the first step
            heavyball.utils.compile_mode = None
            heavyball.utils.zeroth_power_mode = "newtonschulz"
            return heavyball.Muon(ps, lr=1e-3)

        out["heavyball"] = Contestant(heavy, half, _patch_heavyball)
    else:
        missing.append("heavyball")
    if importlib.util.find_spec("pytorch_optimizer"):

        def pytorch_optimizer(method: str, ps: list[nn.Parameter]) -> Any:
            import pytorch_optimizer

            group = {"params": ps, "use_muon": True}
            return pytorch_optimizer.Muon([group], lr=1e-3, ns_method=method)

        for method, its in (("newton_schulz", half), ("gram_newton_schulz", torch.float16)):
            out["pytorch-optimizer" + (" gram" if method[0] == "g" else "")] = Contestant(
                functools.partial(pytorch_optimizer, method), its, _patch_pytorch_optimizer
            )
    else:
        missing.append("pytorch-optimizer")
    return out, missing


class _WithoutKernels:
    """Library products only; eager, so that nothing that was compiled is compared."""

    def __init__(self, opt: torch.optim.Optimizer) -> None:
        self.opt = opt

    def step(self) -> None:
        with kernel_products.kernels("never"):
            self.opt.step()


class _Compiled:
    def __init__(self, opt: torch.optim.Optimizer) -> None:
        self.step = torch.compile(opt.step)


class BatchedLoop:
    """Momentum and update as in the plain loop around a batched iteration, one call per shape."""

    def __init__(self, params: list[nn.Parameter], lr: float, iteration: Any) -> None:
        self.shapes: dict[Any, list[nn.Parameter]] = {}
        for p in params:
            self.shapes.setdefault(p.shape, []).append(p)
        self.buffers = {p: torch.zeros_like(p) for p in params}
        self.lr, self.iteration = lr, iteration

    @torch.no_grad()
    def step(self) -> None:
        for (r, c), params in self.shapes.items():
            grads = [p.grad for p in params if p.grad is not None]
            buffers = [self.buffers[p] for p in params]
            torch._foreach_lerp_(buffers, grads, 0.05)
            done = self.iteration(torch.stack(torch._foreach_lerp(grads, buffers, 0.95)))
            torch._foreach_mul_(params, 1 - self.lr * 0.1)
            torch._foreach_add_(params, done.unbind(), alpha=-self.lr * max(1, r / c) ** 0.5)


def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a square product, best of several; the size grows until it takes a while."""
    size, rate = 256, 0.0
    while True:
        a = torch.randn(size, size, device=device).to(dtype)
        best = min(_timed(lambda a=a: a @ a, device) for _ in range(5))
        rate = max(rate, 2 * size**3 / best)
        if best > 0.02 or size >= 4096:
            return rate
        size *= 2


def sustained_rate(
    rate: float, dtype: torch.dtype, device: str, seconds: float = 0.5
) -> tuple[float, float]:
    """FLOP/s of large products one after the other, and of the fastest; ``rate`` is about that."""
    size = 2048
    while 2 * size**3 > rate * seconds / 4:
        size //= 2
    a = torch.randn(size, size, device=device).to(dtype)
    times: list[float] = []
    while sum(times) < seconds:
        times.append(_timed(lambda: a @ a, device))
    return 2 * size**3 / statistics.fmean(times), 2 * size**3 / min(times)


#: ``--cpu-time`` puts the processor time of this process here.
CLOCK = time.perf_counter


def _timed(f: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = CLOCK()
    f()
    if device == "cuda":
        torch.cuda.synchronize()
    return CLOCK() - began


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
    """One set: every contestant, interleaved; those that insist on another dtype run in it if it is
    not too slow, and in the asked dtype by patching their cast, under a name that says so."""
    dtype = DTYPES[args.dtype]
    rates = {dtype: gemm_rate(dtype, args.device)}
    flops = plain_flops(name)
    rows: dict[str, dict] = {}
    live: dict[str, tuple[Any, list[nn.Parameter], Any]] = {}
    makers, missing = contestants(dtype, args.compiled)
    for label, c in makers.items():
        forms: list[tuple[str, torch.dtype, Any]] = []
        if c.shipped is None or c.shipped == dtype:
            forms.append((label, dtype, contextlib.nullcontext))
        else:
            forms.append((f"{label}, as shipped ({_name(c.shipped)})", c.shipped, None))
            if c.patch is not None:
                forms.append((f"{label}, {args.dtype}", dtype, functools.partial(c.patch, dtype)))
        for form, work, context in forms:
            if work not in rates:
                rates[work] = gemm_rate(work, args.device)
            estimate = flops / rates[work]
            # what compares in the asked dtype runs at least once; what is shipped otherwise must be fast
            if estimate * 2 > args.budget * (4 if work == dtype else 1):
                reason = f"skipped: about {estimate:.0f} s a step at the measured GEMM rate"
                rows[form] = {"skipped": reason}
                continue
            params = parameters(name, args.device)
            context = contextlib.nullcontext if context is None else context
            with context():
                opt = c.make(params)
                rows[form] = {"dtype": _name(work), "times": []}
                rows[form]["first"] = _timed(opt.step, args.device)
            live[form] = (opt, params, context)
    grads = [p.grad for p in parameters(name, args.device)]
    sustained = []
    for _ in range(args.repeats):
        rate, best = sustained_rate(rates[dtype], dtype, args.device)
        sustained.append(rate)
        rates[dtype] = max(rates[dtype], best)  # a machine may have been slow for a moment
        for form, (opt, params, context) in live.items():
            spent = sum(rows[form]["times"])
            if rows[form]["times"] and spent + rows[form]["times"][-1] > args.budget:
                continue
            for p, g in zip(params, grads, strict=True):
                if p.grad is None:  # one peer drops gradients
                    p.grad = g.clone()
            with context():
                rows[form]["times"].append(_timed(opt.step, args.device))
    for label in missing:
        rows[label] = {"skipped": "not installed"}
    floor = floor_flops(name) / rates[dtype]
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
        "gemm_gflops": {_name(k): v / 1e9 for k, v in rates.items()},
        "sustained_gflops": statistics.median(sustained) / 1e9,
        "floor": floor,
        "rows": rows,
    }


# -- what is bound by memory -----------------------------------------------------------------------


def copy_rate(device: str) -> float:
    """Bytes read and written a second by a copy far larger than any cache."""
    a, b = (torch.ones(2**25, device=device) for _ in range(2))
    return 2 * 4 * a.numel() / min(_timed(lambda: a.copy_(b), device) for _ in range(7))


def _member(label: str, *stages: Stage) -> type[MatrixOptimizer]:
    """An optimizer of these stages and torch.optim.Muon's defaults."""
    made = Algorithm(
        f"bytes-{label}",
        lambda group: Pipeline((*stages, Scale("original")), ("momentum", "beta2")),
        {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "beta2": 0.95},
    )

    class Member(MatrixOptimizer):
        algorithm = made

        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, {}, **options)

    return Member


#: Label, passes over the matrix that the algorithm cannot do without, stages. A parameter's update is two
#: (read, write). Orthogonalization is left out: the gradient stands for its result.
BYTES: list[tuple[str, int, tuple[Stage, ...]]] = [
    ("decay, update", 3, ()),
    ("momentum, decay, update", 5, (Momentum(),)),
    ("NorMuon's tail, decay, update", 4, (NormalizeSecondMoment(),)),
    ("SinkGD's five sweeps, decay, update", 8, (Sinkhorn(),)),
    ("ROOT's quantile and clamp, decay, update", 4, (ClipOutliers(),)),
]


def measure_bytes(name: str, args: argparse.Namespace) -> dict:
    """One set, a quarter of its matrices: each memory-bound part of a step against its floor."""
    rate = copy_rate(args.device)
    params = [p for i, p in enumerate(parameters(name, args.device)) if i % 4 == 0]
    entries = sum(p.numel() for p in params)
    steppers: dict[str, tuple[int, Any]] = {}
    for label, passes, stages in BYTES:
        kind = _member(label, *stages)
        steppers[label] = (passes, kind(params, non_finite="propagate"))
        if args.compiled:
            steppers[f"{label}, compiled"] = (
                passes,
                kind(params, non_finite="propagate", compile=True),
            )
    sgd = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    steppers["torch.optim.SGD, foreach"] = (5, torch.optim.SGD(params, foreach=True, **sgd))
    steppers["torch.optim.SGD, fused"] = (5, torch.optim.SGD(params, fused=True, **sgd))
    times: dict[str, list[float]] = {label: [] for label in steppers}
    for i in range(args.repeats + 2):  # two to warm up
        for label, (_, opt) in steppers.items():
            spent = _timed(opt.step, args.device)
            if i >= 2:
                times[label].append(spent)
    rows = {}
    for label, (passes, _) in steppers.items():
        median, floor = statistics.median(times[label]), passes * 4 * entries / rate
        rows[label] = {"passes": passes, "floor": floor, "median": median, "floors": median / floor}
    return {"set": name, "entries": entries, "copy_rate": rate, "bytes": rows}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", nargs="+", default=[s for s in SETS if s != "tiny"])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=25.0, help="seconds a contestant, a set")
    parser.add_argument("--bytes", action="store_true", help="only what is bound by memory")
    parser.add_argument("--compiled", action="store_true", help="also compiled steps")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, processor time: what a busy machine can measure",
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    parser.add_argument("--add", action="store_true", help="keep the sets that are there already")
    args = parser.parse_args()
    if args.cpu_time:
        global CLOCK
        CLOCK = time.process_time
        torch.set_num_threads(1)
    if args.quick:
        args.sets, args.repeats = ["tiny"], 3
    unknown = set(args.sets) - set(SETS)
    if unknown:
        parser.error(f"unknown sets {sorted(unknown)}; known: {', '.join(SETS)}")
    work = measure_bytes if args.bytes else measure
    stem = f"optim_{'bytes' if args.bytes else 'step'}-{args.device}-{args.dtype}"
    path = args.out / f"{stem}.json" if args.out else None
    before = earlier(path, environment()) if path and args.add else {}
    results = {r["set"]: r for r in before.get("results", ())}
    for name in args.sets:
        results[name] = work(name, args)
        show = bytes_section if args.bytes else step_section
        print(show({"results": [results[name]]}), end="\n\n")
        if path:  # after every set: an interrupted run keeps what it measured
            path.parent.mkdir(parents=True, exist_ok=True)
            record = {
                "kind": "optim_bytes" if args.bytes else "optim_step",
                "environment": environment(),
                "clock": "processor time" if args.cpu_time else "wall",
                "results": list(results.values()),
            }
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
