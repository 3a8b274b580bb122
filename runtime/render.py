"""Reports for people: text for the terminal, a self-contained page for the browser.

A model repeats its layers, and so does its report. Sites that differ only in layer numbers and had
the same fate are shown as one row (``blocks.0–47.norm1``, ×48), refusals are listed once per reason.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..passes.report import Report, Site

#: A layer number: digits that form a whole component of a dotted path.
_LAYER = re.compile(r"(?<=[A-Za-z0-9_]\.)\d+(?=\.|#|$|[\s\])},;:])|^\d+(?=\.)")
#: Call numbers of a module used several times: ``norm#3``.
_CALL = re.compile(r"(?<=#)\d+")

NEAR_MISS = "near_miss"


def _pattern(text: str) -> tuple[str, tuple[int, ...]]:
    """``text`` with its layer numbers replaced by ``*``, and those numbers."""
    numbers = [int(m) for r in (_LAYER, _CALL) for m in r.findall(text)]
    return _CALL.sub("*", _LAYER.sub("*", text)), tuple(numbers)


def _ranges(numbers: set[int]) -> str:
    """``{0, 1, 2, 5}`` as ``0–2,5``."""
    out: list[str] = []
    ordered = sorted(numbers)
    start = previous = ordered[0]
    for n in [*ordered[1:], None]:
        if n is not None and n == previous + 1:
            previous = n
            continue
        if start == previous:
            out.append(str(start))
        else:
            out.append(f"{start}{'–' if previous > start + 1 else ','}{previous}")
        if n is not None:
            start = previous = n
    return ",".join(out)


def _family(texts: list[str]) -> str:
    """One name for several that differ in numbers only: ``h.0.ln``, ``h.1.ln`` → ``h.0–1.ln``."""
    if len(texts) == 1:
        return texts[0]
    pattern, first = _pattern(texts[0])
    columns: list[set[int]] = [{n} for n in first]
    for text in texts[1:]:
        for column, n in zip(columns, _pattern(text)[1], strict=True):
            column.add(n)
    parts = pattern.split("*")
    # `_pattern` lists layer numbers before call numbers, which is also their order in a key
    names = [_ranges(c) for c in columns]
    if len(parts) != len(names) + 1:  # the text itself held a star
        return pattern
    out = parts[0]
    for name, part in zip(names, parts[1:], strict=True):
        out += (name if len(name) <= 16 else "*") + part
    return out


def _families(texts: list[str]) -> list[str]:
    """``texts`` with those that differ in layer numbers only folded into one."""
    families: dict[str, list[str]] = {}
    for text in texts:
        families.setdefault(_pattern(text)[0], []).append(text)
    return [_family(members) for members in families.values()]


def _some(names: list[str], limit: int, separator: str = ", ") -> str:
    more = len(names) - limit
    return separator.join(names[:limit]) + (f" and {more} more" if more > 0 else "")


#: A refusal's place, appended by ``passes.manager.reason_text``: ``… [linear in h.0.fc at m.py:3]``.
_PLACE = re.compile(r"^(?P<text>.*\S)\s+\[(?P<place>[^\[\]]+)\]$", re.S)


def _split(reason: str) -> tuple[str, str]:
    """A refusal's reason and the place it names (``""`` if none)."""
    match = _PLACE.match(reason)
    return (match["text"], match["place"]) if match else (reason, "")


@dataclass
class Reason:
    """One reason for a refusal, however many sites share it.

    Attributes:
        number: position in the list, from 1, as the rows refer to it.
        pass_name: who refused.
        text: the reason, numbers of layers folded into ranges.
        sites: keys of the sites.
        places: the graph nodes that failed the precondition, with module and ``file:line``.
    """

    number: int
    pass_name: str
    text: str
    sites: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        """The sites, shortened."""
        return _some(_families(self.sites), 4)


@dataclass
class Row:
    """Sites of one fate: what a table shows as one line.

    Attributes:
        name: key, or the keys with ranges.
        sites: the sites behind it.
        reasons: the numbered refusals, with the pass's name.
    """

    name: str
    sites: list[Site]
    reasons: list[Reason]

    @property
    def first(self) -> Site:
        return self.sites[0]

    @property
    def status(self) -> str:
        """``rewritten``, ``refused``, ``near`` (almost a norm) or ``left`` (nobody asked)."""
        if self.first.applied:
            return "rewritten"
        if self.first.kind == NEAR_MISS:
            return "near"
        return "refused" if self.first.refused else "left"

    @property
    def bytes_saved(self) -> float:
        return sum(s.bytes_saved for s in self.sites)

    @property
    def flops_saved(self) -> float:
        return sum(s.flops_saved for s in self.sites)

    @property
    def wheres(self) -> list[str]:
        return list(dict.fromkeys(s.where for s in self.sites if s.where))


