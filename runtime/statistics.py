"""Streaming statistics of activations: float64, bounded memory, mergeable, saved as plain tensors.

Every accumulator has ``update`` (one batch), ``merge`` (another accumulator of the same shape) and
``state``/``load`` (named tensors, exact). Rows with a non-finite entry are counted and left out of
every other figure: one NaN must not turn a whole calibration into NaN, nor go unseen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..passes.errors import NormfuseError

#: Entries converted to float64 at a time (32 MiB).
CHUNK = 1 << 22

#: Energy concentration is kept for this many largest channels of each token.
TOP_K = (1, 4, 16)


class Accumulator:
    """Named float64/int64 tensors that add up; subclasses list them in ``_tensors``."""

    _tensors: tuple[str, ...] = ()
    _parts: tuple[str, ...] = ()

    def state(self) -> dict[str, Tensor]:
        """All tensors by name, on the CPU."""
        out = {name: getattr(self, name).detach().cpu().clone() for name in self._tensors}
        for part in self._parts:
            out |= {f"{part}.{k}": v for k, v in getattr(self, part).state().items()}
        return out

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over tensors that :meth:`state` returned."""
        for name in self._tensors:
            setattr(self, name, state[name].clone())
        for part in self._parts:
            prefix = f"{part}."
            inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            getattr(self, part).load(inner)

    def to(self, device: torch.device) -> None:
        for name in self._tensors:
            setattr(self, name, getattr(self, name).to(device))
        for part in self._parts:
            getattr(self, part).to(device)


class LogHistogram(Accumulator):
    """Counts of positive numbers in bins of an eighth of an octave, from 2⁻⁶⁴ to 2⁶⁴.

    Quantiles are right to 4.5 %. Zero and smaller numbers go to the first bin, larger ones to the
    last.
    """

    PER_OCTAVE, LOW, HIGH = 8, -64, 64
    _tensors = ("counts", "low", "high")

    def __init__(self) -> None:
        bins = (self.HIGH - self.LOW) * self.PER_OCTAVE
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.low = torch.full((), math.inf, dtype=torch.float64)
        self.high = torch.full((), -math.inf, dtype=torch.float64)

    def update(self, values: Tensor) -> None:
        """``values``: ``(n,)`` non-negative, finite, float64."""
        if values.numel() == 0:
            return
        if self.counts.device != values.device:
            self.to(values.device)
        place = (values.log2() - self.LOW) * self.PER_OCTAVE
        place = place.clamp(0, len(self.counts) - 1).to(torch.int64)
        self.counts += torch.bincount(place, minlength=len(self.counts))
        self.low = torch.minimum(self.low, values.min())
        self.high = torch.maximum(self.high, values.max())

    def merge(self, other: LogHistogram) -> None:
        self.counts = self.counts + other.counts.to(self.counts.device)
        self.low = torch.minimum(self.low, other.low.to(self.low.device))
        self.high = torch.maximum(self.high, other.high.to(self.high.device))

    def quantile(self, q: float) -> float:
        """The ``q``-quantile: the middle of its bin, within the observed range; NaN if empty."""
        total = int(self.counts.sum())
        if total == 0:
            return math.nan
        rank = min(max(math.ceil(q * total), 1), total)
        place = int(torch.searchsorted(self.counts.cumsum(0), rank))
        middle = 2.0 ** (self.LOW + (place + 0.5) / self.PER_OCTAVE)
        return min(max(middle, float(self.low)), float(self.high))


