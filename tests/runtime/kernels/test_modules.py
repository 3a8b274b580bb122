"""Modules: what they compute without a GPU, against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from normfuse.runtime import modules
from normfuse.runtime.modules import GatedRMSNorm, LayerNorm, NormLinear, RMSNorm
from torch import nn

X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ours, theirs", [(RMSNorm, nn.RMSNorm), (LayerNorm, nn.LayerNorm)])
def test_norms_equal_torch(ours, theirs, dtype):
    a, b = ours(24, eps=1e-5, dtype=dtype), theirs(24, eps=1e-5, dtype=dtype)
    with torch.no_grad():
        a.weight.uniform_(0.5, 2)
    b.load_state_dict(a.state_dict())
    torch.testing.assert_close(a(X.to(dtype)), b(X.to(dtype)))
    y, stream = a(X.to(dtype), X.to(dtype))
    assert torch.equal(stream, X.to(dtype) * 2)
    torch.testing.assert_close(y, b(stream))


def test_gated_norm_starts_as_the_norm():
    g, plain = GatedRMSNorm(24, rank=4), RMSNorm(24)
    assert torch.equal(g(X), plain(X))
    g(X).square().sum().backward()
    assert g.up.grad.abs().sum() > 0


def test_autocast_decides_the_products_dtype(monkeypatch):
    """Kernels are not asked where autocast is on: they would multiply in the input's dtype."""

    class Kernels:
        def norm_linear(self, *args):
            return ("kernel",)

    monkeypatch.setattr(modules, "_kernels_for", lambda *tensors: Kernels())
    m = NormLinear(24, 6)
    assert m(X) == "kernel"
    with torch.autocast("cpu", torch.bfloat16):
        assert m(X).dtype == torch.bfloat16


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_norm_linear(center, glu):
    m = NormLinear(24, 6, activation="silu", glu=glu, center=center, dtype=torch.float64)
    x = X.double()
    h = F.layer_norm(x, (24,), eps=1e-6) if center else F.rms_norm(x, (24,), eps=1e-6)
    z = F.linear(h, m.weight, m.bias)
    truth = F.silu(z) if not glu else F.silu(z[..., :6]) * z[..., 6:]
    torch.testing.assert_close(m(x), truth)
    assert "silu" in repr(m)
    with pytest.raises(ValueError, match="gelu_tanh"):
        NormLinear(4, 4, activation="tanh")
