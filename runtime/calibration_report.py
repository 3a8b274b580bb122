"""A calibration for people: text tables, a self-contained HTML page, lines in a rewrite's report."""

from __future__ import annotations

import base64
import html
import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..passes.report import Report
    from .calibration import Calibration

#: Columns of each kind's table: title, figure, format.
COLUMNS: dict[str, list[tuple[str, str, str]]] = {
    "stream": [
        ("rms", "rms", ".3g"),
        ("abs max", "abs_max", ".3g"),
        ("max/median", "max_to_median", ".1f"),
        ("top channel", "top_channel", "d"),
        ("its energy", "top_channel_share", ".1%"),
        ("|x|/‖x‖", "top_channel_ratio", ".2f"),
        ("is arg-max", "top_channel_argmax", ".0%"),
        ("its gain", "relative_gain_at_top_channel", ".2g"),
        ("top-16 energy", "top16_share", ".1%"),
        ("kurtosis", "row_kurtosis", ".1f"),
        ("non-finite", "nonfinite", "d"),
    ],
    "linear": [
        ("rms", "rms", ".3g"),
        ("abs max", "abs_max", ".3g"),
        ("max/median", "max_to_median", ".1f"),
        ("row max/median", "row_max_to_median", ".1f"),
        ("top-1 energy", "top1_share", ".1%"),
        ("kurtosis", "row_kurtosis", ".1f"),
        ("non-finite", "nonfinite", "d"),
    ],
    "norm": [
        ("row rms p1", "row_rms_p01", ".3g"),
        ("p50", "row_rms_p50", ".3g"),
        ("p99", "row_rms_p99", ".3g"),
        ("peak/rms p50", "row_peak_p50", ".1f"),
        ("p99", "row_peak_p99", ".1f"),
    ],
    "attention": [
        ("heads", "heads", "d"),
        ("queries", "queries", "d"),
        ("mass on key 0", "first_mass", ".1%"),
        ("largest", "first_mass_max", ".1%"),
        ("if even", "uniform_mass", ".1%"),
        ("heads over 30 %", "heads_over_threshold", "d"),
        ("‖v₀‖/mean", "first_value_ratio", ".2f"),
        ("largest logit", "logit_max", ".3g"),
    ],
}

TITLES = {
    "stream": "Residual stream (input of each norm that reads it)",
    "linear": "Inputs of linear layers",
    "norm": "Row RMS at each norm",
    "attention": "Attention",
}


def _cell(value: Any, spec: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return format(int(value) if spec == "d" else float(value), spec)


def rows(calibration: Calibration, kind: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one table."""
    header = ["", *(title for title, _, _ in COLUMNS[kind])]
    cells = []
    for entry in calibration.of_kind(kind):
        figures = entry.figures()
        name = entry.name
        if len(entry.readers) > 1:
            name += f" (+{len(entry.readers) - 1})"
        cells.append([name, *(_cell(figures.get(f), spec) for _, f, spec in COLUMNS[kind])])
    return header, cells


def to_text(calibration: Calibration, width: int = 180) -> str:
    """Verdict and tables as text."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    out = io.StringIO()
    console = Console(file=out, width=width, no_color=True, highlight=False)
    console.print(f"calibration: {calibration.batches} batches, {calibration.tokens} tokens")
    for line in calibration.verdict():
        console.print(f"• {line}", markup=False, soft_wrap=True)
    for kind in ("stream", "attention", "linear"):
        header, cells = rows(calibration, kind)
        if not cells:
            continue
        table = Table(title=TITLES[kind], title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
        for i, title in enumerate(header):
            table.add_column(title, justify="right" if i else "left", no_wrap=True)
        for line in cells:
            table.add_row(*line)
        console.print(table)
    return out.getvalue()


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 2rem;font-size:13px}
th,td{padding:.15rem .6rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
th:first-child,td:first-child{text-align:left;font-family:ui-monospace,monospace}
.scroll{overflow-x:auto} img{max-width:100%} li{margin:.2rem 0}
"""


def to_html(calibration: Calibration, path: str | os.PathLike | None = None) -> str:
    """A self-contained page; written to ``path`` if given."""
    e = html.escape
    parts = [
        "<!doctype html><meta charset=utf-8><title>Calibration</title>",
        f"<style>{_STYLE}</style><h1>Calibration</h1>",
        f"<p>{calibration.batches} batches, {calibration.tokens} tokens.</p><ul>",
        *(f"<li>{e(line)}</li>" for line in calibration.verdict()),
        "</ul>",
    ]
    for title, image in _images(calibration):
        parts.append(f'<h2>{e(title)}</h2><img alt="{e(title)}" src="{image}">')
    for kind in TITLES:
        header, cells = rows(calibration, kind)
        if not cells:
            continue
        parts.append(f"<h2>{e(TITLES[kind])}</h2><div class=scroll><table><tr>")
        parts += [f"<th>{e(t)}</th>" for t in header]
        parts.append("</tr>")
        for line in cells:
            parts.append("<tr>" + "".join(f"<td>{e(c)}</td>" for c in line) + "</tr>")
        parts.append("</table></div>")
    text = "\n".join(parts)
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def _images(calibration: Calibration) -> list[tuple[str, str]]:
    try:
        from . import calibration_plots as plots
    except ImportError:  # matplotlib is an extra
        return []
    out = []
    for title, draw in plots.DRAWINGS.items():
        figure = draw(calibration)
        if figure is None:
            continue
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=110, bbox_inches="tight")
        out.append((title, "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()))
    return out


def attach(calibration: Calibration, report: Report) -> None:
    """Verdict lines become notes; the channel heat map joins the stream drawings."""
    report.notes += [f"calibration: {line}" for line in calibration.verdict()]
    try:
        from . import calibration_plots as plots
    except ImportError:
        return
    figure = plots.channel_heat_map(calibration)
    if figure is None:
        return
    svg = io.StringIO()
    figure.savefig(svg, format="svg", bbox_inches="tight")
    body = svg.getvalue()
    body = body[body.index("<svg") :]
    text = "\n".join(calibration.verdict())
    report.streams.append({"name": "calibration: channels over depth", "text": text, "svg": body})
