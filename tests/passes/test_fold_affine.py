"""FoldAffine: bias before gain, every reader or none, refusals with reasons."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from normfuse import passes
from normfuse.passes import Context, PassManager, ir
from normfuse.passes.exact.fold_affine import FoldAffine
from properties import (
    NormAndReaders,
    PlusOne,
    Reader,
    assert_idempotent,
    assert_same,
    calls,
    low_precision_errors,
    norms_and_readers,
    proves,
    rewrite,
    toys,
)
from stream_models import Toy, randomize
from torch import nn

aten, nf = torch.ops.aten, torch.ops.normfuse


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def folded(gm):
    return [(a := ir.NormArgs(n)).gain is None and a.bias is None for n in ir.norm_nodes(gm)]


def test_identity():
    proves(FoldAffine.identity())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(norms_and_readers())
def test_same_function_and_gradients(case):
    model, args, *_ = case
    gm, report = rewrite(model, args, FoldAffine())
    assert report.applied == [("norm", "fold_affine")] and folded(gm) == [True]
    assert_same(model, gm, args)
    assert_idempotent(gm, FoldAffine())


@settings(max_examples=6, deadline=None, derandomize=True)
@given(toys(), st.booleans(), st.booleans())
def test_same_function_on_residual_models(case, training, copy_tied):
    model, args = case
    gm, report = rewrite(model, args, FoldAffine(copy_tied=copy_tied), training=training)
    tied = model.head.weight is getattr(getattr(model, "embed", None), "weight", None)
    done = {key for key, _ in report.applied}
    if model.norm.weight is not None:
        assert ("norm" in done) == (copy_tied or not tied)
    for i, block in enumerate(model.blocks):
        if block.style in ("pre", "parallel") and block.norm1.weight is not None:
            assert f"blocks.{i}.norm1" in done
        assert f"blocks.{i}.post1" not in done
    assert_same(model, gm, args)
    assert_idempotent(gm, FoldAffine(copy_tied=copy_tied))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["layer", "rms", "plus_one"])
def test_working_precision(dtype, norm):
    model = randomize(NormAndReaders(norm, ("linear", "addmm", "matmul"), d=64), scale=0.2)
    args = (torch.randn(64, 64).to(dtype),)
    eager, ours, report = low_precision_errors(model.to(dtype).eval(), args, FoldAffine())
    assert report.applied
    assert ours <= 1.5 * eager


def test_mixed_precision_keeps_dtypes():
    """float32 norm between bfloat16 layers; the fold must not change what the layers see."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(32)
            self.fc = nn.Linear(32, 8, dtype=torch.bfloat16)

        def forward(self, x):
            return self.fc(self.norm(x.float()).to(torch.bfloat16))

    model, args = randomize(Mixed(), scale=0.2), (torch.randn(64, 32).bfloat16(),)
    gm, report = rewrite(model, args, FoldAffine())
    assert report.applied and gm(*args).dtype == torch.bfloat16
    eager, ours, _ = low_precision_errors(model, args, FoldAffine())
    assert ours <= 1.5 * eager


def test_promoting_gain_keeps_the_result_dtype():
    """A float32 gain on a bfloat16 norm makes a float32 result; it stays float32 without it."""

    class Promoting(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.rand(8) + 0.5)
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            h = x.float()
            h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
            return self.fc(self.gain * h)

    model, args = Promoting(), (torch.randn(4, 8).bfloat16(),)
    gm, report = rewrite(model, args, FoldAffine())
    assert report.applied
    torch.testing.assert_close(gm(*args), model(*args), rtol=1e-5, atol=1e-6)


def test_zero_gains_are_legal():
    model = randomize(NormAndReaders("layer", ("linear", "conv"))).double().eval()
    with torch.no_grad():
        model.norm.weight[1:3] = 0.0
    args = model.example()
    gm, report = rewrite(model, args, FoldAffine())
    assert report.applied
    assert_same(model, gm, args)


def test_bias_uses_the_weight_before_the_gain():
    model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 1, bias=False)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.0, 0.0]))
        model[0].bias.copy_(torch.tensor([1.0, 2.0]))
        model[1].weight.copy_(torch.tensor([[3.0, 5.0]]))
    x = torch.randn(4, 2).double()
    gm, _ = rewrite(model, (x,), FoldAffine())
    assert torch.equal(gm(x), torch.full((4, 1), 13.0).double())


# -- features in other places than the last dim of one row


class Heads(nn.Module):
    """A norm per head whose result is flattened into an output projection."""

    def __init__(self, gain_shape):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(gain_shape).double())
        self.shift = nn.Parameter(torch.randn(4).double())
        self.o = nn.Linear(8, 3).double()

    def forward(self, x):
        h = x.unflatten(-1, (2, 4))
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain + self.shift
        return self.o(h.flatten(-2))


