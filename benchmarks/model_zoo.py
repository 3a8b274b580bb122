"""Eager, Inductor and normfuse side by side, with the bound: the model without norms under Inductor.

    python benchmarks/model_zoo.py [--quick] [--models gpt-192,vit-192] [--rows infer,train]
                                   [--tokens 1,16,256] [--dtypes float32,bfloat16] [--out FOLDER]
                                   [--tables rows,probes,depth] [--add]

Tables: ``rows``, the steps themselves; ``probes``, compile time and peak memory; ``depth``, the passes
alone on ever deeper models. All variants of a row run in one process, interleaved round by round in
random order; ratios are medians of per-round ratios with a 95 % bootstrap interval. A probe is a fresh
process with cold caches, the variants taking turns. Writes ``model_zoo-<device>.json`` and ``.md``; with
``--add``, what was measured before with the same software on the same kind of device stays.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import normfuse
import torch
from models import MODELS, Model
from normfuse.passes.manager import PassManager
from normfuse.runtime import backend, measure
from normfuse.runtime.rewrite import explain
from records import earlier
from torch import nn
from tqdm import tqdm

#: Variant -> (backend or None for eager, with norms)
VARIANTS = {
    "eager": (None, True),
    "inductor": ("inductor", True),
    "normfuse": ("normfuse", True),
    "bound": ("inductor", False),
}
#: What a user can choose among: their compile time and memory are compared.
PROBED = ("eager", "inductor", "normfuse")
TABLES = ("rows", "probes", "depth")
#: A row fails when its interval lies below this.
FLOOR = 0.98
#: Rows whose bound leaves this much are asked how much of it was taken.
HEADROOM = 1.05


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare(
    model: Model, variant: str, mode: str, tokens: int, dtype: torch.dtype
) -> tuple[Callable[[], Any], nn.Module]:
    """A call of one variant, and its module; nothing is compiled yet."""
    compiler, with_norms = VARIANTS[variant]
    module = model.make(with_norms).to(device(), dtype)
    x = model.inputs(tokens, dtype).to(device())
    run: Callable = module
    if compiler is not None:
        options = {"strict": True} if compiler == "normfuse" else None
        run = torch.compile(module, backend=compiler, dynamic=False, options=options)
    if mode == "infer":

        def call() -> torch.Tensor:
            with torch.no_grad():
                return run(x)

        return call, module

    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        run(x).float().square().mean().backward()
        optimizer.step()

    return step, module


def measure_row(
    model: Model, mode: str, tokens: int, dtype: torch.dtype, options: argparse.Namespace
) -> dict[str, Any]:
    torch._dynamo.reset()
    backend.clear_reports()
    prepared = {v: prepare(model, v, mode, tokens, dtype) for v in VARIANTS}
    times = measure.interleaved(
        {v: call for v, (call, _) in prepared.items()},
        rounds=options.rounds,
        sample_seconds=options.sample,
    )
    reports = backend.reports()
    sites = [s for r in reports for s in r.sites]
    over = {v: measure.paired_ratio(times["inductor"], times[v]) for v in VARIANTS}
    row: dict[str, Any] = {
        "model": model.name,
        "mode": mode,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in prepared["normfuse"][1].parameters()),
        "times": {v: t.to_dict() for v, t in measure.timings(times).items()},
        "over_inductor": {v: asdict(r) for v, r in over.items()},
        "sites": len(sites),
        "rewritten": sum(bool(s.applied) for s in sites),
        "passes": sorted({p for s in sites for p in s.applied}),
        "pass_seconds": sum(r.seconds for r in reports),
        "weight_bytes": sum(r.weight_bytes for r in reports),
        "slower": over["normfuse"].high < FLOOR,
    }
    if over["bound"].low > HEADROOM:
        row["headroom_taken"] = (over["normfuse"].value - 1) / (over["bound"].value - 1)
    return row


def probe_row(
    model: Model, mode: str, tokens: int, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    """Medians over ``repeats`` fresh processes of each variant, which take turns."""
    found: dict[str, list[dict[str, float]]] = {v: [] for v in PROBED}
    for _ in range(repeats):
        for v, figures in found.items():
            figures.append(probe(model, v, mode, tokens, dtype))
    row: dict[str, Any] = {
        "model": model.name,
        "mode": mode,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
    }
    for key in ("compile_seconds", "peak_bytes"):
        row[key] = {v: statistics.median(f[key] for f in figures) for v, figures in found.items()}
    row["compile_ratio"] = row["compile_seconds"]["normfuse"] / row["compile_seconds"]["inductor"]
    row["memory_ratio"] = row["peak_bytes"]["normfuse"] / row["peak_bytes"]["inductor"]
    return row


def probe(
    model: Model, variant: str, mode: str, tokens: int, dtype: torch.dtype
) -> dict[str, float]:
    """Compile time with cold caches, and peak memory, in a fresh process."""
    with tempfile.TemporaryDirectory() as caches:
        words = [model.name, variant, mode, str(tokens), str(dtype).removeprefix("torch.")]
        out = subprocess.run(
            [sys.executable, __file__, "--one", ",".join(words)],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches},
            capture_output=True,
            text=True,
            check=False,
        )
    if out.returncode:
        raise RuntimeError(out.stderr)
    return json.loads(out.stdout.splitlines()[-1])


def one(words: list[str]) -> None:
    """What a probing process does: first call, then a few more, then the peak."""
    name, variant, mode, tokens, dtype = words
    call, _ = prepare(MODELS[name], variant, mode, int(tokens), getattr(torch, dtype))
    start = time.perf_counter()
    call()
    measure.synchronize()
    first = time.perf_counter() - start
    start = time.perf_counter()
    call()
    measure.synchronize()
    later = time.perf_counter() - start
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        call()
        measure.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"compile_seconds": first - later, "peak_bytes": peak}))


def depth_row(depth: int) -> dict[str, Any]:
    """Seconds that the passes of the preset "exact" take on a model of ``depth`` blocks."""
    from models import Decoder

    torch.manual_seed(0)
    model = Decoder(nn.LayerNorm, 16, depth, 2, "gpt", vocab=64).eval()
    spent = 0.0
    original = PassManager.run

    def timed(self: PassManager, *args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        try:
            return original(self, *args, **kwargs)
        finally:
            spent += time.perf_counter() - start

    PassManager.run = timed  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            start = time.perf_counter()
            report = explain(model, (torch.randint(64, (1, 8)),), dynamic=False)
            total = time.perf_counter() - start
    finally:
        PassManager.run = original  # type: ignore[method-assign]
    return {
        "blocks": depth,
        "sites": len(report.sites),
        "pass_seconds": spent,
        "explain_seconds": total,
    }


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))


def summarize(rows: list[dict[str, Any]], probes: list[dict[str, Any]]) -> dict[str, Any]:
    # over all rows with headroom at once: a row's own share may be negative, and has no root then
    wide = [r["over_inductor"] for r in rows if "headroom_taken" in r]
    taken = None
    if wide:
        bound = geometric_mean([w["bound"]["value"] for w in wide])
        taken = (geometric_mean([w["normfuse"]["value"] for w in wide]) - 1) / (bound - 1)
    ratios = [r["over_inductor"]["normfuse"]["value"] for r in rows]
    return {
        "rows": len(rows),
        "slower_rows": [label(r) for r in rows if r["slower"]],
        "geometric_mean_over_inductor": geometric_mean(ratios) if ratios else None,
        "rows_with_headroom": len(wide),
        "headroom_taken": taken,
        "compile_time_ratio": geometric_mean([p["compile_ratio"] for p in probes])
        if probes
        else None,
        "memory_ratio": geometric_mean([p["memory_ratio"] for p in probes]) if probes else None,
    }


def label(row: dict[str, Any]) -> str:
    return f"{row['model']} {row['mode']} {row['tokens']} {row['dtype']}"


def markdown(result: dict[str, Any]) -> str:
    """The result as a page; ``render_tables.py`` puts the same tables elsewhere."""
    from render_tables import (
        depth_table,
        environment_line,
        probe_table,
        summary_lines,
        zoo_table,
    )

    parts = ["# Model zoo", environment_line(result), zoo_table(result)]
    parts += ["\n".join(f"- {line}" for line in summary_lines(result))]
    if result["probes"]:
        parts += ["## Compile time and memory", probe_table(result)]
    if result["depth"]:
        parts += ["## Passes against depth", depth_table(result)]
    return "\n\n".join(parts) + "\n"


def by_key(record: dict[str, Any]) -> dict[str, dict]:
    """The tables of a record, each a mapping, so that a row measured again replaces itself."""
    return {
        "rows": {label(r): r for r in record.get("rows", ())},
        "probes": {label(r): r for r in record.get("probes", ())},
        "depth": {r["blocks"]: r for r in record.get("depth", ())},
    }


@contextlib.contextmanager
def saving(path: Path, result: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """Write after every row: an interrupted run keeps what it measured."""

    def save() -> None:
        result["summary"] = summarize(result["rows"], result["probes"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")

    try:
        yield save
    finally:
        save()


def arguments() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return [w for w in text.split(",") if w]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="narrow models, few rounds, no probes")
    parser.add_argument("--models", type=words, default=list(MODELS))
    parser.add_argument("--rows", type=words, default=["infer", "train"])
    parser.add_argument("--tokens", type=words, default=["1", "16", "256"])
    parser.add_argument("--dtypes", type=words, default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--sample", type=float, default=0.03, help="seconds per timed sample")
    parser.add_argument("--tables", type=words, default=list(TABLES))
    parser.add_argument(
        "--probe-tokens", type=words, default=["16"], help="lengths that are probed"
    )
    parser.add_argument("--repeats", type=int, default=2, help="processes of a probe")
    parser.add_argument("--depths", type=words, default=["10", "100", "1000"])
    parser.add_argument("--add", action="store_true", help="keep rows that are there already")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", type=words, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.models = [m for m in options.models if m in ("gpt-192", "llama-192")]
        options.dtypes, options.rounds, options.tables = ["float32"], 9, ["rows", "depth"]
        options.depths = ["10", "100"]
    for name, known in (("models", MODELS), ("rows", ("infer", "train")), ("tables", TABLES)):
        unknown = set(getattr(options, name)) - set(known)
        if unknown:
            parser.error(f"unknown {name}: {sorted(unknown)}; known: {', '.join(known)}")
    return options


def plan(options: argparse.Namespace) -> list[tuple[Model, str, int, torch.dtype]]:
    """Training takes one length; images take batches of 1 (and 4 in training)."""
    out = []
    for name in options.models:
        model = MODELS[name]
        for dtype in options.dtypes:
            for mode in options.rows:
                if model.kind == "image":
                    sizes = [1] if mode == "infer" else [4]
                elif mode == "infer":
                    sizes = [int(t) for t in options.tokens]
                else:
                    sizes = [max(int(t) for t in options.tokens)]
                out += [(model, mode, n, getattr(torch, dtype)) for n in sizes]
    return out


def main() -> None:
    options = arguments()
    if options.one:
        one(options.one)
        return
    environment = measure.environment()
    kind = environment["device"] if environment["device_type"] != "cpu" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    path = options.out / f"model_zoo-{slug}"
    known = by_key(earlier(path.with_suffix(".json"), environment) if options.add else {})
    result: dict[str, Any] = {"environment": environment}
    result.update({table: list(found.values()) for table, found in known.items()})
    rows = plan(options) if {"rows", "probes"} & set(options.tables) else []

    def put(table: str, key: Any, row: dict[str, Any]) -> None:
        known[table][key] = row
        result[table] = list(known[table].values())

    print(f"normfuse {normfuse.__version__}, {environment['device']}: {len(rows)} rows")
    with saving(path, result) as save:
        with tqdm(rows, disable=not sys.stderr.isatty()) as bar:
            for model, mode, tokens, dtype in bar:
                bar.set_description(f"{model.name} {mode} {tokens}")
                what = (model, mode, tokens, dtype)
                if "rows" in options.tables:
                    row = measure_row(*what, options)
                    put("rows", label(row), row)
                asked = (
                    mode == "train" or model.kind == "image" or str(tokens) in options.probe_tokens
                )
                if "probes" in options.tables and asked:
                    row = probe_row(*what, options.repeats)
                    put("probes", label(row), row)
                save()
        for depth in options.depths if "depth" in options.tables else ():
            put("depth", int(depth), depth_row(int(depth)))
    print(markdown(result))


if __name__ == "__main__":
    main()
