"""What a gate behind every norm costs: one training step, plain against gated, side by side.

    python benchmarks/gating.py [--quick] [--device cuda] [--out benchmarks/results/gating.json]

Rows: the norm op alone (forward and backward) and a whole pre-RMSNorm decoder (``models.py``) with a gate
behind every norm (forward, backward and AdamW's fused step; the first two also by themselves).
Columns: eager (unfused), Inductor, and the normfuse backend, each plain and gated. These two take turns;
the figure is the median over rounds of the per-round ratio gated/plain, with its 95 % interval. Beside
it, what a step spends in the gates' operators where they are ours (profiled by itself): products, most of
the step, vary more from call to call than gates cost.
On CPUs also gates alone by size, our C++ against Inductor's code (``options={"kernels": False}``): the
sizes at which the backend takes one or the other (``runtime/lower_cpp.py``) come from there.
Memory: new parameters, what the forward keeps for the backward, and page faults per step (each a page
that the allocator gave back: set glibc's ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_MMAP_THRESHOLD_`` to
see the step without them).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from models import llama
from normfuse import passes
from normfuse.runtime.measure import environment, interleaved, paired_ratio, synchronize
from normfuse.runtime.provenance import source_hash
from torch import nn


def rms(d: int) -> nn.Module:
    return nn.RMSNorm(d, eps=1e-6)


def variants(model: nn.Module, x: torch.Tensor, backends: list[str]) -> dict[str, nn.Module]:
    """Plain and gated, both as captured graphs (so that only the gates differ), per backend."""
    out: dict[str, nn.Module] = {}
    for name, todo in (("plain", []), ("gated", [passes.InsertGatedNorm(sites=["*"])])):
        gm = passes.capture(model, (x,), dynamic=False)
        gm, _ = passes.PassManager(todo, passes.Context(training=True)).run(gm)
        for backend in backends:
            compiled = gm if backend == "eager" else torch.compile(gm, backend=backend)
            out[f"{backend} {name}"] = compiled
    return out


class Step:
    """A training step; with an optimizer if ``trains``."""

    def __init__(self, module: nn.Module, x: torch.Tensor, trains: bool) -> None:
        self.module, self.x = module, x
        self.optimizer = None
        if trains:
            self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
        self.faults: list[int] = []
        self.without_optimizer: list[float] = []

    def __call__(self) -> None:
        before, start = page_faults(), time.perf_counter()
        self.module(self.x).square().mean().backward()
        if self.optimizer is not None:
            synchronize()
            self.without_optimizer.append(time.perf_counter() - start)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.faults.append(page_faults() - before)


def saved_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """What the forward keeps for the backward, without parameters and inputs."""
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), x)}
    sizes: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(x)
    del out
    return sum(sizes.values())


def operator_ms(step: Step, times: int = 5) -> float:
    """Milliseconds of a step in operators of ours: the median of a few profiled ones."""
    sums = []
    for _ in range(times):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        rows = (row for row in profile.key_averages() if row.key.startswith("normfuse_cpp::"))
        sums.append(sum(row.self_cpu_time_total for row in rows) / 1e3)
    return statistics.median(sums)


def page_faults() -> int:
    """Of this process so far, without those that read a disk; 0 where the system does not say."""
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return 0


def compare(
    model: nn.Module, x: torch.Tensor, backends: list[str], rounds: int, trains: bool
) -> dict:
    """Seconds per training step, plain and gated in turns; errors are recorded as such."""
    modules = variants(model, x, backends)
    rows: dict[str, Any] = {}
    for backend in backends:
        pair = {k: Step(modules[f"{backend} {k}"], x, trains) for k in ("plain", "gated")}
        try:
            times = interleaved(pair, rounds)
        except Exception as error:
            rows[backend] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            continue
        ratio = paired_ratio(times["gated"], times["plain"])
        rows[backend] = {"ratio": ratio.value, "interval": [ratio.low, ratio.high]}
        if trains:
            parts = (pair[kind].without_optimizer[-rounds:] for kind in ("gated", "plain"))
            part = paired_ratio(*parts)
            rows[backend]["without_optimizer"] = [part.value, part.low, part.high]
        for kind, seconds in times.items():
            module = modules[f"{backend} {kind}"]
            rows[backend][f"{kind}_ms"] = 1e3 * statistics.median(seconds)
            rows[backend][f"{kind}_saved_bytes"] = saved_bytes(module, x)
            rows[backend][f"{kind}_page_faults"] = statistics.median(pair[kind].faults)
            if x.device.type == "cpu" and trains and backend == "normfuse":
                rows[backend][f"{kind}_operator_ms"] = operator_ms(pair[kind])
            if x.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                pair[kind]()
                rows[backend][f"{kind}_peak_bytes"] = torch.cuda.max_memory_allocated()
    sizes = {
        name: sum(
            p.numel() * p.element_size() for p in modules[f"{backends[0]} {name}"].parameters()
        )
        for name in ("plain", "gated")
    }
    rows["parameter_bytes"] = sizes["plain"]
    rows["new_parameter_bytes"] = sizes["gated"] - sizes["plain"]
    return rows


#: Rows, width and rank.
GATES = (
    (16, 768, 16), (64, 256, 16), (64, 768, 16), (64, 1024, 16), (128, 512, 16), (256, 768, 16),
    (256, 768, 64), (1024, 64, 16), (1024, 768, 16), (1024, 768, 64), (64, 4096, 16), (256, 4096, 16),
)  # fmt: skip


def gates_alone(rounds: int) -> list[dict]:
    """Gates by themselves, in inference and training: our C++ and Inductor's code in turns."""
    out = []
    for rows, d, rank in GATES:
        y, weights = torch.randn(rows, d), (torch.randn(rank, d) / d**0.5, torch.randn(d, rank) / 4)
        for training in (False, True):
            torch._dynamo.reset()
            leaves = [t.clone().requires_grad_(training) for t in (y, *weights)]
            steps = {}
            for name, options in (("ours", {"policy": "always"}), ("inductor", {"kernels": False})):
                compiled = torch.compile(
                    _gate, backend="normfuse", dynamic=False, fullgraph=True, options=options
                )
                steps[name] = functools.partial(_one, compiled, leaves, torch.randn(rows, d))
                steps[name]()
            times = interleaved(steps, rounds)
            ratio = paired_ratio(times["ours"], times["inductor"])
            row = {f"{name}_ms": 1e3 * statistics.median(t) for name, t in times.items()}
            row |= {"rows": rows, "width": d, "rank": rank, "training": training}
            out.append(row | {"ratio": ratio.value, "interval": [ratio.low, ratio.high]})
    return out


