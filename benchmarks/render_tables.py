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
        out.append(
            f"{s['rows_with_headroom']} rows leave at least 5 % to the bound (the model without "
            f"norms); {100 * s['headroom_taken']:.0f} % of that headroom is taken (geometric mean)."
        )
    if s["compile_time_ratio"] is not None:
        out.append(f"Compile time, cold caches: {s['compile_time_ratio']:.2f}× Inductor's.")
    return out


def section(name: str) -> str:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    if not path.is_file():
        return "Not measured yet; `python benchmarks/model_zoo.py` fills this section.\n"
    result = json.loads(path.read_text("utf-8"))
    bullets = "\n".join(f"- {line}" for line in summary_lines(result))
    return f"{environment_line(result)}\n\n{zoo_table(result)}\n\n{bullets}\n"


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
