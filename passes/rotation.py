"""Which norms a rotation of the residual stream does not commute with, and why they stayed so."""

from __future__ import annotations

from typing import Any

from torch import fx

from . import ir
from .axis import Axis
from .report import Report

nf = ir.nf

#: reasons that are quoted; the others are in the report's list of sites
_QUOTED = 3


def not_ready(gm: fx.GraphModule) -> tuple[list[tuple[fx.Node, str]], int]:
    """Norms on residual streams that are no plain RMSNorms over the stream's features, and why.

    A norm of something that nothing is added to (of queries and keys, say) stands on no residual
    stream, so no rotation of one reaches it.

    Returns:
        ``(norm, what it still has)`` pairs, and the number of norms on residual streams.
    """
    from .residual import streams, streams_of

    found: dict[fx.Node, str] = {}
    total: set[fx.Node] = set()
    for stream in streams(gm):
        if not stream.adds:
            continue
        for reader in stream.norms:
            total.add(reader.node)
            what = _what_is_left(reader.node)
            if what:
                found[reader.node] = what
    # a norm whose input is centered on the way: what it was a LayerNorm of is behind that
    centered = {}
    for norm in ir.norm_nodes(gm):
        x: Any = norm.args[0]
        if norm not in total and ir.is_call(x, nf.center):
            centered[norm] = (x.args[0], Axis(tuple(ir.NormArgs(norm).dims)))
    sums = {v for s in streams_of(gm, centered.values()) if s.adds for v in s.values}
    for norm, (behind, _) in centered.items():
        if behind in sums:
            total.add(norm)
            found[norm] = "its input's mean is removed first"
    place = {n: i for i, n in enumerate(gm.graph.nodes)}
    return sorted(found.items(), key=lambda item: place[item[0]]), len(total)


def _what_is_left(node: fx.Node) -> str:
    if not ir.is_call(node, nf.rms_norm, nf.add_rms_norm):
        kind = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
        return f"it is a {kind}"
    args = ir.NormArgs(node)
    left = [name for name in ("gain", "bias") if getattr(args, name) is not None]
    return f"it has a {' and a '.join(left)}" if left else ""


def gaps(gm: fx.GraphModule, report: Report) -> str:
    """The sentence of a report on norms that stayed as they were; empty if there are none."""
    left, total = not_ready(gm)
    if not left:
        return ""
    refused = {s.key: dict(s.refused) for s in report.sites}
    sentences = []
    for node, what in left[:_QUOTED]:
        key = node.meta.get("site") or node.name
        reasons = refused.get(key, {})
        # a mean that stays matters whatever happened to the gain
        order = (
            ("fold_affine", "remove_mean") if " has " in what else ("remove_mean", "fold_affine")
        )
        why = next((reasons[p] for p in order if p in reasons), "")
        sentences.append(f"{key} ({what}{': ' + why if why else ''})")
    more = f"; and {len(left) - _QUOTED} more" if len(left) > _QUOTED else ""
    return (
        f"{len(left)} of {total} norms on residual streams are not rotation-ready: "
        + "; ".join(sentences)
        + more
    )