def _gate(y: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.ops.normfuse.self_gate(y, down, up)


def _one(compiled: Any, leaves: list[torch.Tensor], gradient: torch.Tensor) -> None:
    out = compiled(*leaves)
    if out.requires_grad:
        torch.autograd.grad(out, leaves, gradient)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--backends", nargs="+", default=["eager", "inductor", "normfuse"])
    parser.add_argument(
        "--tokens", type=int, nargs=2, default=(4, 256), metavar=("BATCH", "LENGTH")
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    d, depth, heads, shape = (
        (64, 2, 2, (2, 32)) if options.quick else (768, 12, 12, tuple(options.tokens))
    )
    rounds = 5 if options.quick else options.rounds
    # plain Inductor finds graphs by the names of their ops, whatever these meant when it compiled them
    torch.compiler.config.cache_key_tag = source_hash()
    torch.manual_seed(0)
    results = {}
    for name, model, x in (
        ("norm op", rms(d), torch.randn(*shape, d)),
        (f"{depth} layers", llama(d, depth, heads)(rms), torch.randint(0, 4096, shape)),
    ):
        model, x = model.to(options.device), x.to(options.device)
        rows = compare(model, x, options.backends, rounds, trains=name != "norm op")
        results[name] = rows
        print(f"{name}, d = {d}, {shape[0]}×{shape[1]} tokens, {options.device}")
        for backend in options.backends:
            r = rows[backend]
            if "failed" in r:
                print(f"  {backend:10} failed: {r['failed']}")
                continue
            print(
                f"  {backend:10} plain {r['plain_ms']:8.2f} ms  gated {r['gated_ms']:8.2f} ms  "
                f"ratio {r['ratio']:.3f} [{r['interval'][0]:.3f}, {r['interval'][1]:.3f}]  "
                f"kept for backward {r['plain_saved_bytes'] / 1e6:.1f} and "
                f"{r['gated_saved_bytes'] / 1e6:.1f} MB  "
                f"page faults {r['plain_page_faults']:.0f} and {r['gated_page_faults']:.0f}"
            )
        extra = rows["new_parameter_bytes"] / rows["parameter_bytes"]
        print(f"  gates add {rows['new_parameter_bytes']:,} bytes of parameters ({extra:.1%})")
    gates = []
    if options.device == "cpu" and not options.quick:
        gates = gates_alone(rounds)
        for g in gates:
            print(
                f"gate {g['rows']}×{g['width']}, rank {g['rank']}, "
                f"{'training' if g['training'] else 'inference'}: ours {g['ours_ms']:.3f} ms, "
                f"Inductor {g['inductor_ms']:.3f} ms, ratio {g['ratio']:.2f}"
            )
    if options.out:
        data = {
            "kind": "gating",
            "environment": environment(),
            "width": d,
            "depth": depth,
            "tokens": list(shape),
            "results": results,
            "gates": gates,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(data, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
