"""MergeLinears: same values, one product, views behind it; refusals and cost."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from normfuse import passes
from normfuse.passes import Context, PassManager, ir
from normfuse.passes.exact.defer_scale import DeferScale
from normfuse.passes.exact.fold_affine import FoldAffine
from normfuse.passes.exact.merge_linears import MergeLinears
from normfuse.passes.linear import match_linear
from properties import (
    Reader,
    assert_idempotent,
    assert_same,
    low_precision_errors,
    proves,
    rewrite,
    toys,
)
from stream_models import Attention, randomize
from torch import nn

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layers(gm):
    return [m for n in gm.graph.nodes if (m := match_linear(n)) is not None]


def test_identity():
    proves(MergeLinears.identity())


class Parallel(nn.Module):
    """Several readers of one input; the results meet in pointwise ops of their own."""

    def __init__(self, *readers):
        super().__init__()
        self.readers = nn.ModuleList(readers)

    def forward(self, x):
        x = torch.tanh(x)
        return tuple(torch.sin(r(x)) for r in self.readers)


KINDS = ("linear", "addmm", "matmul", "transposed", "experts", "conv", "heads")


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.booleans()), min_size=2, max_size=4),
    st.integers(2, 4),
    st.booleans(),
)
def test_same_function_and_gradients(specs, rank, training):
    d = 4
    model = Parallel(*(Reader(kind, d, 3 + i, bias) for i, (kind, bias) in enumerate(specs)))
    model = randomize(model.double())
    shape = {2: (5, d), 3: (2, 5, d), 4: (2, 3, 2, d)}[rank]
    args = (torch.randn(shape).double(),)
    gm, report = rewrite(model, args, MergeLinears(), training=training)
    family = {"heads": None, "transposed": "matmul"}
    kinds = [family.get(k, k) for k, _ in specs]
    groups = [k for k in set(kinds) if k is not None and kinds.count(k) > 1]
    assert len(report.applied) == len(groups)
    merged = sum(kinds.count(k) for k in groups)
    assert len(layers(gm)) == len(specs) - merged + len(groups)
    assert_same(model, gm, args)
    assert_idempotent(gm, MergeLinears())


@settings(max_examples=6, deadline=None, derandomize=True)
@given(toys(), st.booleans())
def test_same_function_on_residual_models(case, deferred):
    model, args = case
    chosen = [FoldAffine(copy_tied=True), *([DeferScale()] if deferred else []), MergeLinears()]
    gm, report = rewrite(model, args, *chosen)
    merged = [key for key, name in report.applied if name == "merge_linears"]
    attention = sum(isinstance(m, Attention) for m in model.modules())
    assert len(merged) >= attention
    assert_same(model, gm, args)


def test_dynamic_rows():
    model = randomize(Parallel(*(Reader("addmm", 4, 3 + i, True) for i in range(3))).double())
    gm, report = rewrite(model, (torch.randn(2, 5, 4).double(),), MergeLinears())
    assert len(report.applied) == 1 and len(layers(gm)) == 1
    x = torch.randn(7, 3, 4).double()
    for got, want in zip(gm(x), model(x), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_working_precision(dtype):
    model = randomize(Parallel(*(nn.Linear(64, 64) for _ in range(3))), scale=0.2).to(dtype)
    args = (torch.randn(32, 64).to(dtype),)
    eager, ours, report = low_precision_errors(model, args, MergeLinears())
    assert report.applied and ours <= 1.05 * eager


def test_missing_biases_become_zeros_and_sites_are_named():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention(8)
            self.attn.k = nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.attn(x)

    model = randomize(Outer().double())
    args = (torch.randn(2, 3, 8).double(),)
    gm, report = rewrite(model, args, MergeLinears())
    [site] = report.sites
    assert site.key == "attn.(q+k+v)" and site.kind == "linear" and ".py:" in site.where
    assert site.spelling == "8→8 + 8→8 + 8→8"
    [merged, _] = layers(gm)
    assert merged.out_features == 24 and merged.bias is not None
    assert_same(model, gm, args)


def test_views_that_strides_forbid_become_reshapes():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x):
            return torch.sin(self.a(x).view(-1)) * self.b(x).view(3, -1).flatten()

    model = randomize(Flat().double())
    args = (torch.randn(5, 4).double(),)
    gm, report = rewrite(model, args, MergeLinears())
    assert report.applied
    assert_same(model, gm, args)
    for node in gm.graph.nodes:  # fake values tell the truth about strides
        if ir.is_call(node, aten.slice):
            assert ir.val(node).stride() == (12, 1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            Parallel(nn.Conv1d(4, 4, 1, groups=2), nn.Conv1d(4, 4, 1, groups=2)),
            "grouped convolution",
        ),
        (Parallel(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 3)), "differ in more"),
    ],
)
def test_refusals(model, reason):
    args = (torch.randn(2, 4, 6),)
    gm, report = rewrite(model.eval(), args, MergeLinears())
    assert not report.applied and reason in report.refused[0][2]
    assert len(layers(gm)) == 2


def test_outputs_stay_contiguous():
    class Outputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x), self.b(x)

    gm, report = rewrite(Outputs().eval(), (torch.randn(2, 4),), MergeLinears())
    assert not report.applied and "output of the model" in report.refused[0][2]
    assert all(t.is_contiguous() for t in gm(torch.randn(2, 4)))


def test_tied_heads_are_not_copied():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 4)
            self.other = nn.Linear(4, 11, bias=False)

        def forward(self, ids):
            h = torch.tanh(self.embed(ids))
            return torch.sin(F.linear(h, self.embed.weight)) + torch.sin(self.other(h))

    _, report = rewrite(TwoHeads().eval(), (torch.arange(5),), MergeLinears())
    assert not report.applied and any("tied" in r for _, _, r in report.refused)


def test_weights_computed_from_activations_stay_out():
    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, w):
            return torch.sin(self.a(x)) + torch.sin(self.b(x)) + F.linear(x, w.tanh())

    args = (torch.randn(3, 4), torch.randn(4, 4))
    gm, report = rewrite(Hyper().eval(), args, MergeLinears())
    assert len(report.applied) == 1 and len(layers(gm)) == 2
    assert "computed from activations" in report.refused[0][2]


@pytest.mark.parametrize("deferred", [False, True])
def test_two_equal_norms_are_one_input(deferred):
    """Once affines are folded, parallel branches with norms of their own read the same value."""

    class TwoNorms(nn.Module):
        def __init__(self):
            super().__init__()
            self.n1, self.n2 = nn.RMSNorm(4, eps=1e-6), nn.RMSNorm(4, eps=1e-6)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 6)

        def forward(self, x):
            return torch.sin(self.a(self.n1(x))), torch.sin(self.b(self.n2(x)))

    model = randomize(TwoNorms().double())
    args = (torch.randn(3, 4).double(),)
    chosen = [FoldAffine(), *([DeferScale()] if deferred else []), MergeLinears()]
    gm, report = rewrite(model, args, *chosen)
    assert ("a+b", "merge_linears") in report.applied
    assert len(layers(gm)) == 1 and len(ir.norm_nodes(gm)) == (not deferred)
    assert_same(model, gm, args)


def test_different_inputs_are_no_group():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, y):
            return torch.sin(self.q(x)) + torch.sin(self.k(y))

    args = (torch.randn(3, 4), torch.randn(3, 4))
    _, report = rewrite(Cross().eval(), args, MergeLinears())
    assert not report.sites


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_pays_up_to_sixteen_rows_on_cpu(rows):
    model = Parallel(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    args = (torch.randn(rows, 4),)
    _, report = rewrite(model, args, MergeLinears(), policy="pays")
    assert bool(report.applied) == (rows <= 16)
    if rows > 16:
        assert f"{rows} rows" in report.refused[0][2] and "16 rows" in report.refused[0][2]
    _, report = rewrite(model, args, MergeLinears(max_rows=100), policy="pays")
    assert report.applied


def test_declines_in_training_where_it_must_pay():
    model = Parallel(nn.Linear(4, 4), nn.Linear(4, 4))
    _, report = rewrite(model, (torch.randn(2, 4),), MergeLinears(), policy="pays", training=True)
    assert not report.applied and "in training" in report.refused[0][2]


def test_cost_uses_hints_and_adds_no_guard():
    gm = passes.capture(Parallel(nn.Linear(4, 4), nn.Linear(4, 4)).eval(), (torch.randn(8, 4),))
    env = next(iter(gm.graph.nodes)).meta["val"].shape[0].node.shape_env
    before = len(env.guards)
    PassManager([MergeLinears()], Context(policy="pays")).run(gm)
    assert len(env.guards) == before and len(layers(gm)) == 1
    assert gm(torch.randn(3, 4))[0].shape == (3, 4)


class Chained(nn.Module):
    """Linear layers that read a linear layer, which merges itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in "abcd")

    def forward(self, x):
        x = torch.tanh(x)
        h = self.a(x)
        return torch.sin(self.b(x)), torch.sin(self.c(h)), torch.cos(self.d(h))


def test_a_merged_layer_feeds_layers_that_merge():
    model, args = Chained().double(), (torch.randn(3, 4).double(),)
    gm, report = rewrite(model, args, MergeLinears())
    assert len(report.applied) == 2 and len(layers(gm)) == 2
    assert_same(model, gm, args)
