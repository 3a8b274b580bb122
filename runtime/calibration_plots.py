"""Plots of a calibration (needs matplotlib, the ``plots`` extra).

Every function returns a ``matplotlib.figure.Figure`` made without pyplot: nothing pops up, no global
state changes. ``None`` means there is nothing to draw.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure

from .statistics import TOP_K, Attention, Channels

if TYPE_CHECKING:
    from .calibration import Calibration, Entry

#: Channels shown by name at most; the rest of the stream is sorted behind them.
LABELS = 6


def _streams(calibration: Calibration) -> list[Entry]:
    """The points of the longest residual stream, in order."""
    groups: dict[str, list[Entry]] = {}
    for entry in calibration.of_kind("stream"):
        if int(entry.stats.count):  # type: ignore[union-attr]
            groups.setdefault(entry.stream, []).append(entry)
    return max(groups.values(), key=len, default=[])


def _ticks(axis: Any, names: list[str], most: int = 24) -> None:
    step = max(1, -(-len(names) // most))
    axis.set_yticks(range(0, len(names), step), names[::step], fontsize=7)


def channel_heat_map(calibration: Calibration) -> Figure | None:
    """Channels (across) over depth (down): ``log10`` of mean magnitude over the median channel's."""
    entries = _streams(calibration)
    if not entries:
        return None
    rows = []
    for entry in entries:
        assert isinstance(entry.stats, Channels)
        magnitude = entry.stats.abs_sum / max(int(entry.stats.count), 1)
        median = magnitude.median().clamp_min(1e-300)
        rows.append((magnitude / median).clamp_min(1e-3).log10())
    image = torch.stack(rows)
    figure = Figure(figsize=(9, 1.2 + 0.2 * len(rows)))
    axis = figure.add_subplot()
    shown = axis.imshow(
        image.numpy(),
        aspect="auto",
        cmap="magma",
        interpolation="nearest",
        vmin=0.0,
        vmax=max(2.0, float(image.max())),
    )
    _ticks(axis, [e.name for e in entries])
    axis.set_xlabel("channel")
    top = image.amax(0).topk(min(LABELS, image.shape[1]))
    for value, channel in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        if value > 1:
            axis.annotate(
                str(channel),
                (channel, -0.5),
                xytext=(0, 3),  # points: clear of the frame
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7,
                rotation=90,
            )
    bar = figure.colorbar(shown, ax=axis, pad=0.01)
    bar.set_label("log₁₀ (mean |x| / median channel)", fontsize=8)
    return figure


def energy_concentration(calibration: Calibration) -> Figure | None:
    """Share of a token's energy in its 1, 4 and 16 largest channels, over depth."""
    entries = _streams(calibration)
    if not entries:
        return None
    figure = Figure(figsize=(9, 3))
    axis = figure.add_subplot()
    for k in TOP_K:
        shares = [e.figures()[f"top{k}_share"] for e in entries]
        axis.plot(shares, marker=".", label=f"{k} largest")
    axis.set_ylim(0, 1.03)  # a share of 1 stays visible under the frame
    axis.set_ylabel("share of ‖x‖²")
    step = max(1, len(entries) // 24)
    places = range(0, len(entries), step)
    axis.set_xticks(places, [entries[i].name for i in places], rotation=60, ha="right", fontsize=7)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.3)
    return figure


def attention_sink_map(calibration: Calibration) -> Figure | None:
    """Heads (across) over depth (down): mean softmax mass on the first key."""
    entries = [
        e
        for e in calibration.of_kind("attention")
        if isinstance(e.stats, Attention) and int(e.stats.queries.sum())
    ]
    if not entries:
        return None
    heads = max(e.stats.heads for e in entries)  # type: ignore[union-attr]
    image = torch.full((len(entries), heads), float("nan"), dtype=torch.float64)
    for i, entry in enumerate(entries):
        assert isinstance(entry.stats, Attention)
        image[i, : entry.stats.heads] = entry.stats.first_mass
    figure = Figure(figsize=(2.5 + 0.3 * heads, 1.2 + 0.25 * len(entries)))
    axis = figure.add_subplot()
    shown = axis.imshow(image.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1)
    _ticks(axis, [e.name for e in entries])
    axis.set_xlabel("head")
    figure.colorbar(shown, ax=axis, pad=0.02).set_label("mass on the first key")
    return figure


def compare(calibrations: Mapping[str, Calibration]) -> Figure | None:
    """Several calibrations side by side (before and after): unevenness and energy over depth.

    Args:
        calibrations: by label, in drawing order.
    """
    drawn = {label: _streams(c) for label, c in calibrations.items()}
    drawn = {label: entries for label, entries in drawn.items() if entries}
    if not drawn:
        return None
    figure = Figure(figsize=(10, 3.2))
    left, right = figure.subplots(1, 2)
    for label, entries in drawn.items():
        figures = [e.figures() for e in entries]
        left.plot([f["max_to_median"] for f in figures], marker=".", label=label)
        right.plot([f["top_channel_share"] for f in figures], marker=".", label=label)
    left.set_yscale("log")
    left.set_ylabel("largest / median channel")
    right.set_ylabel("energy share of the top channel")
    right.set_ylim(0, 1.03)
    for axis in (left, right):
        axis.set_xlabel("norm, in network order")
        axis.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.tight_layout()
    return figure


DRAWINGS = {
    "Channels over depth": channel_heat_map,
    "Energy concentration": energy_concentration,
    "Attention sinks": attention_sink_map,
}


def save_all(calibration: Calibration, folder: str | os.PathLike) -> list[Path]:
    """Write every drawing as PNG into ``folder``; returns the files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for title, draw in DRAWINGS.items():
        figure = draw(calibration)
        if figure is not None:
            path = folder / (title.lower().replace(" ", "_") + ".png")
            figure.savefig(path, dpi=150, bbox_inches="tight")
            files.append(path)
    return files
