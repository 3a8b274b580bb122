"""Check, then time, every kernel on the GPU at hand.

    python benchmarks/kernels.py [--quick] [--tune] [--only NAME]

For each kernel and shape: agreement with the float64 formula first (a wrong kernel is not timed), then
medians of CUDA-graph replays over rotating buffers larger than the L2 cache. Peers run in the same
process: PyTorch's own ops in eager mode, the same under
``torch.compile(mode="max-autotune-no-cudagraphs")``, and Liger-Kernel's op where it is installed. Every
row has its floor, from a copy and a product measured in the same run. Writes JSON and Markdown into
``benchmarks/results/``; ``--tune`` also keeps plans and verdicts in the plan cache, and lowering goes by
the verdicts instead of its cost model. Needs no network.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import (
    copies,
    failed,
    geometric_mean,
    graph_seconds,
    is_right,
    l2_bytes,
    measure_floors,
    problems,
    require_gpu,
    table,
    worst,
    write,
)
from normfuse.passes import ops

F32 = torch.float32


@dataclass
class Case:
    """One kernel at one shape.

    Attributes:
        make: fresh inputs.
        ours, eager: what is compared, on those inputs; ``eager`` in float64 is the truth.
        moved, flops: what no implementation can do without: bytes and FLOPs.
        liger: the same by Liger-Kernel.
        tune: name, sizes and options of the plan that ``--tune`` measures.
        sizes: kernel and sizes (rows first) a verdict is kept for.
        forward: where gradients are compared, the function whose they are.
    """

    name: str
    make: Callable[[], tuple[torch.Tensor, ...]]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    moved: float
    flops: float = 0.0
    liger: Callable[..., Any] | None = None
    tune: tuple[str, tuple[int, ...], dict[str, Any]] | None = None
    sizes: tuple[str, tuple[int, ...]] | None = None
    forward: Callable[..., Any] | None = None


def liger_ops() -> dict[str, Callable[..., Any]]:
    """Liger-Kernel's ops under our names; empty where it is not installed."""
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError:
        return {}
    return {
        "rms": lambda x, g: LigerRMSNormFunction.apply(x, g, 1e-6, 0.0, "llama", False),
        "layer": lambda x, g, b: LigerLayerNormFunction.apply(x, g, b, 1e-6),
    }


def gradients(f: Callable[..., Any]) -> Callable[..., Any]:
    """Forward and backward of ``f``, with respect to all inputs but the last, which is the gradient."""

    def run(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [a.detach().requires_grad_() for a in args[:-1]]
        return torch.autograd.grad(f(*leaves), leaves, args[-1])

    return run


def _casts(x: torch.Tensor) -> dict[str, Any]:
    """PyTorch's own cast order; none in float64."""
    wide = x.dtype == torch.float64
    return {} if wide else {"stat_dtype": F32, "norm_dtype": F32, "out_dtype": x.dtype}


def rms(x: torch.Tensor, g: torch.Tensor | None = None) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], g, 1e-6)


def layer(x: torch.Tensor, g: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], g, b, 1e-6)


