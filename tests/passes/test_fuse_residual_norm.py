"""FuseResidualNorm: one op, same bits, all near misses refused."""

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from normfuse import passes
from normfuse.passes import Context, PassManager, ir
from normfuse.passes.exact import FuseResidualNorm
from properties import Bounded, assert_idempotent, assert_same, count, rewrite, toys
from stream_models import randomize
from torch import nn

nf = torch.ops.normfuse


def run(model, x, context=None):
    gm = passes.capture(model.eval(), (x,))
    before = gm(x)
    gm, report = PassManager([FuseResidualNorm()], context).run(gm)
    ir.check(gm)
    return gm, report, before


class Residual(nn.Module):
    def __init__(self, norm=nn.LayerNorm, add=lambda a, b: a + b, d=8):
        super().__init__()
        self.a, self.norm, self.fc, self.add = nn.Linear(d, d), norm(d), nn.Linear(d, d), add

    def forward(self, x):
        early = torch.relu(x)
        s = self.add(x, self.a(early))
        gate = torch.sigmoid(s)  # a reader of the sum between the add and the norm
        return s + gate * self.fc(self.norm(s))


def test_identity_is_proved():
    for left, right in FuseResidualNorm.identity():
        assert sympy.simplify(left - right) == sympy.zeros(*left.shape)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_bit_exact_with_the_sum_still_readable(norm, dtype):
    model, x = Residual(norm).to(dtype), torch.randn(3, 8).to(dtype)
    gm, report, before = run(model, x)
    assert report.applied == [("norm", "fuse_residual_norm")]
    assert torch.equal(gm(x), before)
    targets = [n.target for n in gm.graph.nodes]
    assert (nf.add_rms_norm if norm is nn.RMSNorm else nf.add_layer_norm).default in targets
    gm(x).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for g, p in zip(grads, model.parameters(), strict=True):
        tolerance = 1e-2 if dtype.itemsize == 2 else 1e-5
        torch.testing.assert_close(g, p.grad, rtol=tolerance, atol=tolerance)


def test_idempotent():
    gm, _, _ = run(Residual(), torch.randn(3, 8))
    gm, report = PassManager([FuseResidualNorm()]).run(gm)
    assert not report.applied and not report.refused


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (lambda a, b: torch.add(a, b, alpha=2), "alpha"),
        (lambda a, b: b + a.mean(0, keepdim=True), "broadcasts"),
        (lambda a, b: a.double() + b, "promotes"),
    ],
)
def test_near_misses_are_refused(add, reason):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Linear(8, 8), nn.RMSNorm(8, elementwise_affine=False)

        def forward(self, x):
            return self.norm(add(x, self.a(x)))

    x = torch.randn(3, 8)
    gm, report, before = run(Model(), x)
    assert not report.applied
    assert any(reason in r for _, _, r in report.refused)
    assert torch.equal(gm(x), before)


def test_two_norms_of_one_sum_are_left_alone():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.n1, self.n2, self.a = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            s = x + self.a(x)
            return self.n1(s) * self.n2(s)

    _, report, _ = run(Parallel(), torch.randn(3, 8))
    assert not report.applied and len(report.refused) == 2


def test_declines_on_cpu_when_asked_whether_it_pays():
    _, report, _ = run(Residual(), torch.randn(3, 8), Context(policy="pays"))
    assert not report.applied and "Inductor" in report.refused[0][2]


# -- the property


class Sums(nn.Module):
    """Sums of two, written in several ways, before norms whose gain and bias may be missing."""

    def __init__(self, kind, order, d, blocks, read_again, affine):
        super().__init__()
        make = {
            "layer": lambda: nn.LayerNorm(d, elementwise_affine=affine),
            "rms": lambda: nn.RMSNorm(d, eps=1e-6, elementwise_affine=affine),
            "bounded": lambda: Bounded(d, affine),
        }[kind]
        self.norms = nn.ModuleList(make() for _ in range(blocks))
        self.layers = nn.ModuleList(nn.Linear(d, d) for _ in range(blocks))
        self.order, self.read_again = order, read_again

    def forward(self, x):
        for norm, fc in zip(self.norms, self.layers, strict=True):
            y = fc(torch.tanh(x))
            s = x.add(y) if self.order else y + x
            n = norm(s)
            x = torch.sin(n) + s if self.read_again else torch.sin(n)
        return x


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    st.sampled_from(["layer", "rms", "bounded"]),
    st.booleans(),
    st.sampled_from([4, 6]),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(5,), (2, 5), (2, 3, 2)]),
)
def test_same_function_and_gradients(kind, order, d, blocks, read_again, affine, rows):
    model = randomize(Sums(kind, order, d, blocks, read_again, affine).double().eval())
    args = (torch.randn(*rows, d, dtype=torch.float64),)
    gm, report = rewrite(model, args, FuseResidualNorm())
    assert report.applied == [(f"norms.{i}", "fuse_residual_norm") for i in range(blocks)]
    assert count(gm, nf.add_layer_norm, nf.add_rms_norm) == blocks
    assert_same(model, gm, args)
    assert_idempotent(gm, FuseResidualNorm())


@settings(max_examples=12, deadline=None, derandomize=True)
@given(toys())
def test_same_function_and_gradients_on_whole_models(drawn):
    model, args = drawn
    gm, _ = rewrite(model, args, FuseResidualNorm())
    assert_same(model, gm, args)
    assert_idempotent(gm, FuseResidualNorm())
