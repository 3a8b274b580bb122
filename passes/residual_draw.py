"""Drawings of a residual stream: text, Graphviz DOT, and SVG, from its skeleton graph.

The stream runs from top to bottom in execution order: writers on the left, readers on the right,
joins (adds, concatenations) on the trunk.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any

from torch import fx

if TYPE_CHECKING:
    from .residual import Stream, Writer

#: More rows than this are elided in the middle.
MAX_ROWS = 220

_COLOURS = {
    "norm": "#2e7d32",
    "raw": "#c62828",
    "tap": "#ad1457",
    "writer": "#1565c0",
    "join": "#37474f",
}


def _order(stream: Stream) -> dict[fx.Node, int]:
    graph = next(iter(stream.values)).graph
    return {n: i for i, n in enumerate(graph.nodes)}


def _rows(stream: Stream) -> list[tuple[str, dict[str, Any]]]:
    """Skeleton nodes from top to bottom."""
    order = _order(stream)

    def place(entry: tuple[str, dict[str, Any]]) -> tuple[int, int]:
        data = entry[1]
        item = data["item"]
        if data["role"] == "reader":
            # right after the value is there, not where the reader happens to run
            return order[item.value], 2
        if data["role"] == "writer":
            return order[item.user if item.user is not None else item.node], 0
        return order[item], 1

    return sorted(stream.graph.nodes(data=True), key=place)


def _ops(nodes: Iterable[fx.Node]) -> str:
    names: list[str] = []
    for n in nodes:
        name = getattr(n.target, "__name__", str(n.target)).split(".")[0]
        if not names or names[-1] != name:
            names.append(name)
    if len(names) > 5:
        names = [*names[:2], "…", *names[-2:]]
    return " → ".join(names)


def title(stream: Stream) -> str:
    counts = [
        f"width {stream.width}",
        f"{len(stream.writers)} writers",
        f"{len(stream.norms)} norms",
        f"{len(stream.adds)} adds",
    ]
    if stream.raw_readers:
        counts.append(f"{len(stream.raw_readers)} raw readers")
    if stream.taps:
        counts.append(f"{len(stream.taps)} taps")
    return f"{stream.name}: " + ", ".join(counts)


def _elide(rows: list, limit: int) -> tuple[list, int]:
    if len(rows) <= limit:
        return rows, 0
    head = limit * 2 // 3
    return rows[:head] + rows[len(rows) - (limit - head) :], len(rows) - limit


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[-(width - 1) :]


def to_text(stream: Stream, width: int = 100) -> str:
    """One line per writer, join and reader, execution order from top to bottom."""
    g = stream.graph
    rows, hidden = _elide(_rows(stream), MAX_ROWS)
    lines = [title(stream)]
    cut = MAX_ROWS * 2 // 3
    for i, (key, data) in enumerate(rows):
        if hidden and i == cut:
            lines.append(f"  ┆    … {hidden} more …")
        item, label = data["item"], data["label"]
        if data["role"] == "writer":
            edges = [d["ops"] for _, _, d in g.out_edges(key, data=True)]
            via = _ops([*item.path, *(edges[0] if len(edges) == 1 else ())])
            line = f"  │◀── {label} [{data['kind']}]" + (f"  via {via}" if via else "")
        elif data["role"] == "join":
            line = "  ⊕" if data["kind"] == "add" else f"  ⊕ {data['kind']}"
        else:
            mark = {"norm": "──▶", "raw": "──▷ RAW", "tap": "══▶"}[data["kind"]]
            via = _ops(stream.between(item))
            line = f"  ├{mark} {label}"
            line += f" ({item.reason})" if item.reason else ""
            line += f"  via {via}" if via else ""
        lines.append(line if len(line) <= width else line[: width - 1] + "…")
    return "\n".join(lines)


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def to_dot(stream: Stream) -> str:
    """Graphviz source of the skeleton."""
    shapes = {"writer": "box", "join": "circle", "reader": "box"}
    lines = [
        f"digraph {_quote(stream.name)} {{",
        f'  label={_quote(title(stream))}; labelloc="t"; rankdir="TB";',
        '  node [fontname="sans-serif", fontsize=10];',
    ]
    for key, data in stream.graph.nodes(data=True):
        text = "+" if data["role"] == "join" and data["kind"] == "add" else data["label"]
        if data["role"] == "join" and data["kind"] != "add":
            text = data["kind"]
        colour = _COLOURS[data["kind"] if data["role"] == "reader" else data["role"]]
        lines.append(
            f"  {_quote(key)} [label={_quote(text)}, shape={shapes[data['role']]}, "
            f"color={_quote(colour)}];"
        )
    for a, b, data in stream.graph.edges(data=True):
        label = f" [label={_quote(_ops(data['ops']))}]" if data["ops"] else ""
        lines.append(f"  {_quote(a)} -> {_quote(b)}{label};")
    lines.append("}")
    return "\n".join(lines)


_ROW = 26
_TRUNK = 380
_BOX = 330
_GAP = 34
_WIDTH = 2 * _TRUNK


def _box(x: float, y: float, text: str, detail: str, colour: str, tip: str) -> str:
    return (
        f'<g><title>{escape(tip)}</title><rect x="{x}" y="{y - 10}" width="{_BOX}" height="20" '
        f'rx="4" fill="{colour}" fill-opacity="0.10" stroke="{colour}"/>'
        f'<text x="{x + 8}" y="{y + 4}" fill="{colour}">{escape(_shorten(text, 48 - len(detail)))}</text>'
        + (
            f'<text x="{x + _BOX - 6}" y="{y + 4}" text-anchor="end" class="nf-d">'
            f"{escape(detail)}</text>"
            if detail
            else ""
        )
        + "</g>"
    )


def _detail(writer: Writer) -> str:
    """The writer's kind, and what makes its features unequal on the way in."""
    return f"{writer.kind} · {_ops(writer.gates)}" if writer.gates else writer.kind