def norm_cases(
    rows: int, d: int, device: torch.device, dtype: torch.dtype, processors: int
) -> Iterator[Case]:
    from normfuse.runtime import triton_ops as kernels

    liger = liger_ops()
    e, n = dtype.itemsize, rows * d

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    g, b = 1 + 0.1 * randn(d), 0.1 * randn(d)

    def our_rms(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return kernels.norm(x, g, None, 1e-6, "rms", F32, dtype)[0]

    def our_layer(x: torch.Tensor, g: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return kernels.norm(x, g, b, 1e-6, "layer", F32, dtype)[0]

    forward = ("norm_forward", (rows, d, processors), {})
    backward = ("norm_backward", (rows, d, processors), {})
    shape = f"{rows}×{d}"
    yield Case(
        f"rms_norm {shape}", lambda: (randn(rows, d), g), our_rms, rms, 2 * n * e,
        liger=liger.get("rms"), tune=forward, sizes=("norm", (rows, d)),
    )  # fmt: skip
    yield Case(
        f"layer_norm {shape}", lambda: (randn(rows, d), g, b), our_layer, layer, 2 * n * e,
        liger=liger.get("layer"), tune=forward,
    )  # fmt: skip
    yield Case(
        f"add_rms_norm {shape}",
        lambda: (randn(rows, d), randn(rows, d), g),
        lambda x, r, g: kernels.add_norm(x, r, g, None, 1e-6, "rms", F32, dtype)[:2],
        lambda x, r, g: (rms(x + r, g), x + r),
        4 * n * e, sizes=("add_norm", (rows, d)),
    )  # fmt: skip
    yield Case(
        f"row_rstd {shape}",
        lambda: (randn(rows, d),),
        lambda x: kernels.row_rstd(x, 1e-6),
        lambda x: ops.row_rstd(x, [-1], 1e-6, stat_dtype=torch.promote_types(x.dtype, F32)),
        n * e, sizes=("row_rstd", (rows, d)),
    )  # fmt: skip
    yield Case(
        f"rms_norm, forward and backward {shape}",
        lambda: (randn(rows, d), g, randn(rows, d)),
        gradients(our_rms), gradients(rms), 5 * n * e, forward=rms,
        liger=gradients(liger["rms"]) if liger else None, tune=backward,
    )  # fmt: skip
    yield Case(
        f"layer_norm, forward and backward {shape}",
        lambda: (randn(rows, d), g, b, randn(rows, d)),
        gradients(our_layer), gradients(layer), 5 * n * e, forward=layer,
        liger=gradients(liger["layer"]) if liger else None, tune=backward,
    )  # fmt: skip
    down, up = randn(16, d) / d**0.5, randn(d, 16)

    def our_gated(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return kernels.gated_norm(x, None, None, a, b, 1e-6, 2.0, F32, dtype)[0]

    def gated(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ops.gated_rms_norm(x, [-1], None, None, a, b, 1e-6, **_casts(x))

    yield Case(
        f"gated_rms_norm {shape} rank 16", lambda: (randn(rows, d), down, up), our_gated, gated,
        2 * n * e + 32 * d * e, 4.0 * n * 16, sizes=("gated_norm", (rows, d, 16)),
    )  # fmt: skip
    yield Case(
        f"gated_rms_norm, forward and backward {shape} rank 16",
        lambda: (randn(rows, d), down, up, randn(rows, d)),
        gradients(our_gated), gradients(gated), 5 * n * e + 96 * d * e, 20.0 * n * 16,
        forward=gated,
    )  # fmt: skip


def product_cases(
    m: int, n: int, k: int, device: torch.device, dtype: torch.dtype, processors: int
) -> Iterator[Case]:
    from normfuse.runtime import triton_ops as kernels

    e = dtype.itemsize

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def weight() -> torch.Tensor:
        return randn(n, k) / k**0.5

    def ours(x: torch.Tensor, w: torch.Tensor, kind: str, sums: Any = None, up: Any = None):
        act = "identity" if up is None else "silu"
        return kernels.norm_linear(x, w, None, sums, up, None, None, 1e-6, kind, act, None)[0]

    once, shape = (m * k + n * k + m * n) * e, f"{m}×{n}×{k}"
    sizes = (m, n, k, e, processors)
    yield Case(
        f"rms_norm + linear {shape}",
        lambda: (randn(m, k), weight()),
        lambda x, w: ours(x, w, "rms"),
        lambda x, w: F.linear(rms(x), w),
        once, 2.0 * m * n * k, tune=("gemm", sizes, {"dual": False}),
        sizes=("norm_linear", (m, n, k)),
    )  # fmt: skip
    yield Case(
        f"layer_norm + linear {shape}",
        lambda: (randn(m, k) + 0.5, w := weight(), w.sum(1, dtype=F32)),
        lambda x, w, sums: ours(x, w, "layer", sums),
        lambda x, w, sums: F.linear(layer(x, None, None), w),
        once, 2.0 * m * n * k,
    )  # fmt: skip
    yield Case(
        f"rms_norm + gated pair {shape}",
        lambda: (randn(m, k), weight(), weight()),
        lambda x, w, up: ours(x, w, "rms", None, up),
        lambda x, w, up: F.silu(F.linear(h := rms(x), w)) * F.linear(h, up),
        once + n * k * e, 4.0 * m * n * k, tune=("gemm", sizes, {"dual": True}),
        sizes=("norm_linear pair", (m, n, k)),
    )  # fmt: skip
    yield Case(
        f"scaled linear {shape}",
        lambda: (randn(m, k), weight(), torch.rand(m, 1, device=device) + 0.5),
        lambda x, w, s: kernels.scaled_linear(x, w, s, None, None, None, "identity", None),
        lambda x, w, s: (F.linear(x, w) * s).to(x.dtype),
        once, 2.0 * m * n * k,
    )  # fmt: skip


def buffers(case: Case) -> list[tuple[torch.Tensor, ...]]:
    """Inputs to rotate through, so that none is still in the cache when its turn comes again."""
    return [case.make() for _ in range(copies(int(case.moved), l2_bytes()))]


def measure(case: Case, dtype: torch.dtype, floors: Any) -> dict[str, Any]:
    """One row: errors first, then times of everything that is right.

    What fails (a peer, our kernel, memory) is named in the row and does not end the run.
    """
    from normfuse.runtime import triton_ops

    row: dict[str, Any] = {
        "name": case.name,
        "floor": floors.seconds(case.moved, case.flops),
        "seconds": {},
    }
    torch._dynamo.reset()
    # a kernel that fails must not be timed as the formula that would take its place
    with triton_ops.required():
        try:
            sets = buffers(case)
            good = case.eager(*(t.double() for t in sets[0]))
            row["eager_error"] = worst(case.eager(*sets[0]), good)
            row["error"] = worst(case.ours(*sets[0]), good)
        except Exception as problem:
            return failed(row, "ours", problem)
        if not is_right(row["error"], row["eager_error"], dtype):
            row["wrong"] = True
            return row
        del good
        for peer, f in peers(case).items():
            try:
                f(*sets[0])
                row["seconds"][peer] = graph_seconds([lambda s=s, f=f: f(*s) for s in sets])
            except Exception as problem:
                failed(row, peer, problem)
    return row


def peers(case: Case) -> dict[str, Callable[..., Any]]:
    """What a case is timed against: Inductor compiles the forward pass and the backward pass."""
    mode = "max-autotune-no-cudagraphs"
    forward = torch.compile(case.forward or case.eager, mode=mode, dynamic=False)
    out = {
        "ours": case.ours,
        "eager": case.eager,
        "max-autotune": gradients(forward) if case.forward else forward,
    }
    return out if case.liger is None else {**out, "liger": case.liger}


def tune(case: Case, device: torch.device, dtype: torch.dtype) -> None:
    from normfuse.runtime import autotune_cache, triton_ops
    from normfuse.runtime.kernels import plans

    assert case.tune is not None
    name, sizes, options = case.tune
    plan = getattr(plans, name)(*sizes, **options)
    sets = buffers(case)
    calls = [lambda s=s: case.ours(*s) for s in sets]
    with triton_ops.required():
        autotune_cache.tune(name, plan, device, dtype, sizes, options, lambda: graph_seconds(calls))


def shapes(quick: bool) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
    """Rows and columns of the norms; m, n, k of the products."""
    if quick:
        return [(4096, 4096)], [(8, 4096, 4096), (2048, 4096, 4096)]
    return (
        [(m, d) for m in (1, 64, 4096, 32768) for d in (1024, 4096, 16384)],
        [(m, n, 4096) for m in (1, 8, 64, 256, 2048, 8192) for n in (4096, 12288)],
    )


def keep_verdict(
    device: torch.device,
    dtype: torch.dtype,
    about: tuple[str, tuple[int, ...]],
    seconds: dict[str, float],
) -> None:
    """Let the cost model know which was faster."""
    from normfuse.runtime import autotune_cache

    if "ours" in seconds and "max-autotune" in seconds:
        autotune_cache.record_verdict(
            device, about[0], dtype, about[1], seconds["ours"], seconds["max-autotune"]
        )


#: Targets of docs/kernels.md: kinds of rows, the rows of a shape they are about, what is compared, bound.
TARGETS = {
    "norms from 4,096 rows on, share of copy bandwidth": (
        ("rms_norm", "layer_norm", "add_rms_norm", "row_rstd"),
        (4096, math.inf),
        "floor",
        0.90,
    ),
    "norm and linear up to 64 rows, over max-autotune": (
        ("rms_norm + linear", "layer_norm + linear", "rms_norm + gated pair"),
        (1, 64),
        "max-autotune",
        1.10,
    ),
    "norm and linear from 2,048 rows on, over max-autotune (or declined)": (
        ("rms_norm + linear", "layer_norm + linear", "rms_norm + gated pair"),
        (2048, math.inf),
        "max-autotune",
        0.97,
    ),
    "gated norm, over max-autotune": (
        ("gated_rms_norm rank 16",),
        (1, math.inf),
        "max-autotune",
        2.0,
    ),
}


def kind_and_rows(name: str) -> tuple[str, int]:
    words = name.split()
    shape = next(word for word in words if "×" in word)
    return " ".join(word for word in words if word != shape), int(shape.split("×")[0])


def targets(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Which targets are met: the lowest number and the geometric mean over the shapes they are about."""
    out: dict[str, Any] = {}
    for target, (kinds, (low, high), against, wanted) in TARGETS.items():
        found = []
        for row in rows:
            kind, m = kind_and_rows(row["name"])
            t = {"floor": row["floor"], **row["seconds"]}
            if kind in kinds and low <= m <= high and {"ours", against} <= set(t):
                found.append(t[against] / t["ours"])
        if found:
            lowest = min(found)
            mean = geometric_mean(found)
            out[target] = {
                "wanted": wanted,
                "lowest": lowest,
                "mean": mean,
                "met": lowest >= wanted,
            }
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Check, then time, every kernel.")
    parser.add_argument("--quick", action="store_true", help="a few shapes only")
    parser.add_argument("--tune", action="store_true", help="tune plans and keep verdicts on disk")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    options = parser.parse_args(argv)
    device, dtype = require_gpu(), torch.bfloat16
    from normfuse.runtime import devices

    torch.manual_seed(0)
    floors = measure_floors(dtype)
    processors = devices.processors(device)
    norms, products = shapes(options.quick)
    cases = [c for s in norms for c in norm_cases(*s, device, dtype, processors)]
    cases += [c for s in products for c in product_cases(*s, device, dtype, processors)]
    rows: list[dict[str, Any]] = []
    try:
        for case in cases:
            if options.only not in case.name:
                continue
            if options.tune and case.tune is not None:
                tune(case, device, dtype)
            rows.append(measure(case, dtype, floors))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            if options.tune and case.sizes:
                keep_verdict(device, dtype, case.sizes, rows[-1]["seconds"])
    finally:  # also of a run that was stopped
        found = targets(rows)
        file = write("kernels", floors, rows, tuned=options.tune, targets=found)
        for target, t in found.items():
            word = "met" if t["met"] else "missed"
            print(f"{target}: {t['lowest']:.2f} at least, {t['wanted']:.2f} wanted, {word}")
        print(f"written to {file}")
    if problems(rows):
        sys.exit("some kernels are wrong or failed: see above")


if __name__ == "__main__":
    main()
