"""GatedNorm in one kernel, forward and backward."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from interpreter import DTYPES, check, triton_ops
from normfuse.passes import ops
from normfuse.runtime.kernels import plans


def make(rows, d, r, dtype, affine=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d, generator=g).to(dtype)
    gain = (1 + 0.3 * torch.randn(d, generator=g)).to(dtype) if affine else None
    bias = torch.randn(d, generator=g).mul(0.2).to(dtype) if affine else None
    down = (torch.randn(r, d, generator=g) / d**0.5).to(dtype)
    up = torch.randn(d, r, generator=g).to(dtype)
    return x, gain, bias, down, up


def compare(tensors, dtype, norm_dtype, gate_scale=2.0):
    results = []
    for kind in ("ours", "eager", "truth"):
        args = [
            None if t is None else (t.double() if kind == "truth" else t.clone()).requires_grad_()
            for t in tensors
        ]
        x, gain, bias, down, up = args
        if kind == "ours":
            y = triton_ops.gated_norm(*args, 1e-6, gate_scale, norm_dtype, dtype)[0]
        else:
            casts = {"stat_dtype": torch.float32, "norm_dtype": norm_dtype, "out_dtype": dtype}
            casts = casts if kind == "eager" else {}
            y = ops.gated_rms_norm(
                x, [-1], gain, bias, down, up, 1e-6, gate_scale=gate_scale, **casts
            )
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
        results.append([y, *torch.autograd.grad(y, [a for a in args if a is not None], dy)])
    for ours, eager, truth in zip(*results, strict=True):
        slack = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        check(ours.detach(), eager.detach(), truth.detach(), slack=slack)


@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    rows=st.integers(1, 20),
    d=st.integers(2, 140),
    rank=st.sampled_from([1, 3, 16, 17, 64]),
    dtype=st.sampled_from(DTYPES),
    affine=st.booleans(),
    early=st.booleans(),
    gate_scale=st.sampled_from([1.0, 2.0]),
)
def test_any_shape(rows, d, rank, dtype, affine, early, gate_scale):
    compare(
        make(rows, d, rank, dtype, affine), dtype, dtype if early else torch.float32, gate_scale
    )


@pytest.mark.parametrize(
    "dtype, d", [(torch.float32, 16381), (torch.bfloat16, 16384), (torch.float16, 16384)]
)
def test_longest_rows(dtype, d):
    """Large and small rows, rows of zeros, NaN and Inf, and far from zero; each compared by itself."""
    small, large = (1e-2, 1e2) if dtype == torch.float16 else (1e-6, 1e4)
    x, gain, bias, down, up = make(7, d, 5, dtype)
    x[1], x[2], x[3], x[4] = x[1] * small, x[2] * large, 0.0, x[4] + 30
    x[5, d - 1], x[6, 3] = float("nan"), float("inf")
    args = (gain, bias, down, up)
    y = triton_ops.gated_norm(x, *args, 1e-6, 2.0, torch.float32, dtype)[0]
    casts = {"stat_dtype": torch.float32, "norm_dtype": torch.float32, "out_dtype": dtype}
    eager = ops.gated_rms_norm(x, [-1], *args, 1e-6, **casts)
    truth = ops.gated_rms_norm(x.double(), [-1], *(t.double() for t in args), 1e-6)
    slack = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for row in range(5):
        check(y[row], eager[row], truth[row], slack=slack)
    assert not torch.isfinite(y[5:]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_long_rows(dtype):
    compare(make(2, 523, 16, dtype), dtype, torch.float32)


def test_rows_shared_by_programs():
    assert plans.gated(150, 40, 8, 4, 132).splits == 3
    compare(make(150, 40, 8, torch.float32), torch.float32, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_closed_gate_is_exactly_the_norm(dtype):
    """With ``up = 0`` the gate is 1: the insertion changes nothing, to the last bit."""
    x, gain, bias, down, up = make(5, 70, 8, dtype)
    y = triton_ops.gated_norm(x, gain, bias, down, up * 0, 1e-6, 2.0, torch.float32, dtype)[0]
    plain = triton_ops.norm(x, gain, bias, 1e-6, "rms", torch.float32, dtype)[0]
    # both round float32 rows to dtype; their sums run in different orders
    torch.testing.assert_close(y, plain, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_strides_empty_bad_rows():
    x, gain, bias, down, up = make(12, 60, 8, torch.float32)
    f = ops.gated_rms_norm
    for v in (x[::2], x.t().contiguous().t(), x.reshape(3, 4, 60).transpose(0, 1)):
        y = triton_ops.gated_norm(v, gain, bias, down, up, 1e-6, 2.0, None, None)[0]
        torch.testing.assert_close(y, f(v, [-1], gain, bias, down, up), rtol=1e-4, atol=1e-5)
    e = x[:0].clone().requires_grad_()
    y = triton_ops.gated_norm(e, gain, bias, down, up, 1e-6, 2.0, None, None)[0]
    assert torch.autograd.grad(y.sum(), e)[0].shape == (0, 60)
    x[3, 4], x[5] = float("nan"), 0.0
    y = triton_ops.gated_norm(x, gain, bias, down, up, 1e-6, 2.0, None, None)[0]
    assert torch.isnan(y[3]).all() and torch.isfinite(y[[i for i in range(12) if i != 3]]).all()


def test_refuses():
    x, gain, bias, down, up = make(2, 80, 65, torch.float32)
    with pytest.raises(ValueError, match="rank"):
        triton_ops.gated_norm(x, gain, bias, down, up, 1e-6, 2.0, None, None)
    with pytest.raises(ValueError, match="gate weights"):
        triton_ops.gated_norm(x, gain, bias, down[:8], up, 1e-6, 2.0, None, None)