class Channels(Accumulator):
    """Per-channel statistics of a family of vectors (tokens) of width ``d``.

    Attributes:
        count: rows seen; nonfinite: rows left out; zero: rows that are exactly zero.
        mean, m2, m3, m4: ``(d,)`` mean and central moment sums (Pébay's pairwise updates: no
            cancellation for a channel that is large and nearly constant).
        low, high: ``(d,)`` smallest and largest entry.
        abs_sum: ``(d,)`` sum of ``|x_d|``.
        share_sum, share_max: ``(d,)`` sum and maximum of ``x_d²/‖x‖²``, the channel's share of a
            row's energy.
        ratio_sum: ``(d,)`` sum of ``|x_d|/‖x‖₂``.
        argmax: ``(d,)`` how often the channel is the row's largest.
        top_sum: energy share of each row's own ``TOP_K`` largest channels, summed.
        peak_to_median_sum: ``max|x|/median|x|`` of each row, summed (rows with median 0 left out,
            counted in ``flat``).
        row_kurtosis_sum: ``mean(x⁴)/mean(x²)²`` over the channels of a row, summed.
        row_rms, row_peak: histograms of ``rms(x)`` and of ``max|x|/rms(x)``.
    """

    _tensors = (
        "count", "nonfinite", "zero", "flat", "mean", "m2", "m3", "m4", "low", "high", "abs_sum",
        "share_sum", "share_max", "ratio_sum", "argmax", "top_sum", "peak_to_median_sum",
        "row_kurtosis_sum",
    )  # fmt: skip
    _parts = ("row_rms", "row_peak")

    def __init__(self, width: int) -> None:
        self.width = width
        for name in ("count", "nonfinite", "zero", "flat"):
            setattr(self, name, torch.zeros((), dtype=torch.int64))
        for name in ("mean", "m2", "m3", "m4", "abs_sum", "share_sum", "share_max", "ratio_sum"):
            setattr(self, name, torch.zeros(width, dtype=torch.float64))
        self.low = torch.full((width,), math.inf, dtype=torch.float64)
        self.high = torch.full((width,), -math.inf, dtype=torch.float64)
        self.argmax = torch.zeros(width, dtype=torch.int64)
        self.top_sum = torch.zeros(len(TOP_K), dtype=torch.float64)
        self.peak_to_median_sum = torch.zeros((), dtype=torch.float64)
        self.row_kurtosis_sum = torch.zeros((), dtype=torch.float64)
        self.row_rms, self.row_peak = LogHistogram(), LogHistogram()

    # attributes set in a loop above
    count: Tensor
    nonfinite: Tensor
    zero: Tensor
    flat: Tensor
    mean: Tensor
    m2: Tensor
    m3: Tensor
    m4: Tensor
    abs_sum: Tensor
    share_sum: Tensor
    share_max: Tensor
    ratio_sum: Tensor

    def update(self, rows: Tensor) -> None:
        """``rows``: ``(n, d)``, any floating dtype."""
        if rows.dim() != 2 or rows.shape[1] != self.width:
            raise NormfuseError(f"expected rows of width {self.width}, got {tuple(rows.shape)}")
        if self.count.device != rows.device:
            self.to(rows.device)
        step = max(1, CHUNK // max(self.width, 1))
        for chunk in rows.split(step) if len(rows) else ():
            self._update(chunk.detach().to(torch.float64))

    def _update(self, x: Tensor) -> None:
        finite = x.isfinite().all(-1)
        bad = len(x) - int(finite.sum())
        if bad:
            self.nonfinite = self.nonfinite + bad
            x = x[finite]
        n = len(x)
        if n == 0 or self.width == 0:
            self.count = self.count + n
            return
        mean = x.mean(0)
        c = x - mean
        c2 = c * c
        self._combine(n, mean, c2.sum(0), (c2 * c).sum(0), (c2 * c2).sum(0))
        magnitude = x.abs()
        self.low = torch.minimum(self.low, x.amin(0))
        self.high = torch.maximum(self.high, x.amax(0))
        self.abs_sum = self.abs_sum + magnitude.sum(0)
        peak, where = magnitude.max(-1)
        alive = peak > 0
        dead = n - int(alive.sum())
        if dead:
            self.zero = self.zero + dead
            magnitude, peak, where = magnitude[alive], peak[alive], where[alive]
            if len(peak) == 0:
                self.row_rms.update(torch.zeros(dead, dtype=torch.float64, device=x.device))
                return
            self.row_rms.update(torch.zeros(dead, dtype=torch.float64, device=x.device))
        # relative to the row's peak, squares neither overflow nor vanish
        u = magnitude / peak[:, None]
        energy = (u * u).sum(-1, keepdim=True)
        share = u * u / energy
        self.share_sum = self.share_sum + share.sum(0)
        self.share_max = torch.maximum(self.share_max, share.amax(0))
        self.ratio_sum = self.ratio_sum + (u / energy.sqrt()).sum(0)
        self.argmax = self.argmax + torch.bincount(where, minlength=self.width)
        top = share.topk(min(max(TOP_K), self.width), dim=-1).values
        self.top_sum = self.top_sum + torch.stack([top[:, :k].sum() for k in TOP_K])
        median = u.median(-1).values
        uneven = median > 0
        self.flat = self.flat + (len(u) - uneven.sum())
        self.peak_to_median_sum = self.peak_to_median_sum + (1 / median[uneven]).sum()
        self.row_kurtosis_sum = self.row_kurtosis_sum + (self.width * (share * share).sum(-1)).sum()
        relative_rms = (energy[:, 0] / self.width).sqrt()
        self.row_rms.update(relative_rms * peak)
        self.row_peak.update(1 / relative_rms)

    def _combine(self, nb: int | Tensor, mean: Tensor, m2: Tensor, m3: Tensor, m4: Tensor) -> None:
        """Pébay (2008), eqs. 1.5–1.8 for the central moment sums of a union."""
        na = self.count.to(torch.float64)
        nb_ = torch.as_tensor(nb, dtype=torch.float64, device=mean.device)
        n = (na + nb_).clamp_min(1)
        delta = mean - self.mean
        d2 = delta * delta
        self.m4 = (
            self.m4
            + m4
            + d2 * d2 * na * nb_ * (na * na - na * nb_ + nb_ * nb_) / n**3
            + 6 * d2 * (na * na * m2 + nb_ * nb_ * self.m2) / n**2
            + 4 * delta * (na * m3 - nb_ * self.m3) / n
        )
        self.m3 = (
            self.m3
            + m3
            + d2 * delta * na * nb_ * (na - nb_) / n**2
            + 3 * delta * (na * m2 - nb_ * self.m2) / n
        )
        self.m2 = self.m2 + m2 + d2 * na * nb_ / n
        self.mean = self.mean + delta * nb_ / n
        self.count = self.count + nb

    def merge(self, other: Channels) -> None:
        if other.width != self.width:
            raise NormfuseError(f"cannot merge widths {self.width} and {other.width}")
        device = self.count.device
        o = {k: v.to(device) for k, v in other.state().items()}
        self._combine(o["count"], o["mean"], o["m2"], o["m3"], o["m4"])
        for name in (
            "nonfinite", "zero", "flat", "abs_sum", "share_sum", "ratio_sum", "argmax", "top_sum",
            "peak_to_median_sum", "row_kurtosis_sum",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + o[name])
        self.low = torch.minimum(self.low, o["low"])
        self.high = torch.maximum(self.high, o["high"])
        self.share_max = torch.maximum(self.share_max, o["share_max"])
        self.row_rms.merge(other.row_rms)
        self.row_peak.merge(other.row_peak)

    # -- figures --------------------------------------------------------------------------------

    @property
    def _n(self) -> float:
        return max(int(self.count), 1)

    @property
    def _alive(self) -> float:
        return max(int(self.count) - int(self.zero), 1)

    @property
    def variance(self) -> Tensor:
        """``(d,)`` biased variance over rows."""
        return self.m2 / self._n

    @property
    def rms(self) -> Tensor:
        """``(d,)`` root mean square over rows."""
        return (self.variance + self.mean**2).sqrt()

    @property
    def abs_max(self) -> Tensor:
        """``(d,)`` largest magnitude (0 if nothing was seen)."""
        seen = torch.maximum(self.high.abs(), self.low.abs())
        return torch.where(seen.isfinite(), seen, torch.zeros_like(seen))

    @property
    def kurtosis(self) -> Tensor:
        """``(d,)`` fourth standardized moment over rows (3 for a Gaussian); NaN for a constant."""
        return torch.where(self.m2 > 0, self._n * self.m4 / self.m2**2, math.nan)

    @property
    def share(self) -> Tensor:
        """``(d,)`` mean share of a row's energy."""
        return self.share_sum / self._alive

    @property
    def ratio(self) -> Tensor:
        """``(d,)`` mean of ``|x_d|/‖x‖₂``."""
        return self.ratio_sum / self._alive

    @property
    def argmax_share(self) -> Tensor:
        """``(d,)`` share of rows whose largest channel is this one."""
        return self.argmax.to(torch.float64) / self._alive

    @property
    def max_to_median(self) -> float:
        """Largest over median channel, of the mean magnitudes (``inf`` if half the channels are 0)."""
        magnitude = self.abs_sum / self._n
        if self.width == 0 or not magnitude.any():
            return math.nan
        return float(magnitude.max() / magnitude.median())

    def figures(self) -> dict[str, Any]:
        """The scalar figures, for tables and JSON."""
        if int(self.count) == 0 or self.width == 0:
            return {"rows": int(self.count), "nonfinite": int(self.nonfinite)}
        top = int(self.share.argmax())
        uneven = max(self._alive - int(self.flat), 1)
        return {
            "rows": int(self.count),
            "nonfinite": int(self.nonfinite),
            "width": self.width,
            "rms": float(self.rms.square().mean().sqrt()),
            "abs_max": float(self.abs_max.max()),
            "max_to_median": self.max_to_median,
            "row_max_to_median": float(self.peak_to_median_sum) / uneven,
            "row_kurtosis": float(self.row_kurtosis_sum) / self._alive,
            "top_channel": top,
            "top_channel_share": float(self.share[top]),
            "top_channel_ratio": float(self.ratio[top]),
            "top_channel_argmax": float(self.argmax_share[top]),
            **{
                f"top{k}_share": float(s) / self._alive
                for k, s in zip(TOP_K, self.top_sum, strict=True)
            },
            "row_rms_p01": self.row_rms.quantile(0.01),
            "row_rms_p50": self.row_rms.quantile(0.5),
            "row_rms_p99": self.row_rms.quantile(0.99),
            "row_peak_p50": self.row_peak.quantile(0.5),
            "row_peak_p99": self.row_peak.quantile(0.99),
        }


class Attention(Accumulator):
    """Per-head statistics of one attention call with ``heads`` heads.

    Only queries that see enough keys count (``min_keys``, or half the keys of a short sequence),
    since the first queries must look at the first key.

    Attributes:
        mass_sum: ``(heads,)`` softmax mass on the first visible key; uniform_sum: what an even
            spread would put there; queries: number of queries summed.
        logit_max: ``(heads,)`` largest magnitude of a visible logit.
        first_sum, first_count, value_sum, value_count: ``(heads,)`` norms of the first and of all
            value vectors.
        nonfinite: ``(heads,)`` queries left out because their logits were not finite.
    """

    _tensors = (
        "mass_sum", "uniform_sum", "queries", "logit_max", "first_sum", "first_count", "value_sum",
        "value_count", "nonfinite",
    )  # fmt: skip

    BLOCK = 128

    def __init__(self, heads: int, min_keys: int = 64) -> None:
        self.heads, self.min_keys = heads, min_keys
        for name in self._tensors:
            whole = name in ("queries", "first_count", "value_count", "nonfinite")
            dtype = torch.int64 if whole else torch.float64
            setattr(self, name, torch.zeros(heads, dtype=dtype))

    mass_sum: Tensor
    uniform_sum: Tensor
    queries: Tensor
    logit_max: Tensor
    first_sum: Tensor
    first_count: Tensor
    value_sum: Tensor
    value_count: Tensor
    nonfinite: Tensor

    def update_logits(self, logits: Tensor, visible: Tensor, first: Tensor) -> None:
        """One block of queries.

        Args:
            logits: ``(batch, heads, queries, keys)``.
            visible: the same shape or broadcastable, bool: what the mask lets through.
            first: ``(batch,)`` the first key that any query of the sequence may see: 0, or the
                first behind left padding.
        """
        if self.mass_sum.device != logits.device:
            self.to(logits.device)
        keys = logits.shape[-1]
        if keys == 0 or logits.numel() == 0:
            return
        visible = visible.expand(logits.shape)
        n = visible.sum(-1)
        enough = n >= min(self.min_keys, max(keys // 2, 1))
        clean = torch.where(visible, logits, logits.new_zeros(())).isfinite().all(-1)
        self.nonfinite = self.nonfinite + (enough & ~clean).sum((0, 2))
        enough = enough & clean
        used = visible & clean[..., None]
        shown = torch.where(used, logits, logits.new_zeros(())).to(torch.float64)
        self.logit_max = torch.maximum(self.logit_max, shown.abs().amax((0, 2, 3)))
        hidden = torch.where(used, shown, -math.inf)
        peak = hidden.amax(-1, keepdim=True)
        peak = torch.where(peak.isfinite(), peak, torch.zeros_like(peak))
        weights = (hidden - peak).exp()
        index = first.view(-1, 1, 1, 1).expand(*logits.shape[:-1], 1)
        mass = weights.gather(-1, index)[..., 0] / weights.sum(-1).clamp_min(1e-300)
        zero = mass.new_zeros(())
        self.mass_sum = self.mass_sum + torch.where(enough, mass, zero).sum((0, 2))
        even = 1 / n.clamp_min(1).to(torch.float64)
        self.uniform_sum = self.uniform_sum + torch.where(enough, even, zero).sum((0, 2))
        self.queries = self.queries + enough.sum((0, 2))

    def update_values(self, value: Tensor, first: Tensor | None = None) -> None:
        """``value``: ``(batch, heads, keys, width)``; first: ``(batch,)`` index of the first key."""
        if self.mass_sum.device != value.device:
            self.to(value.device)
        if value.numel() == 0:
            return
        norms = value.detach().to(torch.float64).norm(dim=-1)
        ok = norms.isfinite()
        norms = torch.where(ok, norms, norms.new_zeros(()))
        self.value_sum = self.value_sum + norms.sum((0, 2))
        self.value_count = self.value_count + ok.sum((0, 2))
        if first is None:
            leading, seen = norms[:, :, 0], ok[:, :, 0]
        else:
            index = first.view(-1, 1, 1).expand(norms.shape[0], norms.shape[1], 1)
            leading, seen = norms.gather(-1, index)[..., 0], ok.gather(-1, index)[..., 0]
        self.first_sum = self.first_sum + leading.sum(0)
        self.first_count = self.first_count + seen.sum(0)

    def check_like(self, other: Attention) -> None:
        """Raise if the two do not count the same."""
        if other.heads != self.heads or other.min_keys != self.min_keys:
            raise NormfuseError(
                f"cannot merge attention statistics of {self.heads} and {other.heads} heads, "
                f"with min_keys={self.min_keys} and {other.min_keys}"
            )

    def merge(self, other: Attention) -> None:
        self.check_like(other)
        for name in self._tensors:
            mine, theirs = getattr(self, name), getattr(other, name).to(self.mass_sum.device)
            largest = name == "logit_max"
            setattr(self, name, torch.maximum(mine, theirs) if largest else mine + theirs)

    @property
    def first_mass(self) -> Tensor:
        """``(heads,)`` mean softmax mass on the first key."""
        return self.mass_sum / self.queries.clamp_min(1)

    @property
    def uniform_mass(self) -> Tensor:
        """``(heads,)`` the same if every query spread its mass evenly."""
        return self.uniform_sum / self.queries.clamp_min(1)

    @property
    def first_value_ratio(self) -> Tensor:
        """``(heads,)`` ``‖v₀‖ / mean‖v‖``; NaN where no value vector was seen."""
        first = self.first_sum / self.first_count.clamp_min(1)
        mean = self.value_sum / self.value_count.clamp_min(1)
        return torch.where(mean > 0, first / mean, math.nan)

    def figures(self, threshold: float = 0.3) -> dict[str, Any]:
        if int(self.queries.sum()) == 0:
            return {"heads": self.heads, "queries": 0, "nonfinite": int(self.nonfinite.sum())}
        mass = self.first_mass
        return {
            "heads": self.heads,
            "queries": int(self.queries.sum()),
            "nonfinite": int(self.nonfinite.sum()),
            "first_mass": float(mass.mean()),
            "first_mass_max": float(mass.max()),
            "uniform_mass": float(self.uniform_mass.mean()),
            "heads_over_threshold": int((mass > threshold).sum()),
            "threshold": threshold,
            "first_value_ratio": float(self.first_value_ratio.nanmean()),
            "logit_max": float(self.logit_max.max()),
        }
