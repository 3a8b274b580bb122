"""What folding a gain brings to light: a norm may hide a huge channel behind a gain near zero.

Folded into the weights of the readers, such a gain hides nothing any more: the readers see the raw
channel, and whatever quantizes activations pays for it. The function stays the same, so this is no
reason to refuse an exact rewrite; it is a reason to say so, and to name the order that avoids it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from . import ir

#: A gain this small relative to the norm's median gain counts as hiding its channel.
HIDING_GAIN = 0.05

#: Larger gains than that many entries are not read (a gain is a vector).
_LARGEST = 1 << 22


def weight_value(gm: fx.GraphModule, node: Any) -> Tensor | None:
    """The value of a weight expression, computed now; ``None`` where values must not be read.

    That is: weights that are inputs of the graph (``torch.compile``: no guard protects what was
    read), fake or meta tensors, distributed ones.
    """
    if not ir.is_weight_expr(node):
        return None
    values: dict[fx.Node, Any] = {}
    stack = [node]
    with torch.no_grad():
        while stack:
            n = stack[-1]
            if n in values:
                stack.pop()
                continue
            if n.op != "call_function":
                if n.op != "get_attr" or not ir.has_attribute(gm, n.target):
                    return None
                value = ir.attribute(gm, n.target)
                if type(value) not in (Tensor, torch.nn.Parameter) or value.is_meta:
                    return None
                if value.numel() > _LARGEST:
                    return None
                values[n] = value.detach()
                continue
            pending = [a for a in n.all_input_nodes if a not in values]
            if pending:
                stack.extend(pending)
                continue
            args, kwargs = fx.node.map_arg((n.args, n.kwargs), values.__getitem__)
            values[n] = n.target(*args, **kwargs)
            stack.pop()
    return values[node]


@dataclass(frozen=True)
class Exposed:
    """A norm whose folded gain hid channels.

    Attributes:
        site: of the norm; channels: their indices; gain: the smallest gain relative to the median;
        measured: a calibration saw large values there (else: judged from the gain alone).
    """

    site: str
    channels: tuple[int, ...]
    gain: float
    measured: bool


def hidden_channels(
    gm: fx.GraphModule,
    site: str,
    gain: fx.Node | None,
    measured: Sequence[tuple[str, int, float]] | None = None,
) -> Exposed | None:
    """The channels that folding ``gain`` at ``site`` would expose, or ``None``.

    Args:
        measured: ``Calibration.hidden()``, which then decides (large channels behind a small
            effective gain). Without it the gain alone does: channels under ``HIDING_GAIN`` times
            its median magnitude.
    """
    if measured is not None:
        found = [(c, g) for s, c, g in measured if s == site]
        if not found:
            return None
        channels = tuple(sorted(c for c, _ in found))
        return Exposed(site, channels, min(g for _, g in found), True)
    value = weight_value(gm, gain) if isinstance(gain, fx.Node) else None
    if value is None or value.numel() < 2:
        return None
    magnitude = value.flatten().to(torch.float32).abs()
    median = magnitude.median()
    small = magnitude < HIDING_GAIN * median
    if not bool(small.any()):
        return None
    channels = tuple(small.nonzero().flatten().tolist())
    return Exposed(site, channels, float(magnitude.min() / median), False)


def sentence(exposed: Sequence[Exposed]) -> str:
    """One sentence for the report and the warning: where, how much, and which order avoids it."""
    worst = min(exposed, key=lambda e: e.gain)
    shown = ", ".join(map(str, worst.channels[:4])) + (", …" if len(worst.channels) > 4 else "")
    norms = "1 norm" if len(exposed) == 1 else f"{len(exposed)} norms"
    seen = "large channels" if worst.measured else "channels"
    return (
        f"fold_affine moved near-zero gains of {norms} into the readers' weights (smallest: "
        f"{worst.site}, {seen} {shown}, {worst.gain:.2g}× the median gain): what those gains hid is "
        "now in the readers' inputs. If activations will be quantized, keep it hidden: run "
        "insert_gated_norm before fold_affine at these norms, leave their gains with "
        "FoldAffine(keep=[…]), or calibrate the folded graph and run absorb_outliers after it"
    )