@pytest.mark.parametrize("gain_shape", [(4,), (2, 4), (2, 1), (1,), ()])
def test_gain_of_heads_is_tiled(gain_shape):
    model, args = Heads(gain_shape), (torch.randn(3, 5, 8).double(),)
    gm, report = rewrite(model, args, FoldAffine())
    if gain_shape != (2, 1):  # one number per head is no gain of the norm
        assert report.applied and folded(gm) == [True]
    assert_same(model, gm, args)


class TwoDims(nn.Module):
    """A norm over two dims, flattened, in order or transposed."""

    def __init__(self, transposed):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm((2, 3)), nn.Linear(6, 4)
        self.transposed = transposed

    def forward(self, x):
        h = self.norm(x)
        h = h.transpose(-1, -2) if self.transposed else h
        return self.fc(h.flatten(-2))


@pytest.mark.parametrize("transposed", [False, True])
def test_norm_over_two_dims(transposed):
    model = randomize(TwoDims(transposed).double())
    args = (torch.randn(5, 2, 3).double(),)
    gm, report = rewrite(model, args, FoldAffine())
    assert bool(report.applied) == (not transposed)
    assert_same(model, gm, args)


class ChannelsFirst(nn.Module):
    def __init__(self, padding):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv2d(4, 6, 3, padding=padding, groups=2)

    def forward(self, x):
        return self.conv(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_convolution_without_padding_takes_gain_and_bias():
    model = randomize(ChannelsFirst(0).double())
    args = (torch.randn(2, 4, 5, 5).double(),)
    gm, report = rewrite(model, args, FoldAffine())
    assert report.applied
    assert_same(model, gm, args)


def test_padding_convolution_refuses_the_bias_but_takes_the_gain():
    model = randomize(ChannelsFirst(1).double())
    args = (torch.randn(2, 4, 5, 5).double(),)
    _, report = rewrite(model, args, FoldAffine())
    [(_, _, reason)] = report.refused
    assert "pads its input with zeros" in reason and "conv" in reason
    model.norm = randomize(nn.LayerNorm(4, bias=False).double())
    gm, report = rewrite(model, args, FoldAffine())
    assert report.applied
    assert_same(model, gm, args)


class Routed(nn.Module):
    """A router and stacked experts share one norm; every row goes to every expert."""

    def __init__(self, d=8, experts=3):
        super().__init__()
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.router = nn.Linear(d, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, d, 2 * d) * 0.3)
        self.down = nn.Parameter(torch.randn(experts, 2 * d, d) * 0.3)

    def forward(self, x):
        h = self.norm(x).flatten(0, -2)
        weights = self.router(h).softmax(-1)
        rows = h.expand(3, *h.shape)
        y = torch.bmm(F.silu(torch.bmm(rows, self.up)), self.down)
        return (y * weights.t().unsqueeze(-1)).sum(0).view(x.shape) + x


def test_router_and_experts_are_all_readers():
    model = randomize(Routed().double())
    args = (torch.randn(2, 5, 8).double(),)
    gm, report = rewrite(model, args, FoldAffine())
    assert report.applied
    assert_same(model, gm, args)


@pytest.mark.parametrize("bias", [False, True])
def test_grouped_experts(bias):
    """Rows are gathered by expert and multiplied by that expert's matrix."""
    pytest.importorskip("transformers.integrations.moe")

    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8, bias=bias)
            self.up = nn.Parameter(torch.randn(3, 6, 8))

        def forward(self, x, order, ends):
            rows = self.norm(x)[order]
            op = torch.ops.transformers.grouped_mm_fallback
            return op(rows, self.up.transpose(-2, -1), offs=ends)

    model = randomize(Grouped().double())
    x, order = torch.randn(5, 8).double(), torch.tensor([1, 0, 3, 4, 2])
    args = (x, order, torch.tensor([2, 3, 5], dtype=torch.int32))
    gm, report = rewrite(model, args, FoldAffine())
    if bias:  # each row would need the shift of its own expert
        assert not report.applied and "a matrix per row" in report.refused[0][2]
    else:
        assert report.applied
    assert_same(model, gm, args)


def test_one_more_reader_stops_all():
    class OneMore(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.norm(x)
            return self.fc(h) * torch.relu(h)

    gm, report = rewrite(OneMore().eval(), (torch.randn(3, 4),), FoldAffine())
    [(key, name, reason)] = report.refused
    assert (key, name) == ("norm", "fold_affine")
    assert "relu" in reason and "not a linear layer" in reason
    assert ".py:" in reason  # the user's line
    assert folded(gm) == [False] and not any(n.meta.get("weight_program") for n in gm.graph.nodes)


def test_qk_norms_are_refused_with_the_reader_named():
    class QK(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
            self.q_norm, self.k_norm = nn.RMSNorm(4), nn.RMSNorm(4)

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (2, 4)) for f in (self.q, self.k, self.v))
            q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v.transpose(1, 2))

    _, report = rewrite(QK().eval(), (torch.randn(2, 3, 8),), FoldAffine())
    assert not report.applied and len(report.refused) == 2
    assert all("scaled_dot_product_attention" in r for _, _, r in report.refused)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (lambda h: F.pad(h, (0, 0, 1, 1)), "does not keep the shift"),
        (lambda h: h * 3.0, "does not keep the shift"),
        (lambda h: h + 1.0, "not a linear layer"),
        (lambda h: h.sum(0), "does not keep the shift"),
    ],
)
def test_what_the_bias_cannot_pass(path, reason):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(path(self.norm(x)))

    model = randomize(Model().double().eval())
    args = (torch.randn(2, 3, 4).double(),)
    _, report = rewrite(model, args, FoldAffine())
    assert not report.applied and reason in report.refused[0][2]
    if "shift" in reason:  # the gain alone passes
        model.norm = randomize(nn.LayerNorm(4, bias=False).double())
        gm, report = rewrite(model, args, FoldAffine())
        assert report.applied
        assert_same(model, gm, args)


