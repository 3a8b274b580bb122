"""Simulated quantization: rounding grid, granularity, which layers, against a module-level oracle."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Transformer, ids, trained_like
from normfuse import NormfuseError, passes
from normfuse.runtime.quantize_sim import fake_quantize, quantize_linears
from torch import nn


@given(st.integers(2, 9), st.integers(0, 99), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_rounding(bits, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 33, generator=g, dtype=dtype) * 10 ** (seed % 5 - 2)
    q = fake_quantize(x, bits, (-1,))
    top = 2 ** (bits - 1) - 1
    step = x.abs().amax(-1, keepdim=True) / top
    levels = q / step
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert levels.abs().max() <= top + 1e-3
    assert ((q - x).abs() <= step * 0.5001).all()
    torch.testing.assert_close(fake_quantize(q, bits, (-1,)), q)  # already on the grid
    torch.testing.assert_close(q.abs().amax(-1), x.abs().amax(-1))


def test_rows_are_independent_and_edge_values():
    x = torch.tensor([[1000.0, 1.0], [1.0, 0.6], [0.0, 0.0]])
    q = fake_quantize(x, 4, (-1,))
    assert q[0].tolist() == [1000.0, 0.0]  # the outlier drowns its neighbour
    assert q[1, 1] == pytest.approx(4 / 7)
    assert q[2].tolist() == [0.0, 0.0]
    half = torch.tensor([[60000.0, 3.0]], dtype=torch.float16)
    assert fake_quantize(half, 8, (-1,)).isfinite().all()
    for bits in (1, 17, 4.0):
        with pytest.raises(NormfuseError, match="bits"):
            fake_quantize(x, bits, (-1,))


class Oracle(nn.Linear):
    """nn.Linear with both operands rounded; the same parameters."""

    bits = (4, 4)

    def forward(self, x):
        weight = fake_quantize(self.weight, self.bits[0], (-1,))
        return F.linear(fake_quantize(x, self.bits[1], (-1,)), weight, self.bias)


@pytest.mark.parametrize("bits", [(4, 4), (8, 8), (4, 8)])
def test_graph_equals_quantized_modules(bits):
    torch.manual_seed(0)
    model = trained_like(Transformer(norm=nn.RMSNorm)).eval()
    x = ids()
    gm = passes.capture(model, (x,))
    quantized = quantize_linears(gm, *bits)
    assert len(quantized.meta["quantized"]) == 13
    before = gm(x)["logits"]
    oracle = trained_like(Transformer(norm=nn.RMSNorm)).eval()
    oracle.load_state_dict(model.state_dict())
    for module in oracle.modules():
        if type(module) is nn.Linear:
            module.__class__ = Oracle
            module.bits = bits
    torch.testing.assert_close(quantized(x)["logits"], oracle(x)["logits"], rtol=1e-4, atol=1e-5)
    assert torch.equal(gm(x)["logits"], before)  # the original graph is untouched
    assert (quantized(x)["logits"] - before).abs().max() > 1e-4


def test_more_bits_hurt_less():
    torch.manual_seed(0)
    model = trained_like(Transformer(norm=nn.RMSNorm)).eval()
    x = ids(4, 12)
    gm = passes.capture(model, (x,))
    exact = gm(x)["logits"]
    errors = [(quantize_linears(gm, b, b)(x)["logits"] - exact).norm() for b in (3, 4, 8, 12)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01 * errors[0]
    assert torch.equal(quantize_linears(gm, None, None)(x)["logits"], exact)


def test_skip_and_convolutions():
    model = Transformer(norm=nn.RMSNorm).eval()
    gm = passes.capture(model, (ids(),))
    names = quantize_linears(gm, skip=[r"^head$", r"\.q$"]).meta["quantized"]
    assert "head" not in names and "blocks.0.q" not in names and "blocks.0.k" in names
    conv = nn.Conv2d(3, 6, 3, groups=3).eval()
    x = torch.randn(2, 3, 5, 5)
    out = quantize_linears(passes.capture(conv, (x,)), 4, 4)(x)
    weight = fake_quantize(conv.weight, 4, (1, 2, 3))
    expected = F.conv2d(fake_quantize(x, 4, (1,)), weight, conv.bias, groups=3)
    torch.testing.assert_close(out, expected)
    with pytest.raises(NormfuseError, match="no linear layer"):
        quantize_linears(passes.capture(nn.ReLU(), (x,)))
