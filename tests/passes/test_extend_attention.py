"""Gated and affine-scaled attention: identity at insertion, formula, masks, updates, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from extend_models import Attention, capture_, run_pass, stirred
from normfuse import NormfuseError, passes
from normfuse.passes import Context
from torch import nn

CASES = [
    {},
    {"mask": "bool"},
    {"mask": "none"},
    {"groups": 2},
    {"groups": 2, "mask": "bool"},
    {"fused": True, "rope": True},
]
PASSES = [
    ("InsertGatedAttention", {"per": "head"}),
    ("InsertGatedAttention", {"per": "element"}),
    ("AffineScaledAttention", {}),
]


@pytest.mark.parametrize("name, options", PASSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_identity_at_insertion_is_bit_exact(name, options, dtype):
    for case in CASES[:1] if dtype != torch.bfloat16 else CASES:
        model = stirred(Attention(**case)).to(dtype)
        x = torch.randn(2, 7, 16).to(dtype) * 3
        gm = capture_(model, x)
        before = gm(x)
        for training in (False, True):
            again = capture_(model, x)
            report = run_pass(again, name, Context(training=training), **options)
            assert len(report.applied) == 1 and not report.refused, case
            assert torch.equal(again(x), before) and before.isfinite().all(), case


def parts(model, x):
    """Normed input, softmax weights and values per head, in plain torch."""
    h = model.norm(x)
    q, k, v = (f(h).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (model.q, model.k, model.v))
    k, v = (t.repeat_interleave(model.groups, 1) for t in (k, v))
    n = x.shape[1]
    keep = torch.ones(n, n, dtype=torch.bool).tril()
    if model.mask == "none":
        keep = torch.ones(n, n, dtype=torch.bool)
    logits = q @ k.transpose(-1, -2) / 2
    return h, logits.masked_fill(~keep, -math.inf).softmax(-1), v, keep


@pytest.mark.parametrize("case", CASES[:5])
@pytest.mark.parametrize("name, options", PASSES)
def test_trained_values_and_gradients_follow_the_formula(case, name, options):
    torch.manual_seed(0)
    model = stirred(Attention(**case)).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    gm = capture_(model, x)
    run_pass(gm, name, **options)
    new = gm.meta["new_parameters"]
    with torch.no_grad():
        for p in new.values():
            p.add_(torch.randn_like(p) * 0.5)
    h, weights, v, keep = parts(model, x)
    if name == "InsertGatedAttention":
        assert list(new) == ["attention_gate"]
        gate = 2 * torch.sigmoid(h @ new["attention_gate"].T)
        split = gate.unflatten(-1, (4, -1)).transpose(1, 2)
        y = (weights @ v) * split
    else:
        w, b, mean = (new[f"attention_affine_{n}"] for n in ("weight", "bias", "mean"))
        alpha = (0.1 * (h @ w.T + b) + 0.5).clamp(0, 1).transpose(1, 2)[..., None]
        beta = (mean[:, None, None] - alpha) / x.shape[1]
        y = (alpha * weights + beta * keep) @ v
        assert 0 < float(((alpha > 0) & (alpha < 1)).double().mean()) < 1
    expected = x + model.out(y.transpose(1, 2).flatten(2))
    actual = gm(x)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    inputs = [x, model.v.weight, *(p for p in new.values() if p.requires_grad)]
    factor = torch.randn_like(expected)
    for a, e in zip(
        torch.autograd.grad((actual * factor).sum(), inputs),
        torch.autograd.grad((expected * factor).sum(), inputs),
        strict=True,
    ):
        assert e.abs().sum() > 0
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


def test_gradients_are_alive_at_insertion():
    for name, options in PASSES:
        gm = capture_(stirred(Attention()), torch.randn(2, 7, 16))
        run_pass(gm, name, **options)
        gm(torch.randn(2, 7, 16)).square().sum().backward()
        grads = {n: p.grad for n, p in gm.meta["new_parameters"].items() if p.requires_grad}
        assert all(g is not None and g.abs().sum() > 0 for g in grads.values())


def test_running_mean_moves_in_training_graphs_only():
    torch.manual_seed(0)
    model = stirred(Attention()).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    for training in (True, False):
        gm = capture_(model, x)
        run_pass(gm, "AffineScaledAttention", Context(training=training), rho=0.75)
        p = gm.meta["new_parameters"]
        mean = p["attention_affine_mean"]
        assert not mean.requires_grad and torch.equal(mean, torch.ones(4).double())
        gm(x).sum().backward()
        assert torch.equal(mean, torch.ones(4).double())  # α is 1 at insertion
        with torch.no_grad():
            p["attention_affine_bias"].fill_(1.0)
            p["attention_affine_weight"].normal_()
        alpha = (0.1 * (model.norm(x) @ p["attention_affine_weight"].T + 1) + 0.5).clamp(0, 1)
        gm(x).sum().backward()
        moved = 0.75 + 0.25 * alpha.mean((0, 1))
        expected = moved if training else torch.ones(4).double()
        torch.testing.assert_close(mean.detach(), expected.detach())
    gm = capture_(model, x)
    run_pass(gm, "AffineScaledAttention", Context(training=True), update=False)
    assert "copy_" not in gm.code


def test_gradients_read_the_mean_as_it_was_where_the_backward_is_compiled():
    """What AOTAutograd recomputes, it would recompute from the mean as it is after the step."""
    torch.manual_seed(0)
    model = stirred(Attention()).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    gm = capture_(model, x)
    run_pass(gm, "AffineScaledAttention", Context(training=True), rho=0.5)
    p = gm.meta["new_parameters"]
    with torch.no_grad():
        p["attention_affine_bias"].fill_(1.0)
        p["attention_affine_weight"].normal_()
    torch._dynamo.reset()
    grads = []
    for f in (gm, torch.compile(gm, backend="aot_eager")):
        p["attention_affine_mean"].data.fill_(1.0)
        gm.zero_grad()
        f(x).square().sum().backward()
        assert not torch.equal(p["attention_affine_mean"], torch.ones(4).double())
        grads.append({n: q.grad.clone() for n, q in gm.named_parameters() if q.grad is not None})
    torch.testing.assert_close(grads[1], grads[0])


def test_second_run_and_sites():
    for name, options in PASSES:
        gm = capture_(stirred(Attention()), torch.randn(2, 7, 16))
        assert run_pass(gm, name, **options).applied
        code = gm.code
        report = run_pass(gm, name, **options)
        assert not report.applied and "extended already" in report.refused[0][2]
        assert gm.code == code
    gm = capture_(nn.Sequential(Attention(), Attention()), torch.randn(2, 7, 16))
    report = run_pass(gm, "InsertGatedAttention", sites=["1.*"])
    assert [k for k, _ in report.applied] == ["1.attention"]
    assert list(gm.meta["new_parameters"]) == ["1.attention_gate"]


def test_a_layer_called_twice_has_one_gate():
    class Looped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Attention()

        def forward(self, x):
            return self.layer(self.layer(x))

    x = torch.randn(2, 7, 16)
    gm = capture_(stirred(Looped()), x)
    before = gm(x)
    report = run_pass(gm, "InsertGatedAttention")
    assert len(report.applied) == 2
    assert list(gm.meta["new_parameters"]) == ["layer.attention_gate"]
    assert torch.equal(gm(x), before)


def test_sizes_stay_symbolic():
    model = stirred(Attention(groups=2))
    for name, options in PASSES:
        gm = capture_(model, torch.randn(2, 7, 16), dynamic=True)
        run_pass(gm, name, **options)
        x = torch.randn(3, 11, 16)
        torch.testing.assert_close(gm(x), model(x))


def test_flattened_projections():
    """Layers that flatten batch and tokens before an addmm (Conv1D) still give a gate its input."""

    class Flat(nn.Module):
        def __init__(self, d=16):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(d, 3 * d)), nn.Parameter(torch.randn(3 * d))

        def forward(self, x):
            n = x.shape
            h = torch.addmm(self.b, x.view(-1, n[-1]), self.w).view(n[0], n[1], 3 * n[-1])
            q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in h.chunk(3, -1))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    x = torch.randn(2, 5, 16)
    gm = capture_(Flat(), x)
    before = gm(x)
    assert run_pass(gm, "InsertGatedAttention").applied
    assert torch.equal(gm(x), before)


class Bare(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


def test_refusals():
    q = torch.randn(2, 4, 5, 8)
    report = run_pass(capture_(Bare(), q, q, q), "InsertGatedAttention")
    assert "queries come from no linear layer" in report.refused[0][2]
    report = run_pass(
        capture_(stirred(Attention(mask="additive")), torch.randn(2, 7, 16)),
        "AffineScaledAttention",
    )
    assert "mask is additive" in report.refused[0][2]

    class Dropping(Attention):
        def forward(self, x):
            q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)

    gm = capture_(Dropping(), torch.randn(2, 7, 16))
    report = run_pass(gm, "AffineScaledAttention")
    assert "drops weights at random" in report.refused[0][2]
    context = Context(options={"dynamo": {"on": True}})
    report = run_pass(capture_(Attention(), torch.randn(2, 7, 16)), "InsertGatedAttention", context)
    assert "nowhere to keep" in report.refused[0][2]
    with pytest.raises(NormfuseError, match="per must be"):
        passes.InsertGatedAttention(per="token")
    with pytest.raises(NormfuseError, match="rho must lie"):
        passes.AffineScaledAttention(rho=2)
