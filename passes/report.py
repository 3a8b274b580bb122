"""What was done, what was refused and why: the data. Rendering lives in ``runtime/render.py``."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: Rendering needs rich and jinja2, which this room does not know; it is looked up by name.
_RENDERER = "normfuse.runtime.render"


@dataclass
class Site:
    """One place of a model that passes act on: a norm (or a group of linears, a BatchNorm…).

    Attributes:
        key: unique and stable within a report, e.g. ``"transformer.h.0.ln_1"`` (a module called
            twice gets ``"…ln_1#1"``).
        kind: vocabulary op or group: ``"layer_norm"``, ``"rms_norm"``, ``"batch_norm"``,
            ``"linear"``, ``"near_miss"``…
        module: path of the user's module, ``""`` for functional code at the top.
        spelling: how it was written.
        where: ``file:line`` of the user's code.
        shape, dtype: of the input, as text (``"2×s0×768"``).
        applied: names of the passes that rewrote it.
        refused: ``(pass, reason)`` pairs.
        bytes_saved, flops_saved: predicted per call, by the cost model (0 if not estimated).
    """

    key: str
    kind: str
    module: str = ""
    spelling: str = ""
    where: str = ""
    shape: str = ""
    dtype: str = ""
    applied: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    bytes_saved: float = 0.0
    flops_saved: float = 0.0


@dataclass
class PassRecord:
    """One run of one pass."""

    name: str
    promise: str
    seconds: float = 0.0
    applied: int = 0
    refused: int = 0
    disabled: bool = False


@dataclass
class Report:
    """Everything known about one rewrite, serializable and picklable.

    Attributes:
        sites: one entry per site, in graph order.
        passes: one record per pass that ran.
        max_relative_error: largest float64 disagreement found by verification (``None``: not
            verified).
        working_error: ``{"eager": e, "rewritten": r}``, the largest relative errors against float64
            in the working dtype.
        seconds: time spent in capture, passes and verification.
        mode: ``"inference"`` or ``"training"``.
        device: device type the cost model was asked about.
        notes: sentences about the whole (fallbacks, graph breaks, memory cost of folded weights).
        streams: drawings of the residual streams as ``{"name", "text", "svg"}``.
        weight_bytes: memory taken by folded copies of weights.
        failed_verification: a pass was undone because its numbers disagreed (see ``notes``).
    """

    sites: list[Site] = field(default_factory=list)
    passes: list[PassRecord] = field(default_factory=list)
    max_relative_error: float | None = None
    working_error: dict[str, float] | None = None
    seconds: float = 0.0
    mode: str = "inference"
    device: str = "cpu"
    notes: list[str] = field(default_factory=list)
    streams: list[dict[str, str]] = field(default_factory=list)
    weight_bytes: int = 0
    failed_verification: bool = False

    def site(self, key: str, **facts: Any) -> Site:
        """The site called ``key``, created with ``facts`` if it is new."""
        for s in self.sites:
            if s.key == key:
                return s
        s = Site(key=key, **facts)
        self.sites.append(s)
        return s

    @property
    def applied(self) -> list[tuple[str, str]]:
        """All ``(site key, pass)`` pairs that were rewritten."""
        return [(s.key, p) for s in self.sites for p in s.applied]

    @property
    def refused(self) -> list[tuple[str, str, str]]:
        """All ``(site key, pass, reason)`` triples."""
        return [(s.key, p, r) for s in self.sites for p, r in s.refused]

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON-serializable)."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        data = dict(data)
        sites = [
            Site(**{**s, "refused": [tuple(r) for r in s["refused"]]}) for s in data.pop("sites")
        ]
        records = [PassRecord(**p) for p in data.pop("passes")]
        return cls(sites=sites, passes=records, **data)

    def to_json(self, path: str | Path | None = None, indent: int = 2) -> str:
        text = json.dumps(self.to_dict(), indent=indent)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """A self-contained HTML page; written to ``path`` if given, returned in any case."""
        return importlib.import_module(_RENDERER).to_html(self, path)

    def __str__(self) -> str:
        return importlib.import_module(_RENDERER).to_text(self)
