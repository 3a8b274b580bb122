"""Measured results as Markdown tables; fills the marked sections of README.md and the docs.

    python benchmarks/render_tables.py            # rewrite the sections
    python benchmarks/render_tables.py --check    # fail if a section is out of date

A section is what stands between ``<!-- numbers: NAME -->`` and ``<!-- /numbers -->``; NAME is a file of
``benchmarks/results`` without its ending. No number in the repository's pages is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECTION = re.compile(r"(<!-- numbers: ([\w.-]+) -->\n)(.*?)(<!-- /numbers -->)", re.S)


def environment_line(result: dict[str, Any]) -> str:
    e = result["environment"]
    versions = [f"torch {e['torch']}"]
    if e.get("triton") and e.get("device_type") == "cuda":
        versions.append(f"triton {e['triton']}")
    versions.append(f"Python {e['python']}")
    return f"{e['device']}; {', '.join(versions)}; {e['date']}."


def milliseconds(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 10 else f"{ms:.1f}"


def ratio(entry: dict[str, float]) -> str:
    return f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"


def zoo_table(result: dict[str, Any]) -> str:
    lines = [
        "| model | mode | tokens | dtype | eager ms | Inductor ms | normfuse ms "
        "| × Inductor [95 %] | bound × | rewritten |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in result["rows"]:
        t = {name: milliseconds(v["median"]) for name, v in r["times"].items()}
        over = r["over_inductor"]
        lines.append(
            f"| {r['model']} | {r['mode']} | {r['tokens']} | {r['dtype']} | {t['eager']} "
            f"| {t['inductor']} | {t['normfuse']} | {ratio(over['normfuse'])} "
            f"| {over['bound']['value']:.2f} | {r['rewritten']}/{r['sites']} |"
        )
    return "\n".join(lines)


def probe_table(result: dict[str, Any]) -> str:
    lines = [
        "| model | mode | tokens | dtype | compile s: Inductor | normfuse | × "
        "| peak MB: eager | Inductor | normfuse | × |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in result["probes"]:
        seconds, peak = r["compile_seconds"], r["peak_bytes"]
        lines.append(
            f"| {r['model']} | {r['mode']} | {r['tokens']} | {r['dtype']} "
            f"| {seconds['inductor']:.1f} | {seconds['normfuse']:.1f} | {r['compile_ratio']:.2f} | "
            + " | ".join(f"{peak[v] / 1e6:,.0f}" for v in ("eager", "inductor", "normfuse"))
            + f" | {r['memory_ratio']:.2f} |"
        )
    return "\n".join(lines)


def depth_table(result: dict[str, Any]) -> str:
    lines = ["| blocks | sites | passes s | capture + passes s |", "| ---: | ---: | ---: | ---: |"]
    for r in result["depth"]:
        lines.append(
            f"| {r['blocks']:,} | {r['sites']:,} | {r['pass_seconds']:.2f} "
            f"| {r['explain_seconds']:.2f} |"
        )
    return "\n".join(lines)


def summary_lines(result: dict[str, Any]) -> list[str]:
    s = result["summary"]
    out = []
    if s["geometric_mean_over_inductor"]:
        out.append(
            f"{s['rows']} rows, geometric mean {s['geometric_mean_over_inductor']:.3f}× Inductor."
        )
        slower = s["slower_rows"]
        out.append(
            "No row is slower than Inductor (95 % interval below 0.98×)."
            if not slower
            else f"Slower than Inductor (95 % interval below 0.98×): {', '.join(slower)}."
        )
    if s["headroom_taken"] is not None:
        rows = s["rows_with_headroom"]
        out.append(
            f"{rows} row{' leaves' if rows == 1 else 's leave'} at least 5 % to the bound (the model "
            f"without norms); {100 * s['headroom_taken']:.0f} % of that headroom is taken."
        )
    same = [r["over_inductor"]["normfuse"]["value"] for r in result["rows"] if not r["rewritten"]]
    if same:
        out.append(
            f"Where nothing is rewritten Inductor compiles its own graph: what those rows show "
            f"({min(same):.2f}–{max(same):.2f}×) is the noise of the measurement."
        )
    if s["compile_time_ratio"] is not None:
        out.append(
            f"Compile time with cold caches {s['compile_time_ratio']:.2f}×, peak memory of the "
            f"process {s['memory_ratio']:.2f}× Inductor's (geometric means)."
        )
    return out


def zoo_section(result: dict[str, Any]) -> str:
    bullets = "\n".join(f"- {line}" for line in summary_lines(result))
    return f"{zoo_table(result)}\n\n{bullets}"


#: What a task of the training runs holds besides text.
TASKS = {
    "text": "",
    "begin": " behind a begin token",
    "backcopy": " drawn from bigrams with a copying rule",
}

#: Figures of one training run: heading, key, format.
RESCALING_COLUMNS = (
    ("loss, bits/byte", "loss", ".3f"),
    ("W8A8 lost", "w8a8_lost", "+.4f"),
    ("W4A4 lost", "w4a4_lost", "+.3f"),
    ("stream max/median", "stream_max_to_median", ".1f"),
    ("top channel's energy", "stream_top_share", ".2f"),
    ("linear input peak/rms", "linear_peak", ".1f"),
    ("first-key mass", "first_key_mass", ".2f"),
    ("first value/mean", "first_value", ".2f"),
    ("first token's norm/median", "first_norm", ".1f"),
)


def rescaling_table(seeds: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over seeds, one line per kind of model; columns all of them have."""
    rows = [row for r in seeds for row in r["rows"].values()]
    columns = [c for c in RESCALING_COLUMNS if all(c[1] in row for row in rows)]
    lines = [
        "| model | " + " | ".join(c for c, _, _ in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for name in seeds[0]["rows"]:
        cells = []
        for _, key, spec in columns:
            values = [r["rows"][name][key] for r in seeds]
            spread = f" ± {statistics.stdev(values):{spec.lstrip('+')}}" if len(values) > 1 else ""
            cells.append(format(statistics.fmean(values), spec) + spread)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(seeds: list[dict[str, Any]], name: str) -> str:
    """Mean and standard deviation over seeds of ``name`` minus plain (same seed, same data)."""
    parts = []
    for label, key in (("loss", "loss"), ("W4A4 loss", "w4a4_lost")):
        d = [r["rows"][name][key] - r["rows"]["plain"][key] for r in seeds]
        spread = statistics.stdev(d) if len(d) > 1 else float("nan")
        parts.append(f"{label} {statistics.fmean(d):+.3f} ± {spread:.3f}")
    return f"{name[0].upper()}{name[1:]} minus plain, by seed: {', '.join(parts)} bits/byte."


def growth(seeds: list[dict[str, Any]], key: str, spec: str) -> str:
    """A figure at quarters of the training, mean over seeds."""
    out = []
    for name in seeds[0]["history"]:
        points = zip(*(r["history"][name] for r in seeds), strict=True)
        figures = [statistics.fmean(p[key] for p in ps) for ps in points]
        out.append(f"{name} {', '.join(format(f, spec) for f in figures)}")
    return "; ".join(out)


def rescaling_section(result: dict[str, Any]) -> str:
    parts = []
    for title, regime in result["regimes"].items():
        s = result["settings"] | regime["changes"]
        seeds = list(regime["seeds"].values())
        trained = [name for name in seeds[0]["history"] if name != "plain"]
        late = [row for r in seeds for row in r["rows"].values() if "loss_at_insertion" in row]
        same = all(r["bit_identical_at_insertion"] for r in late)
        grown = "Stream max/median at each quarter of the training: "
        grown += f"{growth(seeds, 'stream_max_to_median', '.1f')}."
        if s.get("task", "text") != "text":
            grown += f" First-key mass: {growth(seeds, 'first_key_mass', '.2f')}."
        parts += [
            f"**{title}**: {len(seeds)} seeds, {s['depth']} block{'s' * (s['depth'] > 1)} "
            f"of width {s['d']}, "
            f"{s.get('steps', result['steps'])} steps of {s['batch']}×{s['length']} bytes"
            f"{TASKS[s.get('task', 'text')]}, "
            f"learning rate {s['lr']:g}, weight decay {s['decay']:g}.",
            rescaling_table(seeds),
            f"{' '.join(paired(seeds, name) for name in trained)} Gates inserted into the trained plain "
            f"model leave its output {'bit for bit as it was' if same else 'CHANGED'}. {grown}",
        ]
        absorbed = [
            r["rows"]["outliers absorbed"] for r in seeds if "outliers absorbed" in r["rows"]
        ]
        if absorbed:
            counts = ", ".join(f"{r['norms_absorbed']} of {r['norms']}" for r in absorbed)
            parts.append(
                f"`AbsorbOutliers` found a channel within its tolerance at {counts} norms."
            )
    if tried := result.get("search"):
        worst = max(tried, key=lambda r: r["stream_max_to_median"])
        changed = ", ".join(
            f"{k} {v if isinstance(v, str) else format(v, 'g')}"
            for k, v in worst["changes"].items()
        )
        mass = max(r["first_key_mass"] for r in tried)
        parts.append(
            f"{len(tried)} further plain runs looked for settings that grow a sink (`--search`); none "
            f"reached the 20× that counts as one. Closest: {worst['stream_max_to_median']:.1f}× "
            f"({changed}). No head of theirs puts more than {100 * mass:.0f} % of its attention on the "
            "first key."
        )
    return "\n\n".join(parts)


def gating_section(result: dict[str, Any]) -> str:
    lines = [
        "| what | backend | plain ms | gated ms | gated/plain [95 %] | without the optimizer | "
        "kept for backward, MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    notes, spent = [], []
    for name, rows in result["results"].items():
        for backend, r in rows.items():
            if not isinstance(r, dict):
                continue
            if "failed" in r:
                lines.append(f"| {name} | {backend} | failed | | | | |")
                continue
            low, high = r["interval"]
            part = ""
            if "without_optimizer" in r:
                part = "{:.3f} [{:.3f}, {:.3f}]".format(*r["without_optimizer"])
            kept = f"{r['plain_saved_bytes'] / 1e6:.1f} → {r['gated_saved_bytes'] / 1e6:.1f}"
            lines.append(
                f"| {name} | {backend} | {r['plain_ms']:.2f} | {r['gated_ms']:.2f} "
                f"| {r['ratio']:.3f} [{low:.3f}, {high:.3f}] | {part} | {kept} |"
            )
            if "gated_operator_ms" in r:
                spent.append(
                    f"of {backend}'s gated step {r['gated_operator_ms']:.1f} ms are the gates' operators"
                )
        extra = rows["new_parameter_bytes"] / rows["parameter_bytes"]
        notes.append(f"{name}: {100 * extra:.1f} % more bytes of parameters")
    tokens = "×".join(map(str, result["tokens"]))
    alone = [
        "| gate alone | inference, C++ and Inductor ms | ratio | training, C++ and Inductor ms | ratio |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    pairs = iter(result["gates"])
    for inference, training in zip(pairs, pairs, strict=True):
        cells = [
            f"{g['ours_ms']:.3f} and {g['inductor_ms']:.3f} | "
            f"{g['ratio']:.2f} [{g['interval'][0]:.2f}, {g['interval'][1]:.2f}]"
            for g in (inference, training)
        ]
        size = f"{training['rows']}×{training['width']}, rank {training['rank']}"
        alone.append(f"| {size} | {' | '.join(cells)} |")
    return (
        f"One training step, width {result['width']}, {tokens} tokens.\n\n"
        + "\n".join(lines)
        + f"\n\n{'; '.join([*notes[1:], *spent])}."
        + ("\n\n" + "\n".join(alone) if result["gates"] else "")
    )


def step_section(result: dict[str, Any]) -> str:
    parts = []
    for r in result["results"]:
        gemm = ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in r["gemm_gflops"].items())
        if "sustained_gflops" in r:
            gemm += f" (between the steps {r['dtype']} {r['sustained_gflops']:.0f})"
        lines = [
            f"**{r['set']}**: {r['matrices']} matrices, {r['dtype']}; GEMM {gemm}; symmetric-aware "
            f"floor {r['floor'] * 1e3:.0f} ms.",
            "",
            "| step | median ms | × plain loop | × floor | first step s |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for label, row in r["rows"].items():
            if "skipped" in row:
                lines.append(f"| {label} | {row['skipped']} | | | |")
                continue
            lines.append(
                f"| {label} | {row['median'] * 1e3:.1f} | {row.get('speedup', float('nan')):.2f} "
                f"| {row['floors']:.2f} | {row['first']:.2f} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def bytes_section(result: dict[str, Any]) -> str:
    parts = []
    for r in result["results"]:
        lines = [
            f"**{r['set']}**: {r['entries'] / 1e6:.1f} M entries, copy {r['copy_rate'] / 1e9:.1f} GB/s.",
            "",
            "| part | passes | floor ms | median ms | × floor |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for label, row in r["bytes"].items():
            lines.append(
                f"| {label} | {row['passes']} | {row['floor'] * 1e3:.1f} "
                f"| {row['median'] * 1e3:.1f} | {row['floors']:.2f} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def members_section(result: dict[str, Any]) -> str:
    s = result["settings"]
    lines = [
        f"{s['layers']} blocks of width {s['width']}, {s['steps']} steps of {s['batch']}×"
        f"{s['context']} bytes, {s['seeds']} seeds at each learning rate of a grid of three; the best "
        "rate's mean validation loss in nats per byte ± standard deviation over seeds. An asterisk: "
        "the best rate is at its grid's edge.",
        "",
        "| member | validation loss | learning rate | grid | optimizer ms a step |",
        "| --- | ---: | ---: | --- | ---: |",
    ]
    for r in sorted(result["members"], key=lambda r: r["validation"]):
        edge = "*" if r["at the grid's edge"] else ""
        lines.append(
            f"| {r['member']} | {r['validation']:.3f} ± {r['deviation']:.3f} | {r['lr']:g}{edge} "
            f"| {', '.join(r['runs'])} | {r['step ms']:.1f} |"
        )
    return "\n".join(lines)


#: By the result's ``kind``: how it is rendered.
SECTIONS = {
    "zoo": zoo_section,
    "gated_rescaling": rescaling_section,
    "gating": gating_section,
    "optim_step": step_section,
    "optim_bytes": bytes_section,
    "train_lm": members_section,
}

#: What fills a section that has no result yet, by the start of its name.
SCRIPTS = {
    "gated_rescaling": "examples/gated_rescaling.py",
    "gating": "benchmarks/gating.py",
    "optim_step": "benchmarks/optim_step.py",
    "optim_bytes": "benchmarks/optim_step.py --bytes",
    "train_lm": "examples/train_lm.py --compare all",
    "": "benchmarks/model_zoo.py",
}


def section(name: str) -> str:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    if not path.is_file():
        script = next(s for start, s in SCRIPTS.items() if name.startswith(start))
        return f"Not measured yet; `python {script}` fills this section.\n"
    result = json.loads(path.read_text("utf-8"))
    body = SECTIONS[result.get("kind", "zoo")](result)
    return f"{environment_line(result)}\n\n{body}\n"


def fill(text: str) -> str:
    """``text`` with every marked section rendered anew."""
    return SECTION.sub(lambda m: f"{m[1]}{section(m[2])}{m[4]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        new = fill(text)
        if new != text:
            stale.append(page.name)
            if not options.check:
                page.write_text(new, encoding="utf-8")
    if stale and options.check:
        sys.exit(f"out of date, run benchmarks/render_tables.py: {', '.join(stale)}")
    print(f"updated: {', '.join(stale)}" if stale else "all sections are up to date")


if __name__ == "__main__":
    main()
