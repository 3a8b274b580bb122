"""Check, then time, every kernel on the GPU at hand.

``python benchmarks/gpu_kernels.py [--quick] [--tune]``

For each kernel and shape: agreement with the float64 formula first (a wrong kernel is not timed), then
medians of CUDA-graph replays over rotating buffers larger than the L2 cache. Peers run in the same
process: eager PyTorch and ``torch.compile(mode="max-autotune-no-cudagraphs")``. Floors are measured in
the same run: copy bandwidth and the library's own matrix product. Writes JSON into
``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

RESULTS = Path(__file__).parent / "results"


def seconds(calls: list[Callable[[], object]], repeats: int = 20) -> float:
    """Median time of one call; ``calls`` do the same on different buffers, replayed as one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def copies(nbytes: int) -> int:
    """How many buffers it takes to defeat the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, 2 * cache // max(nbytes, 1) + 1))


def error(y: torch.Tensor, truth: torch.Tensor) -> float:
    return ((y.double() - truth).abs().max() / truth.abs().max()).item()


def measure(
    name: str, make, ours, eager, truth, moved: int, flops: float, floors, rows: list
) -> None:
    """One line of the table; ``make()`` returns fresh inputs."""
    sets = [make() for _ in range(copies(moved))]
    good = truth(*(t.double() for t in sets[0]))
    ours_error, eager_error = error(ours(*sets[0]), good), error(eager(*sets[0]), good)
    row = {"name": name, "error": ours_error, "eager_error": eager_error}
    rows.append(row)
    if not ours_error <= 1.5 * eager_error + 2**-9:
        row["wrong"] = True
        print(f"{name}: WRONG, error {ours_error:.2g}, eager {eager_error:.2g}")
        return
    torch._dynamo.reset()
    compiled = torch.compile(eager, mode="max-autotune-no-cudagraphs", dynamic=False)
    for key, f in (("ours", ours), ("eager", eager), ("max_autotune", compiled)):
        f(*sets[0])
        row[key] = seconds([lambda s=s, f=f: f(*s) for s in sets])
    row["floor"] = max(moved / floors["bandwidth"], flops / floors["flops"])
    print(
        f"{name}: ours {row['ours'] * 1e6:.1f} µs, max-autotune {row['max_autotune'] * 1e6:.1f} µs, "
        f"eager {row['eager'] * 1e6:.1f} µs, floor {row['floor'] * 1e6:.1f} µs",
        flush=True,
    )


def measure_floors() -> dict[str, float]:
    x = torch.empty(1 << 28, device="cuda", dtype=torch.uint8)
    y = torch.empty_like(x)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return {
        "bandwidth": 2 * x.numel() / seconds([lambda: y.copy_(x)]),
        "flops": 2 * 8192**3 / seconds([lambda: a @ a]),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a few shapes only")
    parser.add_argument("--tune", action="store_true", help="tune plans and keep verdicts on disk")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        sys.exit(0)
    import triton
    from normfuse.passes import ops
    from normfuse.runtime import autotune_cache, devices, triton_ops
    from normfuse.runtime.kernels import plans

    torch.manual_seed(0)
    device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    floors = measure_floors()
    native = {"stat_dtype": torch.float32, "norm_dtype": torch.float32, "out_dtype": dtype}
    shapes = (
        [(4096, 4096)]
        if options.quick
        else [(m, d) for m in (1, 64, 4096, 32768) for d in (1024, 4096, 16384)]
    )
    processors = devices.processors(device)
    rows: list[dict] = []

    def randn(*shape):
        return torch.randn(shape, device="cuda").to(dtype)

    def tune(kernel, heuristic, sizes, call, **extra):
        if options.tune:
            plan = heuristic(*sizes, **extra)
            autotune_cache.tune(kernel, plan, device, dtype, sizes, extra, lambda: seconds([call]))

    for m, d in shapes:
        g = 1 + 0.1 * randn(d)
        x0 = randn(m, d)
        tune(
            "norm_forward", plans.norm_forward, (m, d, processors),
            lambda x=x0, g=g: triton_ops.norm(x, g, None, 1e-6, False, torch.float32, dtype),
        )  # fmt: skip
        measure(
            f"rms_norm {m}x{d}",
            lambda m=m, d=d, g=g: (randn(m, d), g),
            lambda x, g: triton_ops.norm(x, g, None, 1e-6, False, torch.float32, dtype)[0],
            lambda x, g: ops.rms_norm(x, [-1], g, None, 1e-6, **native),
            lambda x, g: ops.rms_norm(x, [-1], g, None, 1e-6),
            2 * m * d * 2, 0.0, floors, rows,
        )  # fmt: skip
        if options.tune and "ours" in rows[-1]:
            autotune_cache.record_verdict(
                device, "norm", dtype, (m, d), rows[-1]["ours"], rows[-1]["max_autotune"]
            )
        down, up = randn(16, d) / d**0.5, randn(d, 16)
        measure(
            f"gated_rms_norm {m}x{d} rank 16",
            lambda m=m, d=d, down=down, up=up: (randn(m, d), down, up),
            lambda x, a, b: triton_ops.gated_norm(
                x, None, None, a, b, 1e-6, 2.0, torch.float32, dtype
            )[0],
            lambda x, a, b: ops.gated_rms_norm(x, [-1], None, None, a, b, 1e-6, **native),
            lambda x, a, b: ops.gated_rms_norm(x, [-1], None, None, a, b, 1e-6),
            2 * m * d * 2, 4.0 * m * d * 16, floors, rows,
        )  # fmt: skip
    products = (
        [(8, 4096, 4096)]
        if options.quick
        else [(m, n, 4096) for m in (1, 8, 64, 256, 2048, 8192) for n in (4096, 12288)]
    )
    for m, n, k in products:
        x0, w0 = randn(m, k), randn(n, k) / k**0.5
        tune(
            "gemm", plans.gemm, (m, n, k, 2, processors),
            lambda x=x0, w=w0: triton_ops.norm_linear(
                x, w, None, None, 1e-6, False, "identity", False, None
            ),
            dual=False, split_allowed=True,
        )  # fmt: skip
        measure(
            f"norm_linear {m}x{n}x{k}",
            lambda m=m, n=n, k=k: (randn(m, k), randn(n, k) / k**0.5),
            lambda x, w: triton_ops.norm_linear(
                x, w, None, None, 1e-6, False, "identity", False, None
            )[0],
            lambda x, w: F.linear(ops.rms_norm(x, [-1], eps=1e-6, **native), w),
            lambda x, w: F.linear(ops.rms_norm(x, [-1], eps=1e-6), w),
            (m * k + n * k + m * n) * 2, 2.0 * m * n * k, floors, rows,
        )  # fmt: skip
    properties = torch.cuda.get_device_properties(device)
    result = {
        "device": properties.name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "tuned": options.tune,
        "floors": floors,
        "rows": rows,
    }
    name = f"gpu_kernels_{properties.name.replace(' ', '_').replace('/', '_')}.json"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
    if any(r.get("wrong") for r in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
