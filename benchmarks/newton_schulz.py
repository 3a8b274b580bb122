"""Check, then time, the products of Newton–Schulz on the GPU at hand, and whole orthogonalizations.

    python benchmarks/newton_schulz.py [--quick] [--tune]

For each product and batch: agreement with float64 first, then our kernel, the library's batched product
and max-autotune's, as ``kernels.py`` does it; the floor is the symmetric-aware FLOP count (half of a
symmetric product) at the product rate of the same run. Then ``orthogonalize`` with kernels, without them,
and as the plain loop, in one run. ``--tune`` keeps plans, and which of the two multiplies faster, in the
plan cache: ``normfuse.optim`` goes by that instead of its prediction. Writes JSON and Markdown into
``benchmarks/results/``. Needs no network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_timing import (
    graph_seconds,
    is_right,
    measure_floors,
    require_gpu,
    table,
    worst,
    write,
)
from kernels import Case, measure, tune
from normfuse import optim
from normfuse.optim import coefficients as co
from normfuse.optim import kernel_products as kp
from normfuse.optim import newton_schulz as ns

JORDAN = (3.4445, -4.7750, 2.0315)

#: Batches ``(matrices, shorter side, longer side)``: GPT-2-small, a Llama-like model, experts, one alone.
BATCHES = (
    (12, 768, 768),
    (36, 768, 3072),
    (8, 1024, 4096),
    (16, 2048, 8192),
    (64, 256, 512),
    (1, 4096, 4096),
    (1, 1024, 1024),
)


def random(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Normalized matrices, as an iteration meets them."""

    def make(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, device=device)
        return (x / x.norm(dim=(-2, -1), keepdim=True)).to(dtype)

    return make


def product_cases(
    batch: int, m: int, n: int, device: torch.device, dtype: torch.dtype, processors: int
) -> Iterator[tuple[str, Case]]:
    """The three products, each with the kind its verdict is kept under."""
    from normfuse.runtime import triton_ops as ops

    _, b, c = JORDAN
    e, fresh = dtype.itemsize, random(device, dtype)
    tf32 = ops.symmetric.is_tf32(dtype)
    shape = f"{batch}×{m}×{n}"
    square = ("symmetric", (batch, m, e, processors), {"tf32": tf32})

    def gram() -> torch.Tensor:
        x = fresh(batch, m, n)
        return ops.symmetric_product(x, x, None, 1.0, 0.0)

    yield (
        "gram",
        Case(
            f"Gram {shape}",
            lambda: (fresh(batch, m, n),),
            lambda x: ops.symmetric_product(x, x, None, 1.0, 0.0),
            lambda x: torch.bmm(x, x.mT),
            batch * (m * n + m * m) * e, batch * m * m * n, tune=square,
        ),
    )  # fmt: skip
    yield (
        "symmetric",
        Case(
            f"bA + cA² {batch}×{m}×{m}",
            lambda: (gram(),),
            lambda a: ops.symmetric_product(a, a, a, c, b),
            lambda a: torch.baddbmm(a, a, a, beta=b, alpha=c),
            2 * batch * m * m * e, batch * m**3, tune=square,
        ),
    )  # fmt: skip
    yield (
        "apply",
        Case(
            f"aX + BX {shape}",
            lambda: (gram(), fresh(batch, m, n)),
            lambda p, x: ops.add_product(p, x.mT, x, 1.0, JORDAN[0]),
            lambda p, x: torch.baddbmm(x, p, x, beta=JORDAN[0]),
            batch * (m * m + 2 * m * n) * e, 2 * batch * m * m * n,
            tune=("addend", (m, n, e), {"tf32": tf32}),
        ),
    )  # fmt: skip


def plain_loop(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keller Jordan's formula on a batch, as written."""
    y = x.to(dtype)
    y = y / y.norm(dim=(-2, -1), keepdim=True)
    a, b, c = JORDAN
    for _ in range(5):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.to(x.dtype)


def whole(
    batch: int, m: int, n: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """An input and ways to orthogonalize it, by name."""

    def ours(choice: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            with kp.kernels(choice):
                return optim.orthogonalize(x, coefficients=[JORDAN], ns_dtype=dtype)

        return run

    peers = {
        "ours": ours("always"),
        "without kernels": ours("never"),
        "eager": lambda x: plain_loop(x, dtype),
    }
    return torch.randn(batch, m, n, device=device), peers


def measure_whole(
    batch: int, m: int, n: int, device: torch.device, dtype: torch.dtype, floors: Any
) -> dict[str, Any]:
    x, peers = whole(batch, m, n, device, dtype)
    schedule = co.resolve([JORDAN])
    flops = batch * min(ns.flops(m, n, schedule, r, 0.5) for r in (None, ()))
    truth = plain_loop(x.double(), torch.float64)
    row: dict[str, Any] = {
        "name": f"orthogonalize {batch}×{m}×{n}",
        "error": worst(peers["ours"](x), truth),
        "eager_error": worst(peers["eager"](x), truth),
        "floor": floors.seconds(2 * x.nbytes, flops),
        "seconds": {},
    }
    if not is_right(row["error"], row["eager_error"], dtype):
        row["wrong"] = True
        return row
    for peer, f in peers.items():
        row["seconds"][peer] = graph_seconds([lambda f=f: f(x)])
    with kp.kernels("auto"):
        chosen = kp.choose(batch, m, n, dtype, device)
    row["chosen"] = None if chosen is None else vars(chosen)
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Check, then time, Newton–Schulz products.")
    parser.add_argument("--quick", action="store_true", help="two batches only")
    parser.add_argument("--tune", action="store_true", help="keep plans and verdicts on disk")
    options = parser.parse_args(argv)
    device, dtype = require_gpu(), torch.float16
    from normfuse.runtime import autotune_cache, devices

    torch.manual_seed(0)
    floors = measure_floors(dtype)
    processors = devices.processors(device)
    rows = []
    for batch, m, n in BATCHES[1:3] if options.quick else BATCHES:
        for kind, case in product_cases(batch, m, n, device, dtype, processors):
            if options.tune:
                tune(case, device, dtype)
            rows.append(measure(case, dtype, floors))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            times = rows[-1]["seconds"]
            if options.tune and "ours" in times and "eager" in times:
                name = kp.verdict_name(kind, m, n)
                autotune_cache.record_verdict(
                    device, name, dtype, (batch, m), times["ours"], times["eager"]
                )
        rows.append(measure_whole(batch, m, n, device, dtype, floors))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    file = write("newton_schulz", floors, rows, tuned=options.tune)
    print(f"written to {file}")
    if any(r.get("wrong") for r in rows):
        sys.exit("some products are wrong: see above")


if __name__ == "__main__":
    main()
