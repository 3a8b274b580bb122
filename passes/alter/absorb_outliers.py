"""AbsorbOutliers: a huge channel that is the same for every token becomes part of biases.

A residual sink leaves a norm as a channel that hardly varies over tokens. What a linear reader makes
of it, ``W[:, d]·y_d ≈ W[:, d]·c_d``, is a bias. The pass adds it to the reader's bias and sets the
norm's gain (and bias) to zero there: the readers' inputs lose the outlier, which is what a quantizer
of activations needs. How constant the channel is, is measured; the rest is exact:
``W y + b = W (m ⊙ y) + (b + W ((1 − m) ⊙ c))`` where ``y_d = c_d`` outside the mask ``m``.

The idea is that of "Outlier-driven rescaling" (2026): outliers act together with the norm as a
rescaling, and where they do so alike for every token the rescaling is static.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .. import ir
from ..capture import set_attribute
from ..contract import Context, Pass, PassResult, register
from ..errors import NormfuseError, Refuse
from ..exact.fold_affine import foldable_value
from ..exposure import weight_value
from ..linear import linear_names, set_args
from ..readers import Reading, check_readers, feature_axis
from ..weight_builder import WeightBuilder

aten = torch.ops.aten
nf = torch.ops.normfuse

_DYNAMIC = (nf.gated_rms_norm, nf.seed_norm, nf.ada_rms_norm)


@dataclass(frozen=True)
class _Plan:
    """What happens at one norm.

    Attributes:
        channels: of the normed value; shifts: per reader, ``c`` over its input (zero elsewhere).
        deviation: the largest ``max|y_d − c_d|/|c_d|`` seen; error: the largest relative RMS error
            of a reader's input; rows: how many were seen at least.
    """

    channels: tuple[int, ...]
    shifts: tuple[Tensor, ...]
    deviation: float
    error: float
    rows: int


@register
class AbsorbOutliers(Pass):
    """Move channels that are large and constant over tokens from activations into biases.

    A channel of a norm's result is absorbed if in every reader's input it stays within
    ``tolerance · |mean|`` of its mean over all calibrated rows, and its mean is at least ``ratio``
    times that of the median channel in one of them. All readers must be linear layers that can take
    a bias. The function changes by what the channel varied; the report says by how much.

    Args:
        calibration: of the same graph, from ``normfuse.calibrate``.
        tolerance: largest relative deviation of a channel from its mean, over *all* rows seen.
        ratio: how much larger than the median channel.

    Constants: ``absorbed_<norm>`` buffers with the mask and the shifts.
    """

    name = "absorb_outliers"
    promise = "alter"

    def __init__(
        self, calibration: Any = None, *, tolerance: float = 0.05, ratio: float = 5.0
    ) -> None:
        if calibration is None or not hasattr(calibration, "entries"):
            raise NormfuseError(
                "AbsorbOutliers needs a calibration: AbsorbOutliers(normfuse.calibrate(model, …))"
            )
        if not 0 <= tolerance < 1:
            raise NormfuseError(f"tolerance must be in [0, 1), got {tolerance!r}")
        if not ratio > 0:
            raise NormfuseError(f"ratio must be positive, got {ratio!r}")
        super().__init__(tolerance=float(tolerance), ratio=float(ratio))
        self.calibration = calibration
        self._inputs = {
            name: entry
            for entry in calibration.entries.values()
            if entry.kind == "linear"
            for name in entry.readers
        }

    def uuid(self) -> str:
        """The figures that decide are part of it."""
        digest = hashlib.sha256()
        for key, entry in sorted(self.calibration.entries.items()):
            if entry.kind == "linear":
                digest.update(key.encode())
                for t in (entry.stats.mean, entry.stats.low, entry.stats.high):
                    digest.update(repr(t.tolist()).encode())
        return f"{super().uuid()}:{digest.hexdigest()}"

    def run(self, gm: fx.GraphModule, context: Context) -> PassResult:
        result = PassResult()
        builder = WeightBuilder(gm.graph, context)
        names = linear_names(gm)
        for node in ir.norm_nodes(gm):
            key = node.meta["site"]
            found: list[_Plan] = []

            def plan(
                node: fx.Node = node, key: str = key, found: list[_Plan] = found
            ) -> Callable[[], None]:
                return self._plan(gm, node, key, context, builder, names, found)

            if self.attempt(context, result, key, plan):
                result.notes.append(self._sentence(key, found[0]))
        result.keeps_function = not result.applied
        return result

    def _sentence(self, key: str, plan: _Plan) -> str:
        shown = ", ".join(map(str, plan.channels[:8])) + (", …" if len(plan.channels) > 8 else "")
        many = "channel" if len(plan.channels) == 1 else "channels"
        return (
            f"absorb_outliers: {key}, {many} {shown} became biases; over {plan.rows:,} rows they stay "
            f"within {plan.deviation:.2g} of their mean (tolerance {self.options['tolerance']:g}), "
            f"the readers' inputs change by {plan.error:.2g} relative (RMS)"
        )

    def _plan(
        self,
        gm: fx.GraphModule,
        node: fx.Node,
        key: str,
        context: Context,
        builder: WeightBuilder,
        names: dict[fx.Node, str],
        found: list[_Plan],
    ) -> Callable[[], None]:
        if context.options.get("dynamo"):
            raise Refuse("torch.compile's backend never changes a function; use normfuse.rewrite")
        if node.meta.get("absorbed"):
            raise Refuse("its constant channels were absorbed already", node)
        if ir.is_call(node, *_DYNAMIC):
            raise Refuse("the norm's own dynamic rescaling reads the channel", node)
        args = ir.NormArgs(node)
        value = foldable_value(node)
        axis = feature_axis(value, (args.gain, args.bias), args.dims)
        readings = check_readers(value, axis, gain=False, shift=True, copy_tied=True)
        if not readings:
            raise Refuse("no linear layer reads the normed result", node)
        self._check_gain(gm, key, args.gain)
        sizes = [int(ir.shape(value)[d]) for d in axis.dims]
        chosen = self._choose(readings, names, sizes)
        found.append(chosen)

        def commit() -> None:
            base = f"absorbed_{re.sub(r'[^0-9A-Za-z_]', '_', key)}"
            channels = torch.tensor(chosen.channels)
            wide = sizes + [1] * (-1 - axis.dims[-1])

            def masked(t: fx.Node | None, name: str) -> fx.Node:
                dtype = ir.dtype(args.x if t is None else t)
                mask = torch.ones(sizes, dtype=dtype).flatten()
                mask[channels] = 0
                leaf = _constant(gm, f"{base}_{name}", mask.reshape(wide), node)
                return leaf if t is None else builder.emit(aten.mul.Tensor, t, leaf)

            gain = masked(args.gain, "gain_mask")
            bias = None if args.bias is None else masked(args.bias, "bias_mask")
            for i, (reading, shift) in enumerate(zip(readings, chosen.shifts, strict=True)):
                exact = ir.dtype(reading.linear.weight) == torch.float64
                shift = shift if exact else shift.to(torch.float32)
                leaf = _constant(gm, f"{base}_shift{i or ''}", shift, node)
                _, new_bias = builder.fold_in(reading.linear, None, leaf)
                reading.linear.rebuild(bias=new_bias)
            set_args(node, gain=gain, bias=bias, out_dtype=ir.dtype(value))
            node.meta["absorbed"] = True

        return commit

    def _check_gain(self, gm: fx.GraphModule, key: str, gain: fx.Node | None) -> None:
        """Refuse if the calibration saw this norm with another gain: its figures would not fit."""
        entry = self.calibration.entries.get(f"norm:{key}")
        if entry is None:
            return
        if (entry.gain is None) != (gain is None):
            now = "has no gain" if gain is None else "has a gain"
            raise Refuse(
                f"the norm {now} and the calibrated graph's was different: calibrate the graph as it is"
            )
        value = weight_value(gm, gain) if gain is not None else None
        if value is None:
            return
        now = value.to("cpu", torch.float64).flatten()
        same = now.numel() in (1, entry.gain.numel())
        if not same or not torch.allclose(now, entry.gain, rtol=1e-3, atol=1e-6):
            raise Refuse("the norm's gain has changed since the calibration: calibrate again")

    def _choose(
        self, readings: list[Reading], names: dict[fx.Node, str], sizes: list[int]
    ) -> _Plan:
        """The channels to absorb and the constants per reader."""
        tolerance, ratio = self.options["tolerance"], self.options["ratio"]
        width = 1
        for s in sizes:
            width *= s
        steady = torch.ones(width, dtype=torch.bool)
        large = torch.zeros(width, dtype=torch.bool)
        worst = torch.zeros(width, dtype=torch.float64)
        rows = None
        stats = []
        for r in readings:
            entry = self._inputs.get(names.get(r.linear.node, ""))
            cube = (r.axis.outer, width, r.axis.inner)
            if entry is None or entry.stats.width != r.axis.outer * width * r.axis.inner:
                raise Refuse(
                    "the calibration has no figures of this reader's input: calibrate the graph "
                    "that is being rewritten",
                    r.linear.node,
                )
            s = entry.stats
            if int(s.nonfinite):
                raise Refuse(
                    f"{int(s.nonfinite)} calibrated rows of a reader's input are not finite",
                    r.linear.node,
                )
            if int(s.count) < 2:
                raise Refuse(
                    "fewer than two calibrated rows say nothing about constancy", r.linear.node
                )
            stats.append(s)
            away = torch.maximum(s.high - s.mean, s.mean - s.low)
            deviation = (away / s.mean.abs()).nan_to_num(nan=torch.inf)
            deviation = deviation.reshape(cube).amax((0, 2))
            worst = torch.maximum(worst, deviation)
            steady &= deviation <= tolerance
            magnitude = s.abs_sum / int(s.count)
            large |= (magnitude >= ratio * magnitude.median()).reshape(cube).amax((0, 2))
            rows = int(s.count) if rows is None else min(rows, int(s.count))
        take = steady & large
        if not take.any():
            if large.any():
                best = float(worst[large].min())
                raise Refuse(
                    f"its {int(large.sum())} large channels vary over tokens (the steadiest by "
                    f"{best:.2g} of its mean, tolerance {tolerance:g})"
                )
            raise Refuse(f"no channel of its result is {ratio:g}× the median channel")
        shifts, error = [], 0.0
        for r, s in zip(readings, stats, strict=True):
            mask = take[None, :, None].expand(r.axis.outer, width, r.axis.inner).flatten()
            shifts.append(torch.where(mask, s.mean, torch.zeros_like(s.mean)))
            total = (s.variance + s.mean**2).sum()
            error = max(error, float((s.variance[mask].sum() / total).sqrt()))
        channels = tuple(take.nonzero().flatten().tolist())
        return _Plan(channels, tuple(shifts), float(worst[take].max()), error, rows or 0)


def _constant(gm: fx.GraphModule, name: str, value: Tensor, before: fx.Node) -> fx.Node:
    """A leaf for a new constant, on the device of ``before``'s value."""
    base, n = name, 0
    while ir.has_attribute(gm, name):
        n += 1
        name = f"{base}_{n}"
    device = next(v.device for v in pytree.tree_leaves(ir.val(before)))
    value = value.to(device)
    set_attribute(gm, name, value)
    with before.graph.inserting_before(before):
        leaf = before.graph.get_attr(name)
    mode = ir.fake_mode(gm)
    leaf.meta["val"] = value if mode is None else mode.from_tensor(value, static_shapes=True)
    leaf.meta["kind"], leaf.meta["fqn"] = "constant", name
    return leaf
