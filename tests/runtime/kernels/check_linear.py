"""Norm and linear in one product, and products scaled per row."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from interpreter import DTYPES, check, triton_ops
from normfuse.passes import ops
from normfuse.runtime.kernels import plans

ACTS = {
    "identity": lambda z: z,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}


def make(m, n, k, dtype, mean=0.0, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = ((torch.randn(m, k, generator=g) + mean) * scale).to(dtype)
    w = (torch.randn(n, k, generator=g) / max(k, 1) ** 0.5).to(dtype)
    return x, w, torch.randn(n, generator=g).to(dtype)


def reference(x, w, b, center, act, glu, eps=1e-5):
    """Norm, then linear, then activation, as eager PyTorch rounds them."""
    native = {"stat_dtype": torch.float32, "norm_dtype": torch.float32, "out_dtype": x.dtype}
    native = {} if x.dtype == torch.float64 else native
    h = (ops.layer_norm if center else ops.rms_norm)(x, [-1], eps=eps, **native)
    z = F.linear(h, w, b)
    if not glu:
        return ACTS[act](z)
    gate, up = z.chunk(2, -1)
    return ACTS[act](gate) * up


def compare(x, w, b, center=False, act="identity", glu=False, gradients=True):
    results = []
    for kind in ("ours", "eager", "truth"):
        args = [
            None if t is None else (t.double() if kind == "truth" else t.clone()).requires_grad_()
            for t in (x, w, b)
        ]
        if kind == "ours":
            y, stats = triton_ops.norm_linear(
                args[0], args[1], None, args[2], 1e-5, center, act, glu, None
            )
            rows = x.double().reshape(-1, x.shape[-1])
            rows = rows - rows.mean(-1, keepdim=True) if center else rows
            rstd = torch.rsqrt(rows.square().mean(-1) + 1e-5)
            tight = 1e-5 if x.dtype == torch.float32 else 1e-4
            torch.testing.assert_close(stats[0].double(), rstd, rtol=tight, atol=0)
        else:
            y = reference(*args, center, act, glu)
        grads = ()
        if gradients:
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
            grads = torch.autograd.grad(y, [t for t in args if t is not None], dy)
        results.append([y, *grads])
    for ours, eager, truth in zip(*results, strict=True):
        slack = 2e-6 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps / 2
        check(ours.detach(), eager.detach(), truth.detach(), slack=slack)


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 80),
    k=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    center=st.booleans(),
    bias=st.booleans(),
    act=st.sampled_from(list(ACTS)),
    scale=st.sampled_from([1e-2, 1.0, 1e2]),
)
def test_any_shape(m, n, k, dtype, center, bias, act, scale):
    if dtype == torch.float16:
        scale = (
            1.0  # un-normalized products overflow float16 only in the result, yet eager's inputs do
        )
    if center and k < 4:
        k = 4  # one or two centered elements: the result is all rounding
    x, w, b = make(m, n, k, dtype, scale=scale)
    compare(x, w, b if bias else None, center, act)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_gated_pairs(dtype, act):
    x, w, b = make(5, 2 * 33, 100, dtype)
    compare(x, w, b, act=act, glu=True)
    compare(x, w, None, act=act, glu=True)


def test_gated_layer_norm():
    x, w, b = make(5, 2 * 33, 100, torch.float32, mean=0.5)
    compare(x, w, b, center=True, act="silu", glu=True)


@pytest.mark.parametrize("glu", [False, True])
def test_split_k(glu):
    """A few rows, long K: partial products and partial Σx² summed by a second kernel."""
    plan = plans.gemm(3, 70, 2100, 4, 132, dual=glu)
    assert plan.splits > 1
    x, w, b = make(3, 140 if glu else 70, 2100, torch.float32)
    compare(x, w, b, act="silu" if glu else "gelu_tanh", glu=glu, gradients=False)


@pytest.mark.parametrize("regime, m", [("medium", 70), ("large", 520)])
def test_more_rows(regime, m):
    assert plans.gemm(m, 96, 64, 4, 132).regime == regime
    x, w, b = make(m, 96, 64, torch.float32)
    compare(x, w, b, gradients=False)
    compare(x, w, b, center=True, gradients=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [3.0, 7.0, 30.0, 300.0])
def test_cancellation_is_caught(dtype, mean):
    """Means far beyond the deviation: the tile is computed again, centered first."""
    x, w, b = make(6, 24, 200, dtype, mean=mean)
    if dtype != torch.float32 and mean > 30:
        x[:, ::2] += 2 * torch.finfo(dtype).eps * mean * 8  # keep a deviation the dtype can hold
    compare(x, w, b, center=True, gradients=False)


def test_cancellation_without_the_guard_is_bad(monkeypatch):
    """The guard does something: switched off, the same case loses its digits."""
    x, w, b = make(6, 24, 200, torch.float32, mean=300.0)
    truth = reference(x.double(), w.double(), b.double(), True, "identity", False)

    def run():
        return triton_ops.norm_linear(x, w, None, b, 1e-5, True, "identity", False, None)[0]

    guarded = (run().double() - truth).abs().max()
    monkeypatch.setitem(triton_ops._CENTER_LIMIT, torch.float32, 1e30)
    unguarded = (run().double() - truth).abs().max()
    assert unguarded > 20 * guarded


@pytest.mark.parametrize("dtype", DTYPES)
def test_bound_of_the_guard(dtype):
    """Just under the bound the uncentered form is as good as eager."""
    limit = triton_ops._CENTER_LIMIT[dtype]
    x, w, b = make(8, 24, 256, torch.float32)
    x = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) + 0.95 * limit**0.5
    compare(x.to(dtype), w.to(dtype), b.to(dtype), center=True, gradients=False)


@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    out=st.sampled_from([None, torch.float32]),
)
def test_scaled_linear(m, n, k, dtype, out):
    x, w, b = make(m, n, k, dtype)
    scale = torch.rand(m, 1) + 0.5
    results = []
    for kind in ("ours", "eager", "truth"):
        args = [
            (t.double() if kind == "truth" else t.clone()).requires_grad_()
            for t in (x, w, scale, b)
        ]
        if kind == "ours":
            y = triton_ops.scaled_linear(*args, "identity", False, out)
        else:
            y = ops.scaled_linear(*args, out_dtype=(out or dtype) if kind == "eager" else None)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
        results.append([y, *torch.autograd.grad(y, args, dy)])
    for ours, eager, truth in zip(*results, strict=True):
        slack = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        check(ours.detach(), eager.detach(), truth.detach(), slack=slack)


def test_three_dims_transposed_weight_and_odd_strides():
    x = torch.randn(3, 4, 60).transpose(0, 1)
    w = torch.randn(60, 33).t()
    y, _ = triton_ops.norm_linear(x, w, None, None, 1e-6, False, "identity", False, None)
    torch.testing.assert_close(y, F.linear(ops.rms_norm(x, [-1]), w), rtol=1e-4, atol=1e-4)
    scale = torch.rand(4, 3, 1)
    y = triton_ops.scaled_linear(x[..., ::2], w[:, ::2], scale, None, "relu", False, None)
    truth = F.relu(F.linear(x[..., ::2], w[:, ::2]) * scale)
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-4)


def test_only_bad_rows_are_bad():
    for m in (6, 70):
        x, w, b = make(m, 40, 100, torch.float32)
        x[1, 3], x[2, 5], x[4] = float("nan"), float("inf"), 0.0
        for center in (False, True):
            y, _ = triton_ops.norm_linear(x, w, None, b, 1e-5, center, "relu", False, None)
            good = [i for i in range(m) if i not in (1, 2)]
            truth = reference(x.double(), w.double(), b.double(), center, "relu", False)
            torch.testing.assert_close(y[good].double(), truth[good], rtol=1e-4, atol=1e-5)
            assert torch.isnan(y[1]).all() and torch.isnan(truth[1]).all()
            assert torch.equal(torch.isfinite(y), torch.isfinite(truth))


def test_empty():
    w = torch.randn(7, 5)
    y, _ = triton_ops.norm_linear(
        torch.randn(0, 5), w, None, None, 1e-6, False, "gelu", False, None
    )
    assert y.shape == (0, 7)


def test_refuses():
    x, w, b = make(2, 6, 8, torch.float32)
    with pytest.raises(ValueError, match="weight is"):
        triton_ops.norm_linear(x, w.half(), None, b, 1e-6, False, "gelu", False, None)
    with pytest.raises(ValueError, match="tanh"):
        triton_ops.norm_linear(x, w, None, b, 1e-6, False, "tanh", False, None)
    with pytest.raises(ValueError, match="even"):
        triton_ops.norm_linear(x, w[:5], None, None, 1e-6, False, "silu", True, None)
    with pytest.raises(ValueError, match="one floating-point number per row"):
        triton_ops.scaled_linear(x, w, torch.ones(1, 2), b, "identity", False, None)
