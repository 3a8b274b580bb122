"""A kernel that cannot be compiled or launched: the formula runs instead, with one warning."""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import interpreter
import pytest
import torch
from interpreter import triton_ops
from normfuse.runtime import autotune_cache, kernel_failures
from normfuse.runtime.triton_ops import gated, launch, linear, norms, symmetric
from triton.runtime.errors import OutOfResources


class Broken:
    """Stands for a kernel that asks for too much shared memory."""

    def __init__(self, kernel, error):
        self.__name__, self.error, self.launches = kernel.__name__, error, 0

    def __getitem__(self, grid):
        def run(**arguments):
            self.launches += 1
            raise self.error

        return run


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv(autotune_cache.ENV, str(tmp_path))
    monkeypatch.setattr(launch, "_failed", {})
    monkeypatch.setattr(launch, "_warned", set())
    monkeypatch.setattr(launch, "_warn_once", interpreter.plain_warn_once)


def inputs(rows=6, d=40, r=8):
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=g)

    x, residual, gain, bias = randn(rows, d), randn(rows, d), randn(d), randn(d)
    return x, residual, gain, bias, randn(r, d) / d**0.5, randn(d, r), randn(rows, 1).abs()


def norm(kind):
    def run(x, residual, gain, bias, down, up, scale):
        return triton_ops.norm(x, gain, bias, 1e-5, kind, torch.float32, torch.bfloat16)

    return run


def add_norm(x, residual, gain, bias, down, up, scale):
    return triton_ops.add_norm(x, residual, gain, bias, 1e-5, "layer", None, None)


def row_rstd(x, residual, gain, bias, down, up, scale):
    return (triton_ops.row_rstd(x, 1e-5), *triton_ops.add_row_rstd(x, residual, 1e-5))


def norm_linear(kind):
    def run(x, residual, gain, bias, down, up, scale):
        pair = (down + 1, gain[:8] * 2, None)
        return triton_ops.norm_linear(
            x, down, gain[:8], None, *pair, 1e-5, kind, "silu", torch.bfloat16
        )

    return run


def scaled_linear(x, residual, gain, bias, down, up, scale):
    return (
        triton_ops.scaled_linear(x, down, scale, gain[:8], None, None, "gelu", None),
        triton_ops.scaled_linear(x, down, scale, None, down * 2, None, "relu", None),
    )


def gated_norm(x, residual, gain, bias, down, up, scale):
    return triton_ops.gated_norm(x, gain, bias, down, up, 1e-5, 2.0, None, None)


def batched_products(x, residual, gain, bias, down, up, scale):
    return (
        triton_ops.symmetric_product(x[None], x[None], None, 2.0, 0.0),
        triton_ops.add_product(x[None], down[None], up[None, : x.shape[0]], 1.0, 0.5),
    )


CASES = {
    "norm rms": (norm("rms"), norms, ["norm_fwd_tile"]),
    "norm layer": (norm("layer"), norms, ["norm_fwd_tile"]),
    "norm crms": (norm("crms"), norms, ["norm_fwd_tile"]),
    "norm, backward": (norm("layer"), norms, ["norm_bwd_tile"]),
    "norm crms, backward": (norm("crms"), norms, ["norm_bwd_tile"]),
    "add_norm": (add_norm, norms, ["norm_fwd_tile"]),
    "add_norm, both": (add_norm, norms, ["norm_fwd_tile", "norm_bwd_tile"]),
    "row_rstd": (row_rstd, norms, ["norm_fwd_tile"]),
    "norm_linear rms": (norm_linear("rms"), linear, ["norm_linear_kernel"]),
    "norm_linear layer": (norm_linear("layer"), linear, ["norm_linear_kernel"]),
    "norm_linear crms": (norm_linear("crms"), linear, ["norm_linear_kernel"]),
    "scaled_linear": (scaled_linear, linear, ["norm_linear_kernel"]),
    "batched products": (batched_products, symmetric, ["batched_product"]),
    "gated_norm": (gated_norm, gated, ["gated_fwd"]),
    "gated_norm, backward": (gated_norm, gated, ["gated_bwd_rows"]),
}


