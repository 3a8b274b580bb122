"""CRMSNorm: the identity, values and gradients on generated models, refusals."""

import copy

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from normfuse import passes
from normfuse.passes import ir
from normfuse.passes.contract import Context
from normfuse.passes.exact.compress_zero_mean import CompressZeroMean
from normfuse.passes.exact.fold_affine import FoldAffine
from normfuse.passes.exact.remove_mean import RemoveMean
from normfuse.passes.manager import PassManager
from properties import Bounded
from stream_models import EncoderDecoder, Toy, randomize
from torch import nn

nf = torch.ops.normfuse
CRMS, RMS = nf.crms_norm.default, nf.rms_norm.default
ALL = (FoldAffine, RemoveMean, CompressZeroMean)


def rewrite(model, args, steps=ALL, **context):
    gm = passes.capture(model, args)
    steps = [s(copy_tied=True) if s is FoldAffine else s() for s in steps]
    return PassManager(steps, Context(**context)).run(gm)


def count(gm, target):
    return sum(n.op == "call_function" and n.target is target for n in gm.graph.nodes)


def mine(report):
    return {r for _, name, r in report.refused if name == "compress_zero_mean"}


def run(f, model, args):
    args = tuple(a.clone().requires_grad_(a.is_floating_point()) for a in args)
    model.zero_grad()
    torch.manual_seed(0)
    out = f(*args)
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).cos().reshape(out.shape)
    (out * weight).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.detach(), grads | {str(i): a.grad for i, a in enumerate(args) if a.grad is not None}


def assert_same(model, gm, args):
    (want, want_grads), (got, got_grads) = run(model, model, args), run(gm, model, args)
    assert (got - want).abs().max() <= 1e-10 * want.abs().max()
    assert want_grads.keys() == got_grads.keys()
    scale = max(g.abs().max() for g in want_grads.values())
    for name, w in want_grads.items():
        assert (got_grads[name] - w).abs().max() <= 1e-10 * scale, name


def test_identity():
    for left, right in CompressZeroMean.identity():
        difference = (left - right).applyfunc(lambda e: sympy.simplify(sympy.expand(e)))
        assert difference == sympy.zeros(*left.shape)


@st.composite
def toys(draw):
    entry = draw(st.sampled_from(["tokens", "vectors", "patches"]))
    model = Toy(
        d=draw(st.sampled_from([4, 9])) if entry == "vectors" else 8,
        styles=draw(st.sampled_from([("pre",), ("parallel", "pre"), ("pre", "parallel")])),
        entry=entry,
        affine=draw(st.booleans()),
        bias=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.3])),
        layer_scale=draw(st.booleans()),
        tied=entry == "tokens" and draw(st.booleans()),
    )
    rank = draw(st.integers(2, 4))
    return randomize(model.double(), draw(st.integers(0, 99))), rank, draw(st.booleans())


@settings(max_examples=8, deadline=None, derandomize=True)
@given(toys())
def test_same_function_and_gradients(case):
    model, rank, training = case
    args = model.train(training).example(rank=rank)
    gm, report = rewrite(model, args, training=training)
    norms = sum(isinstance(m, nn.LayerNorm) for m in model.modules())
    assert count(gm, CRMS) == norms and not mine(report)
    # nothing of the stream is left in full width
    width = model.norm.normalized_shape[0]
    for norm in ir.norm_nodes(gm):
        assert ir.shape(norm)[-1] == ir.shape(norm.args[0])[-1] == width - 1
    assert_same(model, gm, args)
    code = gm.code
    gm, again = PassManager([CompressZeroMean()]).run(gm)
    assert not again.applied and gm.code == code


def test_encoder_decoder_compresses_both_streams():
    model = randomize(EncoderDecoder().double()).eval()
    gm, report = rewrite(model, model.example())
    assert count(gm, CRMS) == 4 and not mine(report)
    assert_same(model, gm, model.example())


def test_fixed_sizes_in_views_are_restated():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Linear(3, 8), nn.LayerNorm(8, elementwise_affine=False)
            self.weight = nn.Parameter(torch.randn(8, 5))
            self.bias = nn.Parameter(torch.randn(5))

        def forward(self, x):
            h = self.embed(x).view(-1, 8).view(x.shape[0], 4, 8).expand(x.shape[0], 4, 8)
            return torch.addmm(self.bias, self.norm(h).view(-1, 8), self.weight)

    model = randomize(Views().double())
    args = (torch.randn(2, 4, 3).double(),)
    gm, report = rewrite(model, args)
    assert count(gm, CRMS) == 1, report.refused
    assert_same(model, gm, args)


