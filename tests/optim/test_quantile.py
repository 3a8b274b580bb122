"""Quantiles of magnitudes against torch.quantile, by every method, without a sort and without a sync."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from normfuse.optim import quantile
from normfuse.optim.quantile import abs_quantile, by_tables

LARGE = quantile.HISTOGRAM_FROM


def truth(x, q):
    return torch.quantile(x.abs().double().flatten(1), q, dim=1)


def test_small_matrices_and_float64():
    for dtype in (torch.float64, torch.float32):
        for n in (1, 2, 7, 10, 41):
            x = torch.randn(3, 1, n, dtype=dtype)
            x[1] = x[1].round()  # ties
            for q in (0.0, 0.3, 0.9, 1.0):
                torch.testing.assert_close(
                    abs_quantile(x, q).flatten().double(), truth(x, q), rtol=3e-7, atol=0
                )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    extra=st.integers(0, 3000),
    q=st.sampled_from([0.0, 1e-4, 0.5, 0.9, 0.999, 1.0]),
    kind=st.sampled_from(["normal", "ties", "spread", "constant", "sparse", "tiny", "flat"]),
    seed=st.integers(0, 99),
)
def test_histograms_are_exact(extra, q, kind, seed):
    """Order statistics to the bit; the quantile to the rounding of one interpolation."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 1, LARGE + extra, generator=g)
    if kind == "ties":
        x = x.mul(3).round()
    elif kind == "spread":
        x = x * torch.exp(30 * torch.randn(x.shape, generator=g)).clamp(1e-30, 1e30)
    elif kind == "constant":
        x = torch.full_like(x, -0.3)
    elif kind == "sparse":
        x = torch.where(torch.rand(x.shape, generator=g) < 0.05, x, 0.0)
    elif kind == "tiny":
        x = x * 1e-39  # below the smallest normal number
    elif kind == "flat":
        x = 1 + 1e-6 * x  # all in one bin
    found = abs_quantile(x, q).flatten()
    torch.testing.assert_close(found.double(), truth(x, q), rtol=3e-7, atol=1e-44)
    flat = x.flatten(1)
    rank = int(q * (flat.shape[1] - 1))
    ordered = flat.abs().sort(1).values
    first, second = by_tables(flat, rank)
    assert torch.equal(first, ordered[:, rank])
    assert torch.equal(second, ordered[:, min(rank + 1, flat.shape[1] - 1)])
    here, after = quantile._by_bins(flat, rank, rank + 1 < flat.shape[1])
    assert torch.equal(here, first)
    assert rank + 1 == flat.shape[1] or torch.equal(after, second)


def test_non_finite_entries_are_last():
    x = torch.randn(1, 1, LARGE + 5)
    x[0, 0, 3], x[0, 0, 9] = float("nan"), float("-inf")
    for find in (by_tables, lambda f, r: quantile._by_bins(f, r, True)):
        first, second = find(x.flatten(1), LARGE + 2)  # the largest finite number, then infinity
        assert first.item() == x[torch.isfinite(x)].abs().max() and second.item() == float("inf")
        first, second = find(x.flatten(1), LARGE + 3)
        assert first.item() == float("inf") and torch.isnan(second)


def test_the_device_path_never_waits_for_a_value():
    """Every shape is known to fake tensors, which have no values to read."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        first, second = by_tables(torch.empty(4, LARGE), 100)
    assert first.shape == second.shape == (4,)


def test_clipping_by_histogram_and_by_selection(monkeypatch):
    """ROOT's clamp is the same whichever way the quantile is found."""
    from normfuse.optim.stages import Batch, ClipOutliers

    x = torch.randn(2, 200, 200)
    batch = Batch(x, x, None, {}, {}, {})
    fast = ClipOutliers(0.9)(batch).update
    monkeypatch.setattr(quantile, "HISTOGRAM_FROM", 10**9)
    assert torch.equal(ClipOutliers(0.9)(batch).update, fast)
    share = (fast != x).float().mean().item()
    assert share == pytest.approx(0.1, abs=1e-3)