def run(f):
    leaves = [t.requires_grad_() for t in inputs()]
    out = f(*leaves)
    used = [y for y in out if y.requires_grad]
    dys = [torch.linspace(0.5, 1.5, y.numel()).to(y.dtype).reshape(y.shape) for y in used]
    return [*out, *torch.autograd.grad(used, leaves, dys, allow_unused=True)]


def breaking(monkeypatch, module, names, error):
    broken = []
    for name in names:
        broken.append(Broken(getattr(module.kernels, name), error))
        monkeypatch.setattr(module.kernels, name, broken[-1])
    return broken


@pytest.mark.parametrize("case", CASES)
def test_formula_instead_with_one_warning(case, monkeypatch):
    f, module, names = CASES[case]
    good = run(f)
    broken = breaking(monkeypatch, module, names, OutOfResources(300_000, 232_448, "shared memory"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = run(f)
        launches = [b.launches for b in broken]
        second = run(f)
    assert all(launches), "the broken kernel was not reached"
    assert [b.launches for b in broken] == launches, "tried again although it cannot work"
    ours = [str(w.message) for w in caught if "normfuse" in str(w.message)]
    assert len(ours) == len({m.split(" runs ")[0] for m in ours}), ours
    assert all("OutOfResources" in m and names[0].split("_")[0] in m for m in ours), ours
    assert 1 <= len(ours) <= 2
    kept = kernel_failures.known()
    assert {e["kernel"] for e in kept} == set(names)
    assert all(e["reason"].startswith("out of resource") for e in kept), kept
    assert triton_ops.failures() and all("shared memory" in t for t in triton_ops.failures())
    for a, b, c in zip(good, first, second, strict=True):
        assert (a is None) == (b is None)
        if a is None:
            continue
        assert b.dtype == a.dtype and b.shape == a.shape and b.is_contiguous() == a.is_contiguous()
        tight = 2e-2 if a.dtype == torch.bfloat16 or "norm_linear" in case else 1e-4
        torch.testing.assert_close(b, a, rtol=tight, atol=tight)
        assert torch.equal(b, c)


def test_another_configuration_is_still_tried(monkeypatch):
    x, _, gain, *_ = inputs()
    (broken,) = breaking(monkeypatch, norms, ["norm_fwd_tile"], OutOfResources(2, 1, "registers"))
    with pytest.warns(UserWarning, match="norm runs as plain PyTorch"):
        triton_ops.norm(x, gain, None, 1e-5, "rms", None, None)
    triton_ops.norm(torch.randn(3, 500), None, None, 1e-5, "rms", None, None)
    assert broken.launches == 2


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()], ids=["oom", "^C"]
)
def test_what_is_not_the_kernels_fault_is_raised(monkeypatch, error):
    x = inputs()[0]
    breaking(monkeypatch, norms, ["norm_fwd_tile"], error)
    with pytest.raises(type(error)):
        triton_ops.norm(x, None, None, 1e-5, "rms", None, None)
    assert not triton_ops.failures()


def test_whoever_requires_a_kernel_gets_it_or_an_error(monkeypatch):
    """Timings and tuning: a formula must not be taken for a kernel, in backward neither."""
    x, gain = inputs()[0].requires_grad_(), torch.ones(40)
    y = triton_ops.norm(x, gain, None, 1e-5, "rms", None, None)[0]
    breaking(
        monkeypatch, norms, ["norm_fwd_tile", "norm_bwd_tile"], OutOfResources(2, 1, "registers")
    )
    with triton_ops.required():
        with pytest.raises(triton_ops.KernelFailed, match="norm_fwd_tile"):
            triton_ops.norm(x, gain, None, 1e-5, "rms", None, None)
        with pytest.raises(triton_ops.KernelFailed, match="norm_bwd_tile"):
            y.sum().backward()
    assert not kernel_failures.known()
    with pytest.warns(UserWarning, match="norm runs as plain PyTorch"):
        triton_ops.norm(x, gain, None, 1e-5, "rms", None, None)
