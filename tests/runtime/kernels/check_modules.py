"""Modules where kernels run: as on a GPU, by the same calls, here through the interpreter."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import interpreter  # noqa: F401
import pytest
import torch
from normfuse.runtime import modules
from normfuse.runtime.lower_kernels import kernels
from normfuse.runtime.modules import GatedRMSNorm, LayerNorm, NormLinear, RMSNorm

D = 24


@pytest.fixture
def asked(monkeypatch):
    """Answers as on a GPU; notes what is called."""
    names = []

    class Ops:
        def __getattr__(self, name):
            names.append(name)
            return getattr(kernels(), name)

    def use(on):
        answer = (lambda *tensors: Ops()) if on else (lambda *tensors: None)
        monkeypatch.setattr(modules, "_kernels_for", answer)
        return names

    return use


def randomized(module):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / (D**0.5 if p.dim() > 1 else 2) + 0.1)
    return module


CASES = {
    "RMSNorm": (lambda t: RMSNorm(D, dtype=t), "norm"),
    "RMSNorm, bare": (lambda t: RMSNorm(D, gain=False, eps=1e-3, dtype=t), "norm"),
    "LayerNorm": (lambda t: LayerNorm(D, dtype=t), "norm"),
    "LayerNorm, no bias": (lambda t: LayerNorm(D, bias=False, dtype=t), "norm"),
    "GatedRMSNorm": (lambda t: GatedRMSNorm(D, 4, bias=True, dtype=t), "gated_norm"),
    "NormLinear": (lambda t: NormLinear(D, 6, activation="gelu", dtype=t), "norm_linear"),
    "NormLinear, GLU": (
        lambda t: NormLinear(D, 6, activation="silu", glu=True, center=True, dtype=t),
        "norm_linear",
    ),
    "NormLinear, GLU without bias": (
        lambda t: NormLinear(D, 6, False, glu=True, dtype=t),
        "norm_linear",
    ),
}


def results(module, x, residual=None):
    leaves = [t.clone().requires_grad_() for t in (x, residual) if t is not None]
    out = module(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    loss = sum((y.float() * torch.linspace(1, 2, y.shape[-1])).square().sum() for y in out)
    return [*out, *torch.autograd.grad(loss, [*leaves, *module.parameters()])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_same_as_the_formula(case, dtype, asked):
    make, kernel = CASES[case]
    module = randomized(make(dtype))
    x = torch.randn(2, 5, D).to(dtype)
    inputs = [(x,), (x, torch.randn(2, 5, D).to(dtype))] if kernel == "norm" else [(x,)]
    for args in inputs:
        names = asked(True)
        names.clear()
        ours = results(module, *args)
        assert names == [kernel if len(args) == 1 else "add_norm"]
        asked(False)
        tight = 1e-4 if dtype == torch.float32 else 5e-2
        for a, b in zip(ours, results(module, *args), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            scale = b.abs().max().item()
            torch.testing.assert_close(a, b, rtol=tight, atol=tight * scale)


def test_residual_of_another_dtype(asked):
    module = randomized(RMSNorm(D, dtype=torch.bfloat16))
    x, residual = torch.randn(5, D).bfloat16(), torch.randn(5, D)
    asked(True)
    ours = results(module, x, residual)
    asked(False)
    for a, b in zip(ours, results(module, x, residual), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
