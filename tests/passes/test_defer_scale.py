"""DeferScale: the row scale behind the product and before the bias; refusals and cost."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from normfuse.passes import ir
from normfuse.passes.exact.defer_scale import DeferScale
from normfuse.passes.exact.fold_affine import FoldAffine
from normfuse.passes.exact.remove_mean import RemoveMean
from properties import (
    NormAndReaders,
    Reader,
    assert_idempotent,
    assert_same,
    count,
    low_precision_errors,
    norms_and_readers,
    proves,
    rewrite,
    toys,
)
from stream_models import randomize
from torch import nn

nf = torch.ops.normfuse


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_identity():
    proves(DeferScale.identity())


@settings(max_examples=16, deadline=None, derandomize=True)
@given(norms_and_readers(norms=("rms", "plain", "plus_one", "bounded"), kinds=Reader.ROWS))
def test_same_function_and_gradients(case):
    model, args, *_, kinds = case
    gm, report = rewrite(model, args, FoldAffine(), DeferScale())
    assert ("norm", "defer_scale") in report.applied
    assert count(gm, nf.scaled_linear) == len(kinds) and not ir.norm_nodes(gm)
    assert_same(model, gm, args)
    assert_idempotent(gm, DeferScale())


@settings(max_examples=6, deadline=None, derandomize=True)
@given(toys())
def test_after_the_mean_is_removed(case):
    model, args = case
    gm, report = rewrite(model, args, FoldAffine(copy_tied=True), RemoveMean(), DeferScale())
    for i, block in enumerate(model.blocks):
        if block.style in ("pre", "parallel"):
            done = [p for key, p in report.applied if key == f"blocks.{i}.norm1"]
            assert "defer_scale" in done or "remove_mean" not in done
    assert_same(model, gm, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_working_precision(dtype, scale):
    model = randomize(NormAndReaders("plain", ("linear", "addmm"), d=64), scale=0.2).to(dtype)
    args = ((torch.randn(64, 64) * scale).to(dtype),)
    eager, ours, report = low_precision_errors(model, args, DeferScale())
    assert report.applied
    assert ours <= 1.5 * eager


def test_a_row_of_zeros_stays_finite_where_the_statistic_is_bounded():
    model = randomize(NormAndReaders("bounded_plain", d=4).double())
    args = (torch.randn(3, 4, dtype=torch.float64) * torch.tensor([[0.0], [1e-14], [1.0]]),)
    gm, report = rewrite(model, args, DeferScale())
    assert report.applied
    assert_same(model, gm, args)


def test_scale_is_kept_wide_until_after_the_bias():
    model = nn.Sequential(nn.RMSNorm(8, elementwise_affine=False), nn.Linear(8, 4)).bfloat16()
    gm, _ = rewrite(model, (torch.randn(3, 8).bfloat16(),), DeferScale())
    [scale] = [n for n in gm.graph.nodes if ir.is_call(n, nf.row_rstd)]
    [layer] = [n for n in gm.graph.nodes if ir.is_call(n, nf.scaled_linear)]
    assert ir.dtype(scale) == torch.float32 and ir.dtype(layer) == torch.bfloat16
    assert layer.kwargs["out_dtype"] == torch.bfloat16


def test_float32_stream_with_low_precision_layers():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 16, dtype=torch.bfloat16)

        def forward(self, x):
            return self.fc(F.rms_norm(x, (64,), eps=1e-6).bfloat16())

    model, args = randomize(Mixed(), scale=0.2), (torch.randn(64, 64) * 30,)
    eager, ours, report = low_precision_errors(model, args, DeferScale())
    assert report.applied and ours <= 1.5 * eager
    _, report = rewrite(model, (torch.randn(4, 64),), DeferScale(), policy="pays")
    assert "another dtype" in report.refused[0][2]


# -- float16


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(8, elementwise_affine=False)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.norm(x))


def test_float16_is_refused_without_a_bound():
    model, args = Half().half(), (torch.full((2, 8), 3e4).half(),)
    with torch.no_grad():
        model.fc.weight.fill_(1.0)
    gm, report = rewrite(model, args, DeferScale())
    [(_, _, reason)] = report.refused
    assert "overflow float16" in reason and "float16_bound" in reason
    assert gm(*args).isfinite().all()
    # and the guard is needed: the deferred product does overflow here
    gm, report = rewrite(model, args, DeferScale(float16_bound=100.0))
    assert report.applied and not gm(*args).isfinite().all()


def test_float16_with_a_bound():
    _, report = rewrite(Half().half(), (torch.randn(2, 8).half(),), DeferScale(float16_bound=6e4))
    assert not report.applied and "too close" in report.refused[0][2]
    model = randomize(NormAndReaders("plain", ("linear",), d=64), scale=0.2).half()
    args = (torch.randn(64, 64).half(),)
    eager, ours, report = low_precision_errors(model, args, DeferScale(float16_bound=1e3))
    assert report.applied and ours <= 1.5 * eager


# -- refusals


@pytest.mark.parametrize(
    ("norm", "readers", "reason"),
    [
        ("layer", ("linear",), "subtracts the mean"),
        ("rms", ("linear",), "fold them into its readers first"),
        ("plain", ("linear", "conv"), "conv"),
        ("plain", ("experts",), "takes no scale per row"),
        ("plain", ("mean",), "cannot follow"),
    ],
)
def test_refusals(norm, readers, reason):
    model = NormAndReaders(norm, readers).eval()
    gm, report = rewrite(model, model.example(), DeferScale())
    [(key, _, why)] = report.refused
    assert key == "norm" and reason in why
    assert len(ir.norm_nodes(gm)) == 1 and not count(gm, nf.row_rstd)


@pytest.mark.parametrize(
    "path",
    [
        lambda h: h.view(-1, 8),
        lambda h: h.transpose(0, 1).contiguous().flatten(0, 1),
        lambda h: h[:, 1:].unsqueeze(0).squeeze(0),
        lambda h: h[torch.tensor([1, 0])].permute(1, 0, 2),
        lambda h: h.narrow(1, 0, 2).select(1, 0).double(),
    ],
)
def test_the_scale_follows(path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(path(F.rms_norm(x, (8,), eps=1e-6)))

    model = randomize(Model().double())
    args = (torch.randn(2, 3, 8).double(),)
    gm, report = rewrite(model, args, DeferScale())
    assert report.applied and count(gm, nf.scaled_linear) == 1
    assert_same(model, gm, args)


@pytest.mark.parametrize("path", [torch.relu, lambda h: h.sum(0), lambda h: h + 1])
def test_the_scale_does_not_follow(path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(path(F.rms_norm(x, (8,), eps=1e-6)))

    _, report = rewrite(Model(), (torch.randn(2, 3, 8),), DeferScale())
    assert not report.applied and len(report.refused) == 1


# -- cost


class Mlp(nn.Module):
    def __init__(self, pointwise):
        super().__init__()
        self.up, self.pointwise = nn.Linear(16, 64), pointwise

    def forward(self, x):
        y = self.up(F.rms_norm(x, (16,), eps=1e-6))
        return F.gelu(y) if self.pointwise else y.softmax(-1)


def test_pays_where_the_consumer_is_pointwise():
    args = (torch.randn(4, 16),)
    _, report = rewrite(Mlp(True).eval(), args, DeferScale(), policy="pays")
    assert report.applied and report.sites[0].bytes_saved == 2 * 4 * 16 * 4
    _, report = rewrite(Mlp(False).eval(), args, DeferScale(), policy="pays")
    [(_, _, reason)] = report.refused
    assert "does not pay" in reason and "2.0 KiB" in reason and "256 B" in reason
    _, report = rewrite(Mlp(True).eval(), (torch.randn(5, 16),), DeferScale(), policy="pays")
    assert not report.applied and "5 rows" in report.refused[0][2]
    _, report = rewrite(Mlp(True), args, DeferScale(), policy="pays", training=True)
    assert not report.applied and "in training" in report.refused[0][2]
