"""Quantiles of magnitudes: two histograms of the bits instead of a sort.

Bits of non-negative floating-point numbers, read as integers, are ordered like the numbers. A histogram
of the upper half of the bits finds the bin of the wanted order statistic, one of the lower half, of that
bin's entries only, the number itself: the order statistic is exact, so the quantile's only error is
the rounding of the interpolation, as in ``torch.quantile`` (which sorts, and refuses more than 16 M
entries). Floor: one read of the matrix. On devices nothing is read back and every shape is fixed; on
CPUs the second pass looks at the selected entries only.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

#: Matrices with fewer entries are selected from directly: tables would be larger than they are.
HISTOGRAM_FROM = 2**15
_BINS = 2**15
_LOW = 2**16


@torch.library.custom_op("normfuse_optim::abs_quantile", mutates_args=())
def abs_quantile(x: Tensor, q: float) -> Tensor:
    """``quantile(|x|, q)`` per matrix with linear interpolation, ``[B, r, c]`` to ``[B, 1, 1]``.

    NaN counts as larger than everything, as in ``kthvalue``.
    """
    flat = x.flatten(1)
    position = q * (flat.shape[1] - 1)
    rank = math.floor(position)  # from 0
    fraction = position - rank
    if x.dtype != torch.float32 or flat.shape[1] < HISTOGRAM_FROM:
        first, second = _by_selection(flat.abs(), rank, fraction > 0)
    elif x.device.type == "cpu":
        first, second = _by_bins(flat, rank, fraction > 0)
    else:
        first, second = by_tables(flat, rank)
    out = first + fraction * (second - first) if fraction else first
    return out[:, None, None]


@abs_quantile.register_fake
def _(x, q):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], 1, 1))


def _by_selection(flat: Tensor, rank: int, both: bool) -> tuple[Tensor, Tensor]:
    """Order statistics ``rank`` and ``rank + 1`` of each row of ``flat``, which is not negative."""
    first = flat.kthvalue(rank + 1, dim=1).values
    if not both:
        return first, first
    # the next one: the smallest entry above ``first``, unless ``first`` is repeated beyond the rank
    above = torch.where(flat > first[:, None], flat, math.inf).amin(1)
    repeated = (flat <= first[:, None]).sum(1) > rank + 1
    return first, torch.where(repeated, first, above)


def _by_bins(flat: Tensor, rank: int, both: bool) -> tuple[Tensor, Tensor]:
    """The same for float32 rows on a CPU, where selecting a bin's entries costs no waiting."""
    first, second = flat.new_empty(flat.shape[0]), flat.new_empty(flat.shape[0])

    def entries(row: Tensor, inside: Tensor) -> Tensor:
        # NumPy finds the few entries of a mask several times faster than masked_select
        return row[torch.from_numpy(np.flatnonzero(inside.numpy()))].abs()

    for i, row in enumerate(flat):
        # little-endian halves (every platform PyTorch supports)
        bins = row.contiguous().view(torch.int16).view(-1, 2)[:, 1].bitwise_and(0x7FFF)
        upto = torch.bincount(bins, minlength=_BINS).cumsum(0)
        wanted = torch.tensor([rank + 1, rank + 2 if both else rank + 1])
        low, high = torch.searchsorted(upto, wanted).tolist()
        before = int(upto[low - 1]) if low else 0
        found = entries(row, bins == low)
        first[i] = found.kthvalue(rank + 1 - before).values
        if not both:
            continue
        if high == low:
            second[i] = found.kthvalue(rank + 2 - before).values
        else:
            second[i] = entries(row, bins == high).min()
    return first, second


def by_tables(flat: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same for float32 rows on any device: fixed shapes, and no value is read by the host."""
    rows, size = flat.shape
    bits = flat.contiguous().view(torch.int32).bitwise_and(0x7FFFFFFF)
    high, low = (bits >> 16).long(), (bits & (_LOW - 1)).long()
    one = torch.ones((), dtype=torch.int32, device=flat.device).expand_as(bits)
    table = torch.zeros(rows, _BINS, dtype=torch.int32, device=flat.device)
    upto = table.scatter_add_(1, high, one).cumsum(1)
    last = min(rank + 2, size)
    wanted = torch.tensor([rank + 1, last], device=flat.device).expand(rows, 2).contiguous()
    bins = torch.searchsorted(upto, wanted)
    before = torch.where(bins > 0, upto.gather(1, (bins - 1).clamp(min=0)), 0)
    # three tables: the first bin, the second where it is another, and the rest (spread, not counted in
    # one cell, which every processor would queue for)
    kind = torch.where(high == bins[:, :1], 0, torch.where(high == bins[:, 1:], 1, 2))
    tables = torch.zeros(rows, 3 * _LOW, dtype=torch.int32, device=flat.device)
    tables.scatter_add_(1, kind * _LOW + low, one)
    inside = tables.view(rows, 3, _LOW)[:, :2].cumsum(2)
    which = (bins != bins[:, :1]).long()  # table of each rank
    chosen = inside.gather(1, which[:, :, None].expand(-1, -1, _LOW))
    entry = torch.searchsorted(chosen, (wanted - before)[:, :, None]).squeeze(2)
    found = ((bins << 16) | entry).to(torch.int32).view(torch.float32)
    return found[:, 0], found[:, 1]
