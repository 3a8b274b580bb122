"""The persistent kernel that loads tiles by tensor descriptors: the same numbers as with pointers."""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from interpreter import DTYPES, KINDS, check, triton_ops
from normfuse.runtime import devices
from normfuse.runtime.kernels import plans
from normfuse.runtime.triton_ops import linear as linear_ops

HALVES = DTYPES[1:]


class Launches:
    """Stands for ``launch`` and counts what is launched."""

    def __init__(self, launch):
        self.launch, self.names, self.grids = launch, [], []

    def __call__(self, kernel, grid, on, **arguments):
        self.names.append(kernel.__name__)
        self.grids.append(grid)
        self.launch(kernel, grid, on, **arguments)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Small tiles and few processors, so that programs walk over several tiles."""
    monkeypatch.setattr(devices, "processors", lambda device: 2)
    counted = Launches(linear_ops.launch)
    monkeypatch.setattr(linear_ops, "launch", counted)
    return counted


def with_plan(monkeypatch, descriptors, **changes):
    plan = plans.GemmPlan("large", 32, 32, 32, 4, 3, group=2, descriptors=descriptors)
    plan = dataclasses.replace(plan, **changes)
    monkeypatch.setattr(linear_ops, "tuned", lambda *args, **options: plan)


def make(m, n, k, dtype, mean=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(m, k, generator=g) + mean).to(dtype)
    w = (torch.randn(n, k, generator=g) / k**0.5).to(dtype)
    return x, w, torch.randn(n, generator=g).to(dtype)


def both(monkeypatch, launches, f):
    """Results by descriptors and by pointers."""
    out = []
    for descriptors in (True, False):
        with_plan(monkeypatch, descriptors)
        out.append(f())
    assert launches.names == ["norm_linear_persistent", "norm_linear_kernel"]
    assert launches.grids[0] == (2,) and launches.grids[1][0] > 2
    return out


def norm_linear(x, w, b, up=None, up_bias=None, kind="rms", act="identity"):
    return triton_ops.norm_linear(x, w, b, None, up, up_bias, None, 1e-5, kind, act, None)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(70, 72, 64), (65, 40, 104)], ids=str)
def test_equal_to_pointers(monkeypatch, launches, dtype, kind, sizes):
    """Whole tiles and ragged ones."""
    x, w, b = make(*sizes, dtype, mean=0.3)
    ours, pointers = both(
        monkeypatch, launches, lambda: norm_linear(x, w, b, kind=kind, act="silu")
    )
    for a, p in zip(ours, pointers, strict=True):
        assert torch.equal(a, p)


def test_equal_to_pointers_where_layernorm_cancels(monkeypatch, launches):
    x, w, b = make(70, 40, 64, torch.bfloat16, mean=100.0)
    x[:, ::2] += 8
    ours, pointers = both(monkeypatch, launches, lambda: norm_linear(x, w, b, kind="layer"))
    assert torch.equal(ours[0], pointers[0])
    h = torch.nn.functional.layer_norm(x.double(), (64,), eps=1e-5)
    truth = torch.nn.functional.linear(h, w.double(), b.double())
    low = torch.nn.functional.layer_norm(x.float(), (64,), eps=1e-5).bfloat16()
    eager = torch.nn.functional.linear(low, w, b)
    check(ours[0], eager, truth, slack=2**-8)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_pairs_in_both_layouts(monkeypatch, launches, layout):
    x, w, b = make(70, 80, 64, torch.bfloat16)
    if layout == "columns":
        w = w.t().contiguous().t()
    args = (x, w[:40], b[:40], w[40:], b[40:])
    ours, pointers = both(monkeypatch, launches, lambda: norm_linear(*args, act="gelu"))
    assert torch.equal(ours[0], pointers[0])


def test_given_scale_and_rows_of_another_dtype(monkeypatch, launches):
    x, w, b = make(70, 40, 64, torch.bfloat16)
    scale = torch.rand(70, 1) + 0.5
    rest = (None, None, "relu", None)
    ours, pointers = both(
        monkeypatch, launches, lambda: triton_ops.scaled_linear(x, w, scale, b, *rest)
    )
    assert torch.equal(ours, pointers)
    launches.names.clear(), launches.grids.clear()
    wide = make(70, 40, 64, torch.float32)[0]
    ours, pointers = both(monkeypatch, launches, lambda: norm_linear(wide, w, b))
    assert torch.equal(ours[0], pointers[0])


def test_bad_rows_spoil_themselves_only(monkeypatch, launches):
    x, w, b = make(70, 40, 64, torch.bfloat16)
    x[3, 5], x[40, 1], x[69] = float("nan"), float("inf"), 0.0
    ours, pointers = both(monkeypatch, launches, lambda: norm_linear(x, w, b))
    torch.testing.assert_close(ours[0], pointers[0], equal_nan=True, rtol=0, atol=0)
    good = [i for i in range(70) if i not in (3, 40)]
    assert torch.isfinite(ours[0][good]).all() and torch.isnan(ours[0][3]).all()


def float32(x, w, b):
    return norm_linear(x.float(), w.float(), b.float())


POINTERS = {
    "float32": float32,
    "rows of 65 elements": lambda x, w, b: norm_linear(x[:, :65].contiguous(), w[:, :65], b),
    "begins between": lambda x, w, b: norm_linear(x[:, 1:65], w[:, 1:65], b),
    "no unit stride": lambda x, w, b: norm_linear(x[:, ::2], w[:, ::2], b),
    "overlapping rows": lambda x, w, b: norm_linear(x.as_strided((70, 64), (8, 1)), w[:, :64], b),
    "LayerNorm of a pair": lambda x, w, b: norm_linear(x, w, b, w * 2, b, kind="layer"),
    "LayerNorm of wide rows": lambda x, w, b: norm_linear(x.float(), w, b, kind="layer"),
}


@pytest.mark.parametrize("case", POINTERS)
def test_what_descriptors_cannot_hold_goes_by_pointers(monkeypatch, launches, case):
    with_plan(monkeypatch, True)
    y, _ = POINTERS[case](*make(70, 40, 72, torch.bfloat16))
    assert launches.names == ["norm_linear_kernel"] and torch.isfinite(y).all()
