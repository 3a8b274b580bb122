"""What a calibration found: the entries, their verdict, merging and storing."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..passes.errors import NormfuseError
from .statistics import Attention, Channels

if TYPE_CHECKING:
    from ..passes.report import Report

FORMAT = 1

#: A stream channel is called a sink when it is this many times the median channel …
SINK_RATIO = 20.0
#: … and carries this share of the energy.
SINK_SHARE = 0.1
#: Softmax mass on the first key above which a head is called an attention sink.
SINK_MASS = 0.3


@dataclass
class Entry:
    """One calibrated place.

    Attributes:
        key: ``"<kind>:<name>"``; kind: ``"stream"``, ``"linear"``, ``"norm"`` or ``"attention"``.
        order: position along the network.
        module, where, readers, stream: see :class:`~normfuse.runtime.probes.Probe`.
        stats: the numbers.
        gain: ``(width,)`` gain of the norm that reads the value, float64, if it has one.
    """

    key: str
    kind: str
    order: int
    module: str
    where: str
    readers: list[str]
    stream: str
    stats: Channels | Attention
    gain: Tensor | None = None

    @property
    def name(self) -> str:
        return self.key.split(":", 1)[1]

    def describe(self) -> dict[str, Any]:
        """Everything but the numbers (JSON)."""
        size = self.stats.heads if isinstance(self.stats, Attention) else self.stats.width
        out = {
            name: getattr(self, name)
            for name in ("key", "kind", "order", "module", "where", "readers", "stream")
        }
        if isinstance(self.stats, Attention):
            out["min_keys"] = self.stats.min_keys
        return {**out, "size": size}

    def figures(self) -> dict[str, Any]:
        """Scalar figures, for tables and JSON."""
        out = self.stats.figures()
        if self.gain is not None and "top_channel" in out:
            top = out["top_channel"]
            median = float(self.gain.abs().median())
            out["gain_at_top_channel"] = float(self.gain[top])
            out["relative_gain_at_top_channel"] = (
                float(self.gain[top].abs()) / median if median else float("nan")
            )
        return out


@dataclass(frozen=True)
class Sink:
    """A channel that dominates a residual stream over a range of points.

    Attributes:
        stream: name of the stream; channel: index.
        first, last: names of the first and last norm that see it; points: how many in between.
        share: largest mean share of the energy along the range; ratio: largest ``mean|x_d|`` over
            the median channel's; argmax: largest share of tokens whose biggest channel it is.
        gain: smallest effective gain at the channel relative to the median gain (``None`` without
            gains): near zero means the norm hides the sink from its readers.
        constant: it hardly varies over tokens (std below 10 % of its mean).
    """

    stream: str
    channel: int
    first: str
    last: str
    points: int
    share: float
    ratio: float
    argmax: float
    gain: float | None
    constant: bool

    def __str__(self) -> str:
        span = f"at {self.first}" if self.points == 1 else f"from {self.first} to {self.last}"
        text = (
            f"dimension {self.channel} carries {self.share:.0%} of the energy {span} "
            f"({self.ratio:.0f}× the median channel, largest of all for {self.argmax:.0%} of tokens"
        )
        text += ", nearly the same for every token)" if self.constant else ")"
        if self.gain is not None and self.gain < 0.1:
            text += (
                f"; the norms hide it from their readers with a gain {self.gain:.2g}× the median"
            )
        return text


class Calibration:
    """Statistics of a model's activations.

    Attributes:
        entries: by key, in network order.
        batches, tokens: how much was seen (tokens: rows of the first stream point or linear).
        notes: sentences about the whole.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.batches = 0
        self.notes: list[str] = []

    # -- access -----------------------------------------------------------------------------------

    def of_kind(self, kind: str) -> list[Entry]:
        return sorted(
            (e for e in self.entries.values() if e.kind == kind), key=lambda e: (e.order, e.key)
        )

    def __getitem__(self, key: str) -> Entry:
        return self.entries[key]

    @property
    def tokens(self) -> int:
        for kind in ("stream", "linear", "norm"):
            for entry in self.of_kind(kind):
                return int(entry.stats.count) + int(entry.stats.nonfinite)  # type: ignore[union-attr]
        return 0

    # -- combining and storing ----------------------------------------------------------------------

    def merge(self, other: Calibration) -> Calibration:
        """Add ``other``'s batches, in place. Sites that only one of the two has are kept.

        Raises:
            NormfuseError: the same site has different widths (calibrations of different models).
        """
        for key, theirs in other.entries.items():
            mine = self.entries.get(key)
            size = "heads" if theirs.kind == "attention" else "width"
            if mine is not None and getattr(mine.stats, size) != getattr(theirs.stats, size):
                raise NormfuseError(
                    f"cannot merge calibrations of different models: {key} has size "
                    f"{getattr(mine.stats, size)} here and {getattr(theirs.stats, size)} there"
                )
            if mine is not None and isinstance(mine.stats, Attention):
                mine.stats.check_like(theirs.stats)  # type: ignore[arg-type]
        for key, theirs in other.entries.items():
            mine = self.entries.get(key)
            if mine is None:
                self.entries[key] = _copied(theirs)
            else:
                mine.stats.merge(theirs.stats)  # type: ignore[arg-type]
        self.batches += other.batches
        self.notes += [n for n in other.notes if n not in self.notes]
        return self

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration().merge(self).merge(other)

    def _tensors(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for key, entry in self.entries.items():
            out |= {f"{key}|{k}": v.contiguous() for k, v in entry.stats.state().items()}
            if entry.gain is not None:
                out[f"{key}|gain"] = entry.gain.contiguous()
        return out

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "batches": self.batches,
            "notes": self.notes,
            "entries": [e.describe() for e in self.entries.values()],
        }

    @staticmethod
    def check_path(path: Path) -> None:
        """Raise if nothing can be saved there, before a long run finds out."""
        if path.suffix not in (".json", ".safetensors"):
            raise NormfuseError(f"save calibrations as .safetensors or .json, not {path.name!r}")
        if not path.absolute().parent.is_dir():
            raise NormfuseError(f"there is no folder {path.absolute().parent} to save to")
        if path.suffix == ".safetensors":
            _safetensors()

    def save(self, path: str | os.PathLike) -> None:
        """Write everything, exactly, to ``*.safetensors`` (needs that package) or ``*.json``.

        The file appears whole or not at all.
        """
        path = Path(path)
        self.check_path(path)
        temporary = path.with_name(path.name + ".partial")
        if path.suffix == ".json":
            data = self._header()
            data["tensors"] = {
                k: {"dtype": str(v.dtype).removeprefix("torch."), "data": _listed(v)}
                for k, v in self._tensors().items()
            }
            temporary.write_text(json.dumps(data), encoding="utf-8")
        else:
            _safetensors().save_file(
                self._tensors(), str(temporary), metadata={"normfuse": json.dumps(self._header())}
            )
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Calibration:
        """Read what :meth:`save` wrote."""
        path = Path(path)
        if path.suffix == ".json":
            try:
                header = json.loads(path.read_text(encoding="utf-8"))
                tensors = {
                    k: torch.tensor(_parsed(v["data"]), dtype=getattr(torch, v["dtype"]))
                    for k, v in header["tensors"].items()
                }
            except (ValueError, KeyError, TypeError) as error:
                raise NormfuseError(f"{path} is not a normfuse calibration ({error})") from error
        elif path.suffix == ".safetensors":
            with _safetensors().safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if "normfuse" not in metadata:
                    raise NormfuseError(f"{path} is not a normfuse calibration")
                header = json.loads(metadata["normfuse"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        else:
            raise NormfuseError(f"calibrations are .safetensors or .json files, not {path.name!r}")
        if header.get("format") != FORMAT:
            raise NormfuseError(
                f"{path} has calibration format {header.get('format')}, not {FORMAT}"
            )
        new = cls()
        new.batches, new.notes = header["batches"], list(header["notes"])
        for fact in header["entries"]:
            fact = dict(fact)
            size, min_keys = fact.pop("size"), fact.pop("min_keys", 0)
            stats: Any = (
                Attention(size, min_keys) if fact["kind"] == "attention" else Channels(size)
            )
            prefix = f"{fact['key']}|"
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            gain = state.pop("gain", None)
            stats.load(state)
            new.entries[fact["key"]] = Entry(**fact, stats=stats, gain=gain)
        return new

    # -- conclusions ----------------------------------------------------------------------------

    def sinks(self, ratio: float = SINK_RATIO, share: float = SINK_SHARE) -> list[Sink]:
        """Channels that dominate a residual stream, with the range over which they do."""
        by_stream: dict[str, list[Entry]] = {}
        for entry in self.of_kind("stream"):
            by_stream.setdefault(entry.stream, []).append(entry)
        found: list[Sink] = []
        for stream, entries in by_stream.items():
            marks: dict[int, list[int]] = {}
            for i, entry in enumerate(entries):
                for channel in _dominant(entry.stats, ratio, share):  # type: ignore[arg-type]
                    marks.setdefault(channel, []).append(i)
            for channel, places in marks.items():
                for run in _runs(places):
                    found.append(_sink(stream, channel, [entries[i] for i in run]))
        return sorted(found, key=lambda s: -s.share)

    def attention_sinks(self, threshold: float = SINK_MASS) -> list[tuple[str, list[int]]]:
        """``(attention, heads)`` whose mean softmax mass on the first key exceeds ``threshold``."""
        out = []
        for entry in self.of_kind("attention"):
            assert isinstance(entry.stats, Attention)
            seen = entry.stats.queries > 0
            over = (entry.stats.first_mass > threshold) & seen
            if over.any():
                out.append((entry.name, over.nonzero().flatten().tolist()))
        return out

    def sites(self, ratio: float = SINK_RATIO, share: float = SINK_SHARE) -> list[str]:
        """Keys of the norms that read a stream dominated by a channel: where a gate could help.

        Feed it to ``InsertGatedNorm(sites=…)``.
        """
        out: list[str] = []
        for entry in self.of_kind("stream"):
            if _dominant(entry.stats, ratio, share):  # type: ignore[arg-type]
                out += entry.readers
        return out

    def hidden(self, ratio: float = SINK_RATIO, gain: float = 0.1) -> list[tuple[str, int, float]]:
        """``(norm site, channel, relative gain)`` where a small gain hides a large channel.

        Folding that gain into the readers' weights hands the raw sink to whatever quantizes the
        activations: quantize first, or gate the norm before folding.
        """
        out = []
        for entry in self.of_kind("stream"):
            if entry.gain is None or not int(entry.stats.count):  # type: ignore[union-attr]
                continue
            median = float(entry.gain.abs().median())
            if not median:
                continue
            for channel in _dominant(entry.stats, ratio, 0.0):  # type: ignore[arg-type]
                relative = float(entry.gain[channel].abs()) / median
                if relative < gain:
                    out += [(site, channel, relative) for site in entry.readers]
        return out

    def verdict(self) -> list[str]:
        """What was found, in sentences."""
        lines = [str(s) for s in self.sinks()]
        if not self.of_kind("stream"):
            lines.append(
                "the model has no residual stream (no norm reads a sum of several writers): "
                "channel statistics are of linear and norm inputs only"
            )
        elif not lines:
            worst = max(self.of_kind("stream"), key=lambda e: e.figures().get("max_to_median", 0))
            figures = worst.figures()
            if "max_to_median" in figures:
                lines.append(
                    "no residual sink: nowhere does one channel carry "
                    f"{SINK_SHARE:.0%} of the energy at {SINK_RATIO:.0f}× the median channel "
                    f"(most uneven: {worst.name}, {figures['max_to_median']:.1f}×, "
                    f"top channel {figures['top_channel_share']:.1%} of the energy)"
                )
        attention = self.of_kind("attention")
        sinks = self.attention_sinks()
        if sinks:
            heads = sum(len(h) for _, h in sinks)
            total = sum(e.stats.heads for e in attention)  # type: ignore[union-attr, misc]
            worst = max(attention, key=lambda e: e.figures().get("first_mass_max", 0.0))
            figures = worst.figures()
            lines.append(
                f"{heads} of {total} heads put more than {SINK_MASS:.0%} of their attention on the "
                f"first token (most: {worst.name}, {figures['first_mass_max']:.0%} against "
                f"{figures['uniform_mass']:.1%} if spread evenly; its first value vector is "
                f"{figures['first_value_ratio']:.2f}× as long as the average)"
            )
        elif any(e.figures()["queries"] > 0 for e in attention):
            most = max(e.figures().get("first_mass_max", 0.0) for e in attention)
            lines.append(
                f"no attention sink: no head puts more than {SINK_MASS:.0%} of its attention on "
                f"the first token (most: {most:.0%})"
            )
        elif attention:
            lines.append("attention sinks: no query saw enough keys to tell")
        hidden = self.hidden()
        if hidden:
            site, channel, relative = min(hidden, key=lambda h: h[2])
            lines.append(
                f"{len({h[0] for h in hidden})} norms hide a large channel behind a small gain "
                f"(smallest: {site}, channel {channel}, {relative:.2g}× the median gain); folding "
                "that gain exposes the channel to activation quantization"
            )
        bad = {
            e.name: n
            for e in self.entries.values()
            if e.kind != "norm" and (n := int(e.stats.nonfinite.sum()))
        }
        if bad:
            name = next(iter(bad))
            lines.append(
                f"non-finite activations at {len(bad)} places, first at {name} ({bad[name]} rows); "
                "such rows are left out of all other figures"
            )
        return lines + self.notes

    def to_dict(self) -> dict[str, Any]:
        """Figures and verdict as plain data (JSON-serializable; :meth:`save` keeps everything)."""
        return {
            "batches": self.batches,
            "tokens": self.tokens,
            "verdict": self.verdict(),
            "entries": [
                {**e.describe(), **e.figures()}
                for kind in ("stream", "linear", "norm", "attention")
                for e in self.of_kind(kind)
            ],
        }

    def __str__(self) -> str:
        from .calibration_report import to_text

        return to_text(self)

    def to_html(self, path: str | os.PathLike | None = None) -> str:
        """A self-contained page with verdict, tables and (with matplotlib) plots."""
        from .calibration_report import to_html

        return to_html(self, path)

    def attach(self, report: Report) -> None:
        """Put the verdict (and, with matplotlib, the heat map) into a rewrite's report."""
        from .calibration_report import attach

        attach(self, report)


def _copied(entry: Entry) -> Entry:
    stats: Any = (
        Attention(entry.stats.heads, entry.stats.min_keys)
        if isinstance(entry.stats, Attention)
        else Channels(entry.stats.width)
    )
    stats.load(entry.stats.state())
    gain = None if entry.gain is None else entry.gain.clone()
    facts = {k: v for k, v in entry.describe().items() if k not in ("size", "min_keys")}
    return Entry(**{**facts, "readers": list(entry.readers)}, stats=stats, gain=gain)


def _dominant(stats: Channels, ratio: float, share: float) -> list[int]:
    if int(stats.count) == 0 or stats.width < 2:
        return []
    magnitude = stats.abs_sum / int(stats.count)
    large = (magnitude > ratio * magnitude.median()) & (stats.share >= share) & (magnitude > 0)
    return large.nonzero().flatten().tolist()


def _runs(places: Sequence[int]) -> list[list[int]]:
    """Maximal runs of consecutive numbers."""
    runs: list[list[int]] = []
    for p in places:
        if runs and runs[-1][-1] == p - 1:
            runs[-1].append(p)
        else:
            runs.append([p])
    return runs


def _sink(stream: str, channel: int, entries: list[Entry]) -> Sink:
    gains = []
    share = ratio = argmax = 0.0
    constant = True
    for entry in entries:
        stats = entry.stats
        assert isinstance(stats, Channels)
        magnitude = stats.abs_sum / int(stats.count)
        share = max(share, float(stats.share[channel]))
        ratio = max(ratio, float(magnitude[channel] / magnitude.median()))
        argmax = max(argmax, float(stats.argmax_share[channel]))
        spread = float(stats.variance[channel].sqrt())
        constant &= spread < 0.1 * abs(float(stats.mean[channel]))
        if entry.gain is not None and float(entry.gain.abs().median()):
            gains.append(float(entry.gain[channel].abs() / entry.gain.abs().median()))
    return Sink(
        stream,
        channel,
        entries[0].name,
        entries[-1].name,
        len(entries),
        share,
        ratio,
        argmax,
        min(gains) if gains else None,
        constant,
    )


def _listed(t: Tensor) -> Any:
    """Nested lists; non-finite numbers as strings, which JSON has no numbers for."""

    def one(x: Any) -> Any:
        if isinstance(x, list):
            return [one(v) for v in x]
        return x if isinstance(x, int) or (x == x and abs(x) != float("inf")) else repr(x)

    return one(t.tolist())


def _parsed(data: Any) -> Any:
    if isinstance(data, list):
        return [_parsed(v) for v in data]
    return float(data) if isinstance(data, str) else data


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise NormfuseError(
            "saving as .safetensors needs the safetensors package; save as .json instead, or "
            "pip install 'normfuse[models]'"
        ) from error

    class Both:
        save_file = staticmethod(safetensors.torch.save_file)
        safe_open = staticmethod(safetensors.safe_open)

    return Both