def test_active_dropout_passes_the_gain_only():
    class Model(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(4, bias=bias), nn.Linear(4, 4)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.fc(self.drop(self.norm(x)))

    args = (torch.randn(2, 3, 4).double(),)
    model = randomize(Model(False).double()).train()
    gm, report = rewrite(model, args, FoldAffine(), training=True)
    assert report.applied
    assert_same(model, gm, args)
    _, report = rewrite(randomize(Model(True).double()).train(), args, FoldAffine(), training=True)
    assert not report.applied and "dropout" in report.refused[0][2]


# -- weights with other users


def test_tied_heads_are_copied_only_when_asked():
    model = randomize(Toy(tied=True).double().eval())
    args = model.example()
    gm, report = rewrite(model, args, FoldAffine())
    [(key, _, reason)] = report.refused
    assert key == "norm" and "tied to an embedding" in reason and "copy_tied" in reason
    gm, report = rewrite(model, args, FoldAffine(copy_tied=True))
    assert not report.refused
    assert_same(model, gm, args)  # the embedding still reads the original table


def test_one_linear_behind_two_norms():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(torch.tanh(self.fc(self.a(x))) + 0) * self.fc(self.b(x))

    model = randomize(Shared().double().eval())
    args = (torch.randn(3, 4).double(),)
    gm, report = rewrite(model, args, FoldAffine())
    assert len(report.applied) == 2
    assert_same(model, gm, args)


def test_gain_computed_from_activations_is_refused():
    def modulated(x, w, scale):
        gain = torch.tanh(scale)
        return F.linear(F.layer_norm(x, (4,), gain), w)

    args = (torch.randn(3, 4), torch.randn(2, 4), torch.randn(4))
    gm = passes.capture(modulated, args)
    _, report = PassManager([FoldAffine()]).run(gm)
    assert not report.applied
    assert any("computed from activations" in r for _, _, r in report.refused)


def test_weight_computed_from_activations_is_refused():
    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x, w):
            return F.linear(self.norm(x), torch.tanh(w))

    args = (torch.randn(3, 4), torch.randn(2, 4))
    _, report = rewrite(Hyper(), args, FoldAffine())
    assert not report.applied
    assert "computed from activations" in report.refused[0][2]


def test_dynamic_rows():
    model = randomize(NormAndReaders("layer", ("addmm", "experts", "heads")).double().eval())
    gm, report = rewrite(model, model.example(), FoldAffine())
    assert report.applied
    x = torch.randn(7, 11, 4).double()
    for got, want in zip(gm(x), model(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


# -- cost


def test_declines_in_training_where_it_must_pay():
    model = NormAndReaders("layer", ("linear", "linear"))
    _, report = rewrite(model.train(), model.example(), FoldAffine(), training=True, policy="pays")
    [(_, _, reason)] = report.refused
    assert "does not pay in training" in reason and f"{4 * 3 + 4 * 4} weight elements" in reason
    _, report = rewrite(model.eval(), model.example(), FoldAffine(), policy="pays")
    assert report.applied and report.sites[0].bytes_saved == 2 * 4 * 4
    assert report.sites[0].flops_saved == 2 * model.example()[0].numel()


def test_gains_stored_around_zero_are_expressions():
    model = randomize(nn.Sequential(PlusOne(4), Reader("linear", 4, 3, True)).double())
    args = (torch.randn(5, 4).double(),)
    gm, report = rewrite(model, args, FoldAffine(), training=True)
    assert report.applied and folded(gm) == [True]
    assert_same(model, gm, args)


def test_linear_in_depth():
    class Deep(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(n))
            self.fcs = nn.ModuleList(nn.Linear(4, 4) for _ in range(n))

        def forward(self, x):
            for norm, fc in zip(self.norms, self.fcs, strict=True):
                x = x + fc(norm(x)) @ x.transpose(-1, -2) @ x
            return x

    counts = []
    for n in (20, 80):
        gm = passes.capture(Deep(n), (torch.randn(3, 4),), dynamic=False)
        counts.append(calls(lambda gm=gm: PassManager([FoldAffine()], Context()).run(gm)))
    assert counts[1] < 4.5 * counts[0]