def to_svg(stream: Stream) -> str:
    """A self-contained SVG; long streams are elided in the middle."""
    g = stream.graph
    rows, hidden = _elide(_rows(stream), MAX_ROWS)
    cut = MAX_ROWS * 2 // 3
    y_of: dict[str, float] = {}
    y = 58.0
    gap_at = None
    for i, (key, data) in enumerate(rows):
        if hidden and i == cut:
            gap_at = y
            y += _ROW
        y_of[key] = y
        following = rows[i + 1][0] if i + 1 < len(rows) else None
        if not (data["role"] == "writer" and g.has_edge(key, following)):
            y += _ROW  # a writer shares the row of the join it feeds
    height = y + 10
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" '
        f'width="{_WIDTH}" height="{height:.0f}" role="img" font-family="ui-monospace, '
        f'Menlo, Consolas, monospace" font-size="11">',
        "<style>.nf-d{fill:#78909c;font-size:10px}.nf-e{fill:none;stroke:#90a4ae;"
        "stroke-width:1.4}.nf-t{stroke:#37474f;stroke-width:3}</style>",
        f"<title>{escape(title(stream))}</title>",
        f'<text x="{_WIDTH / 2}" y="20" text-anchor="middle" font-size="13" fill="#263238">'
        f"{escape(_shorten(title(stream), 100))}</text>",
        f'<text x="{_TRUNK - _GAP}" y="40" text-anchor="end" class="nf-d">writers</text>',
        f'<text x="{_TRUNK + _GAP}" y="40" class="nf-d">readers</text>',
    ]
    first = min(y_of.values(), default=58.0)
    last = max(y_of.values(), default=58.0)
    out.append(f'<line class="nf-t" x1="{_TRUNK}" y1="{first}" x2="{_TRUNK}" y2="{last}"/>')
    if gap_at is not None:
        out.append(
            f'<rect x="{_TRUNK - 4}" y="{gap_at - 12}" width="8" height="24" fill="white"/>'
            f'<text x="{_TRUNK + _GAP}" y="{gap_at + 4}" class="nf-d">… {hidden} more …</text>'
        )
    joins = [k for k, d in rows if d["role"] == "join"]
    rank = {k: i for i, k in enumerate(joins)}
    for a, b in g.edges():
        # a value that skips over joins: draw it beside the trunk
        if a in rank and b in rank and rank[b] - rank[a] > 1:
            bend = min(12 + 3 * (rank[b] - rank[a]), 28)
            out.append(
                f'<path class="nf-e" d="M{_TRUNK} {y_of[a]} C{_TRUNK + bend} {y_of[a]} '
                f'{_TRUNK + bend} {y_of[b]} {_TRUNK} {y_of[b]}"/>'
            )
    for key, data in rows:
        y, item = y_of[key], data["item"]
        if data["role"] == "join":
            sign = "+" if data["kind"] == "add" else "∪"
            out.append(
                f'<g><title>{escape(data["label"])}</title><circle cx="{_TRUNK}" cy="{y}" r="8" '
                f'fill="white" stroke="{_COLOURS["join"]}" stroke-width="1.6"/><text x="{_TRUNK}" '
                f'y="{y + 4}" text-anchor="middle">{sign}</text></g>'
            )
            continue
        left = data["role"] == "writer"
        colour = _COLOURS["writer" if left else data["kind"]]
        edge = _TRUNK - _GAP if left else _TRUNK + _GAP
        head = _TRUNK - 10 if left else _TRUNK + _GAP - 2
        tail = edge if left else _TRUNK
        out.append(
            f'<line class="nf-e" x1="{tail}" y1="{y}" x2="{head}" y2="{y}"/>'
            f'<path d="M{head} {y} l-7 -4 v8 z" fill="#90a4ae"/>'
        )
        via = _ops(stream.between(item))
        detail = _detail(item) if left else {"norm": "", "raw": "RAW", "tap": "TAP"}[data["kind"]]
        tip = f"{data['label']}" + (f" via {via}" if via else "")
        tip += f": {item.reason}" if not left and item.reason else ""
        x = edge - _BOX if left else edge
        out.append(_box(x, y, data["label"], detail, colour, tip))
    out.append("</svg>")
    return "".join(out)