def reasons(report: Report) -> list[Reason]:
    """All refusals of a report, one entry per pass and reason."""
    return _index_reasons(report)[0]


def _index_reasons(report: Report) -> tuple[list[Reason], dict[tuple[str, str], Reason]]:
    texts: dict[tuple[str, str], list[str]] = {}
    sites: dict[tuple[str, str], list[str]] = {}
    places: dict[tuple[str, str], list[str]] = {}
    for key, name, reason in report.refused:
        text, place = _split(reason)
        entry = (name, _pattern(text)[0])
        texts.setdefault(entry, []).append(text)
        sites.setdefault(entry, []).append(key)
        if place and place not in text:
            places.setdefault(entry, []).append(place)
    found = [
        Reason(i, entry[0], _family(texts[entry]), sites[entry], _families(places.get(entry, [])))
        for i, entry in enumerate(texts, start=1)
    ]
    return found, dict(zip(texts, found, strict=True))


def _refusals(site: Site) -> list[tuple[str, str]]:
    """What :func:`_index_reasons` knows a site's refusals by."""
    return list(dict.fromkeys((name, _pattern(_split(r)[0])[0]) for name, r in site.refused))


def rows(report: Report, full: bool = False) -> list[Row]:
    """The report's sites as table rows, in graph order; grouped unless ``full``."""
    _, index = _index_reasons(report)
    groups: dict[tuple, list[Site]] = {}
    for i, s in enumerate(report.sites):
        fate = (s.kind, s.spelling, s.shape, s.dtype, tuple(s.applied), tuple(_refusals(s)))
        groups.setdefault((i,) if full else (_pattern(s.key)[0], *fate), []).append(s)
    out = []
    for sites in groups.values():
        name = _family([s.key for s in sites])
        out.append(Row(name, sites, [index[e] for e in _refusals(sites[0])]))
    return out


# -- numbers as text ------------------------------------------------------------------------------


def _plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def quantity(x: float, unit: str) -> str:
    """``12345678, "B"`` as ``12.3 MB``."""
    sign, x = ("-", -x) if x < 0 else ("", x)
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if x < 999.5 or prefix == "E":
            break
        x /= 1000
    return f"{sign}{x:.3g} {prefix}{unit}"


def duration(seconds: float) -> str:
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def summary(report: Report) -> dict[str, Any]:
    """The figures of the headline."""
    kinds = Counter(s.kind for s in report.sites)
    near = kinds.pop(NEAR_MISS, 0)
    real = [s for s in report.sites if s.kind != NEAR_MISS]
    return {
        "sites": len(real),
        "kinds": dict(kinds.most_common()),
        "near_misses": near,
        "rewritten": sum(bool(s.applied) for s in real),
        "untouched": sum(not s.applied for s in real),
        "bytes_saved": sum(s.bytes_saved for s in report.sites),
        "flops_saved": sum(s.flops_saved for s in report.sites),
    }


def headline(report: Report) -> str:
    """One sentence: what there is and what became of it."""
    s = summary(report)
    if not report.sites:
        return "no norms found"
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in s["kinds"].items())
    text = f"{_plural(s['sites'], 'site')} ({kinds}): " if kinds else ""
    if s["sites"]:
        text += f"{s['rewritten']:,} rewritten, {s['untouched']:,} left as they were"
    if s["near_misses"]:
        text += ("; " if text else "") + _plural(s["near_misses"], "near miss").replace(
            "misss", "misses"
        )
    return text


def accuracy(report: Report) -> list[tuple[str, str]]:
    """Error figures as ``(label, text)``, empty if nothing was verified."""
    out = []
    if report.max_relative_error is not None:
        out.append(("float64, rewritten vs. original", f"{report.max_relative_error:.2e}"))
    if report.working_error:
        e, r = report.working_error.get("eager"), report.working_error.get("rewritten")
        if e is not None and r is not None:
            factor = f" ({r / e:.2f}× eager's)" if e > 0 else ""
            out.append(("working dtype vs. float64, eager", f"{e:.2e}"))
            out.append(("working dtype vs. float64, rewritten", f"{r:.2e}{factor}"))
    return out


# -- text -----------------------------------------------------------------------------------------