class Between(nn.Module):
    """One norm whose output goes to ``reader``."""

    def __init__(self, reader, affine=False):
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 8), nn.LayerNorm(8, elementwise_affine=affine)
        self.rms = nn.RMSNorm(8, elementwise_affine=False)
        self.out, self.reader = nn.Linear(8, 3), reader

    def forward(self, x):
        return self.reader(self, self.embed(x))


@pytest.mark.parametrize(
    ("reader", "reason"),
    [
        (lambda m, x: m.norm(x), "needs all coordinates"),
        (lambda m, x: m.out(m.norm(x).tanh()), "needs all coordinates"),
        (lambda m, x: m.norm(x) + m.norm(x[:1]), "needs all coordinates"),
    ],
)
def test_non_linear_readers_of_the_norm(reader, reason):
    model = randomize(Between(reader).double())
    args = (torch.randn(2, 5).double(),)
    gm, report = rewrite(model, args)
    assert count(gm, CRMS) == 0
    assert all(reason in r for r in mine(report)) and mine(report)
    torch.testing.assert_close(gm(*args), model(*args))


def test_streams_that_are_not_zero_mean():
    model = randomize(Between(lambda m, x: m.out(m.rms(x)))).eval()
    _, report = rewrite(model, (torch.randn(2, 5),))
    assert any("not zero-mean by construction" in r for r in mine(report))


def test_a_bounded_statistic():
    model = randomize(Between(lambda m, x: m.out(Bounded(8, affine=False)(m.norm(x))))).eval()
    _, report = rewrite(model, (torch.randn(2, 5),), steps=(CompressZeroMean,))
    assert any("bounds its statistic from below" in r for r in mine(report))


def test_unfolded_gains():
    model = randomize(Toy()).eval()
    gm, report = rewrite(model, model.example(), steps=(RemoveMean, CompressZeroMean))
    assert count(gm, CRMS) == 0 and all("FoldAffine" in r for r in mine(report))


@pytest.mark.parametrize("tap", [lambda x: x, lambda x: x.exp(), lambda x: x[:, :3].sum()])
def test_other_readers_need_the_full_width(tap):
    class Tapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.LayerNorm(8, elementwise_affine=False)
            self.norm, self.out = nn.RMSNorm(8, elementwise_affine=False), nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x)
            return self.out(self.norm(x)), tap(x)

    gm, report = rewrite(Tapped(), (torch.randn(2, 8),), steps=(CompressZeroMean,))
    assert count(gm, CRMS) == 0
    assert any("the stream itself" in r for r in mine(report))
    assert gm(torch.ones(2, 8))[0].shape == (2, 3)


def test_a_stream_centered_by_an_op_is_sliced_behind_it():
    model = randomize(Between(lambda m, x: (m.out(m.norm(x)), m.out(m.rms(x)))).double())
    args = (torch.randn(2, 5).double(),)
    gm, report = rewrite(model, args)
    # the LayerNorm's side is centered and compressed, the RMSNorm's side sees what it saw
    assert count(gm, CRMS) == 1 and count(gm, RMS) == 1 and mine(report)
    for got, want in zip(gm(*args), model(*args), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("width", "pays"), [(16, False), (17, True), (48, False), (33, True)])
def test_alignment_decides_when_it_must_pay(width, pays):
    class Mix(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(5, width)
            self.norm = nn.LayerNorm(width, elementwise_affine=False)
            self.out = nn.Linear(width, 3)

        def forward(self, x):
            return self.out(self.norm(self.embed(x)))

    args = (torch.randn(4, 5),)
    gm, report = rewrite(randomize(Mix()), args, policy="pays")
    assert count(gm, CRMS) == pays
    if not pays:
        (reason,) = mine(report)
        assert f"{width - 1} is not a multiple of 16" in reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_in_the_working_dtype(dtype):
    torch.manual_seed(0)
    model = randomize(Toy(d=33, styles=("pre",) * 2, entry="vectors"), scale=0.2).eval().to(dtype)
    (x,) = model.example()
    x = x.repeat(30, 1, 1)
    exact = copy.deepcopy(model).double()(x.double())
    gm, _ = rewrite(model, (x,))
    assert count(gm, CRMS) == 5

    def error(y):
        return ((y.double() - exact).abs().max() / exact.abs().max()).item()

    assert error(gm(x)) <= 2 * error(model(x)) + 1e-7