def to_text(report: Report, full: bool = False, width: int = 100, color: bool = False) -> str:
    """The report as text.

    Args:
        full: one row per site instead of one per group of repeated layers.
        width: columns to use.
        color: ANSI colours, for a terminal.
    """
    from rich import box
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        no_color=not color,
        highlight=False,
        emoji=False,
        markup=False,
        legacy_windows=False,
    )

    def section(title: str) -> None:
        console.print()
        console.print(Text(title, style="bold"))

    head = Text("normfuse", style="bold")
    head.append(f" · {report.mode} on {report.device} · {duration(report.seconds)}", "dim")
    console.print(head)
    console.print(Text(headline(report)))
    s = summary(report)
    facts = []
    if s["bytes_saved"]:
        facts.append(f"{quantity(s['bytes_saved'], 'B')} less memory traffic per call (predicted)")
    if s["flops_saved"]:
        facts.append(f"{quantity(s['flops_saved'], 'FLOP')} less per call (predicted)")
    if report.weight_bytes:
        facts.append(f"folded weights take {quantity(report.weight_bytes, 'B')}")
    if facts:
        console.print(Text("; ".join(facts), style="dim"))
    if report.failed_verification:
        console.print(
            Text("Verification failed: see the notes. The rewrite was undone.", style="bold red")
        )

    listed = rows(report, full)
    if listed:
        section("Sites")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
        table.add_column("site", overflow="fold", ratio=None, min_width=12)
        table.add_column("×", justify="right", no_wrap=True)
        table.add_column("what", overflow="fold")
        table.add_column("input", overflow="fold")
        table.add_column("rewritten by", overflow="fold")
        table.add_column("refused", overflow="fold")
        style = {"rewritten": "green", "refused": "yellow", "near": "magenta", "left": "dim"}
        for row in listed:
            site = row.first
            what = Text(site.kind.replace("_", " ") if site.kind == NEAR_MISS else site.kind)
            if site.spelling and site.spelling.split(".")[-1] != site.kind:
                what.append(f"\n{site.spelling}", "dim")
            name = Text(row.name, style[row.status])
            if row.wheres:
                extra = f" +{len(row.wheres) - 1}" if len(row.wheres) > 1 else ""
                name.append(f"\n{_tail(row.wheres[0])}{extra}", "dim")
            table.add_row(
                name,
                str(len(row.sites)) if len(row.sites) > 1 else "",
                what,
                Text(f"{site.shape}\n" if site.shape else "").append(site.dtype, "dim"),
                Text("\n".join(site.applied) or "–", "green" if site.applied else "dim"),
                Text(" ".join(f"[{r.number}]" for r in row.reasons), "yellow"),
            )
        console.print(table)

    why = reasons(report)
    if why:
        section("Refused, and why")
        for r in why:
            mark = f"[{r.number}] "
            line = Text(mark, "yellow")
            line.append(r.pass_name, "bold").append(f" · {_plural(len(r.sites), 'site')}", "dim")
            line.append(f": {r.text}")
            console.print(_hanging(line, len(mark)))
            # the place names the site's own module more often than not
            details = [_some(r.places, len(r.places) if full else 2, "; ")]
            if not full and not any(n in details[0] for n in _families(r.sites)[:1]):
                details.append(r.where)
            for detail in filter(None, details):
                console.print(Padding(Text(detail, "dim"), (0, 0, 0, len(mark))))

    if report.passes:
        section("Passes")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
        for name in ("pass", "promise"):
            table.add_column(name)
        for name in ("rewrote", "refused", "time"):
            table.add_column(name, justify="right")
        for p in report.passes:
            off = "dim" if p.disabled else ""
            time = "switched off" if p.disabled else duration(p.seconds)
            table.add_row(p.name, p.promise, str(p.applied), str(p.refused), time, style=off)
        console.print(table)

    figures = accuracy(report)
    if figures:
        section("Largest relative error")
        for label, text in figures:
            console.print(Text(f"  {label:<38}{text}"))
    if report.notes:
        section("Notes")
        for note in report.notes:
            console.print(_hanging(Text(f"- {note}"), 2))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _hanging(text: Any, indent: int) -> Any:
    """A paragraph whose first ``indent`` characters stand out to the left."""
    from rich.table import Table

    grid = Table.grid()
    grid.add_column(width=indent, no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(text[:indent], text[indent:])
    return grid


def _tail(where: str, limit: int = 32) -> str:
    """The end of a path, enough to find the file: its name, and its folder where there is room."""
    parts = where.replace("\\", "/").split("/")
    short = "/".join(parts[-2:])
    return short if len(short) <= limit else parts[-1]


# -- HTML -----------------------------------------------------------------------------------------


def to_html(report: Report, path: str | Path | None = None) -> str:
    """A self-contained page (no network, no frameworks); written to ``path`` if given.

    A content-security policy admits only the page's own script, so text from the model (names,
    reasons, drawings) can never run.
    """
    from importlib.resources import files

    from jinja2 import Environment

    def digest(script: str) -> str:
        return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        quantity=quantity, duration=duration, digest=digest, tail=_tail, plural=_plural
    )
    template = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        report=report,
        headline=headline(report),
        summary=summary(report),
        accuracy=accuracy(report),
        grouped=rows(report),
        single=rows(report, full=True),
        reasons=reasons(report),
        pass_names=list(dict.fromkeys(p.name for p in report.passes)),
    )
    if path is not None:
        Path(path).write_text(page, encoding="utf-8")
    return page
