"""Norm kernels against the vocabulary's formulas in float64, forward and backward."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from interpreter import DTYPES, KINDS, check, formula, triton_ops
from normfuse.passes import ops
from normfuse.runtime import devices
from normfuse.runtime.kernels import plans

NATIVE = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def double(*tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def make(shape, dtype, scale=1.0, mean=0.0, affine=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = ((torch.randn(shape, generator=g) + mean) * scale).to(dtype)
    if not affine:
        return x, None, None
    gain = (1 + 0.3 * torch.randn(shape[-1], generator=g)).to(dtype)
    return x, gain, torch.randn(shape[-1], generator=g).to(dtype)


def compare(
    x, gain, bias, kind, norm_dtype, out_dtype, eps=1e-5, residual=None, seed=1, gradients=True
):
    """Values and gradients of our op, of the formula in the working dtype, and in float64."""
    g = torch.Generator().manual_seed(seed)
    out = out_dtype or torch.promote_types(norm_dtype or torch.float32, x.dtype)
    dy = torch.randn(x.shape, generator=g).to(out)
    dstream = torch.randn(x.shape, generator=g).to(x.dtype)
    results = []
    for who in ("ours", "eager", "truth"):
        a, w, b, r = (double if who == "truth" else leaves)(x, gain, bias, residual)
        wide = who == "truth"
        if r is not None:
            stream = a + r
            if wide:
                # the statistic reads the rounded sum: that is part of the op
                stream = (x + residual).double() + (stream - stream.detach())
        else:
            stream = a
        if who == "ours":
            if r is None:
                y, _ = triton_ops.norm(a, w, b, eps, kind, norm_dtype, out_dtype)
            else:
                y, stream, _ = triton_ops.add_norm(a, r, w, b, eps, kind, norm_dtype, out_dtype)
        elif wide:
            y = formula(kind, stream, w, b, eps)
        else:
            y = formula(
                kind,
                stream,
                w,
                b,
                eps,
                stat_dtype=torch.float32,
                norm_dtype=norm_dtype,
                out_dtype=out_dtype,
            )
        outputs, grads = [y], [dy.to(y.dtype)]
        if r is not None:
            outputs.append(stream)
            grads.append(dstream.to(stream.dtype))
        inputs = [t for t in (a, w, b, r) if t is not None]
        found = torch.autograd.grad(outputs, inputs, grads) if gradients else ()
        results.append([*outputs, *found])
    for ours, eager, truth in zip(*results, strict=True):
        slack = None
        if eager.dtype != torch.float32:
            slack = torch.finfo(eager.dtype).eps / 4
        check(ours.detach(), eager.detach(), truth.detach(), slack=slack)


@settings(max_examples=30, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    rows=st.integers(1, 4),
    cols=st.one_of(st.integers(1, 300), st.integers(301, 16384)),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    affine=st.booleans(),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e2, 1e4]),
    mean=st.sampled_from([0.0, 1.0, 30.0]),
    order=st.sampled_from(["late", "early", "wide"]),
)
def test_any_shape_scale_and_cast_order(rows, cols, dtype, kind, affine, scale, mean, order):
    if dtype == torch.float16:
        scale, mean = min(scale, 1e2), min(mean, 1.0)
    x, gain, bias = make((rows, cols), dtype, scale, mean, affine)
    norm_dtype = {"late": torch.float32, "early": dtype, "wide": None}[order]
    out_dtype = torch.float32 if order == "wide" else dtype
    # gradients of one to three elements are all cancellation, and so is what is left of them centered
    if cols < 4 and kind == "layer":
        y = triton_ops.norm(x, gain, bias, 1e-5, kind, norm_dtype, out_dtype)[0]
        truth = formula(kind, *double(x, gain, bias)).detach()
        assert torch.isfinite(y).all() and y.shape == truth.shape
        if cols == 1:
            torch.testing.assert_close(y.double(), truth, rtol=1e-2, atol=1e-2)
        return
    compare(x, gain, bias, kind, norm_dtype, out_dtype, gradients=cols >= 4)


ROUNDINGS = [None, *DTYPES]


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    dtype=st.sampled_from(DTYPES),
    gain=st.sampled_from(ROUNDINGS),
    bias=st.sampled_from(ROUNDINGS),
    norm_dtype=st.sampled_from(ROUNDINGS),
    out_dtype=st.sampled_from(ROUNDINGS),
    kind=st.sampled_from(KINDS),
)
def test_rounds_where_the_formula_rounds(dtype, gain, bias, norm_dtype, out_dtype, kind):
    """A rounding left out (or added) changes a large part of all elements; the order of a sum a few."""
    x, *vectors = make((4, 200), torch.float32)
    affine = [None if t is None else v.to(t) for v, t in zip(vectors, (gain, bias), strict=True)]
    x = x.to(dtype)
    y, _ = triton_ops.norm(x, *affine, 1e-5, kind, norm_dtype, out_dtype)
    casts = {"stat_dtype": torch.float32, "norm_dtype": norm_dtype, "out_dtype": out_dtype}
    eager = formula(kind, x, *affine, **casts)
    assert y.dtype == eager.dtype
    off = (y.float() - eager.float()).abs() > 1e-5 * eager.float().abs() + 1e-6
    assert off.float().mean() < 0.02


BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "zero": 0.0}


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    bad=st.dictionaries(st.integers(0, 8), st.sampled_from(list(BAD)), min_size=1, max_size=5),
    cols=st.integers(2, 200),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
)
def test_bad_rows_change_no_other_row(bad, cols, dtype, kind):
    """Values and input gradients of the other rows are the same to the last bit."""
    rows = 9
    x, gain, bias = make((rows, cols), dtype)
    spoiled = x.clone()
    for row, what in bad.items():
        if what == "zero":
            spoiled[row] = 0
        else:
            spoiled[row, row % cols] = BAD[what]
    dy = make((rows, cols), dtype, seed=3)[0]
    results = []
    for v in (x, spoiled):
        v = v.requires_grad_()
        y = triton_ops.norm(v, gain, bias, 1e-5, kind, torch.float32, dtype)[0]
        results.append((y.detach(), *torch.autograd.grad(y, v, dy)))
    good = [i for i in range(rows) if i not in bad]
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[good], after[good])
        for row, what in bad.items():
            if what == "zero":
                assert torch.isfinite(after[row]).all()
    for row, what in bad.items():
        if what != "zero":
            assert not torch.isfinite(results[1][0][row]).any() or "inf" in what
        else:
            expected = torch.zeros_like(bias) + bias
            torch.testing.assert_close(results[1][0][row], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=NATIVE.get)
@pytest.mark.parametrize("kind", KINDS)
def test_residual_add(dtype, kind):
    x, gain, bias = make((2, 3, 50), dtype)
    residual = make((2, 3, 50), dtype, seed=7)[0]
    compare(x, gain, bias, kind, dtype, dtype, residual=residual)


def test_residual_of_another_dtype():
    x, gain, _ = make((3, 40), torch.bfloat16)
    residual = make((3, 40), torch.float32, seed=7)[0]
    compare(x, gain, None, "rms", torch.float32, torch.bfloat16, residual=residual)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cols", [1, 255, 16384, 16385, 20001])
def test_long_rows(kind, cols):
    """Beyond a tile the row is looped over; both sides of each boundary."""
    x, gain, bias = make((2, cols), torch.bfloat16, mean=3.0)
    compare(x, gain, bias, kind, torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    "dtype, cols", [*((d, 16384) for d in DTYPES), (torch.float32, 16383), (torch.float16, 8193)]
)
def test_longest_rows(dtype, cols):
    """Every dtype to the full range of columns: large and small rows, rows of zeros, NaN and Inf, and
    far from zero; each compared by itself."""
    small, large = (1e-2, 1e2) if dtype == torch.float16 else (1e-6, 1e4)
    x, gain, bias = make((7, cols), dtype)
    x[1], x[2], x[3], x[4] = x[1] * small, x[2] * large, 0.0, x[4] + 30
    x[5, cols - 1], x[6, 3] = float("nan"), float("inf")
    casts = {"stat_dtype": torch.float32, "norm_dtype": torch.float32, "out_dtype": dtype}
    for kind in KINDS:
        y, _ = triton_ops.norm(x, gain, bias, 1e-5, kind, torch.float32, dtype)
        eager = formula(kind, x, gain, bias, **casts)
        truth = formula(kind, *double(x, gain, bias)).detach()
        slack = None if dtype == torch.float32 else torch.finfo(dtype).eps / 4
        for row in range(5):
            check(y[row], eager[row], truth[row], slack=slack)
        assert torch.equal(torch.isfinite(y[5:]), torch.isfinite(truth[5:]))
    residual = make((2, cols), dtype, seed=7)[0]
    compare(x[[0, 4]], gain, bias, "layer", dtype, dtype, residual=residual)


@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_with_residual_in_float32(kind):
    x, gain, bias = make((2, 16390), torch.float32, mean=100.0)
    residual = make((2, 16390), torch.float32, seed=7)[0]
    compare(x, gain, bias, kind, None, torch.float32, residual=residual)


@pytest.mark.parametrize("cols", [9000, 12289, 40001])
def test_split_rows(cols):
    plan = plans.norm_forward(1, cols, 132)
    assert plan.regime == "split" and plan.splits > 1
    x, gain, bias = make((1, cols), torch.float32, mean=5.0)
    compare(x, gain, bias, "layer", None, torch.float32)


def test_many_rows_share_programs(monkeypatch):
    """More rows than programs: each backward program loops and sums its own share."""
    monkeypatch.setattr(devices, "processors", lambda device: 1)
    for cols in (33, 200):
        x, gain, bias = make((67, cols), torch.float32)
        compare(x, gain, bias, "layer", None, torch.float32)


def test_large_mean_small_deviation():
    """Two passes over the row: no cancellation at mean/deviation = 1e4."""
    x, gain, bias = make((3, 200), torch.float32, mean=1e4)
    compare(x, gain, bias, "layer", None, torch.float32)
    x, gain, bias = make((2, 17000), torch.float32, mean=1e4)
    compare(x, gain, bias, "layer", None, torch.float32)


def test_only_bad_rows_are_bad():
    x, gain, bias = make((6, 70), torch.float32)
    x[1, 3], x[2, 5], x[4] = float("nan"), float("inf"), 0.0
    for kind in KINDS:
        y = triton_ops.norm(x, gain, bias, 1e-5, kind, None, None)[0]
        truth = formula(kind, x.double(), gain.double(), bias.double()).float()
        torch.testing.assert_close(y, truth, equal_nan=True)
        assert torch.isfinite(y[[0, 3, 4, 5]]).all()
        assert not torch.isfinite(y[1]).any()
        h = x.clone().requires_grad_()
        triton_ops.norm(h, gain, bias, 1e-5, kind, None, None)[0][:].sum().backward()
        assert torch.isfinite(h.grad[[0, 3, 4, 5]]).all()


def test_strides_and_empty():
    base = torch.randn(6, 3, 80)
    for x in (base.transpose(0, 1), base[:, :, ::2], base[::2], base.permute(2, 1, 0), base[0, 0]):
        y = triton_ops.norm(x, None, None, 1e-6, "rms", None, None)[0]
        torch.testing.assert_close(y, ops.rms_norm(x, [-1], eps=1e-6))
        assert y.is_contiguous() and y.shape == x.shape
    for shape in ((0, 8), (3, 0), (2, 0, 5)):
        x = torch.randn(shape, requires_grad=True)
        gain = torch.ones(shape[-1], requires_grad=True)
        y, _ = triton_ops.norm(x, gain, None, 1e-6, "layer", None, None)
        assert y.shape == shape
        dx, dgain = torch.autograd.grad(y, (x, gain), torch.ones_like(y))
        assert dx.shape == shape and not dgain.any()


def test_unused_outputs():
    """Only the stream is read: its gradient passes through untouched."""
    x, r = torch.randn(2, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    _, stream, stats = triton_ops.add_norm(x, r, None, None, 1e-6, "rms", None, None)
    assert not stats.requires_grad
    dx, dr = torch.autograd.grad(stream, (x, r), torch.ones_like(stream))
    assert torch.equal(dx, torch.ones_like(x)) and torch.equal(dr, dx)


@pytest.mark.parametrize("dtype", DTYPES, ids=NATIVE.get)
@pytest.mark.parametrize("scale", [1e-6, 1e4])
@pytest.mark.parametrize("cols", [16383, 16384])
def test_statistic_of_the_longest_rows(dtype, scale, cols):
    scale = scale if dtype != torch.float16 else scale**0.5
    x = make((2, cols), dtype, scale)[0]
    truth = ops.row_rstd(x.double(), [-1], 1e-6)
    torch.testing.assert_close(triton_ops.row_rstd(x, 1e-6).double(), truth, rtol=1e-6, atol=0)
    rstd, stream = triton_ops.add_row_rstd(x, x * 2, 1e-6)
    assert torch.equal(stream, x + x * 2)
    truth = ops.row_rstd(stream.double(), [-1], 1e-6)
    torch.testing.assert_close(rstd.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("cols", [90, 16400])
def test_row_rstd(cols):
    x = torch.randn(2, 2, cols, requires_grad=True)
    rstd = triton_ops.row_rstd(x, 1e-6)
    xd = x.detach().double().requires_grad_()
    truth = ops.row_rstd(xd, [-1], 1e-6)
    torch.testing.assert_close(rstd.double(), truth, rtol=1e-6, atol=0)
    g = torch.randn_like(rstd)
    (dx,) = torch.autograd.grad(rstd, x, g)
    (dt,) = torch.autograd.grad(truth, xd, g.double())
    torch.testing.assert_close(dx.double(), dt, rtol=1e-5, atol=1e-9)


def test_add_row_rstd():
    x, r = torch.randn(3, 60, requires_grad=True), torch.randn(3, 60, requires_grad=True)
    rstd, stream = triton_ops.add_row_rstd(x, r, 1e-6)
    assert torch.equal(stream, x + r)
    torch.testing.assert_close(rstd, ops.row_rstd(x + r, [-1], 1e-6))
    ours = torch.autograd.grad((rstd.sum() * 3, (stream * 2).sum()), (x, r))
    s = x + r
    truth = torch.autograd.grad((ops.row_rstd(s, [-1], 1e-6).sum() * 3, (s * 2).sum()), (x, r))
    torch.testing.assert_close(ours, truth)


def test_same_result_twice():
    x, gain, bias = (t.requires_grad_() for t in make((40, 64), torch.float32))
    runs = []
    for _ in range(2):
        y = triton_ops.norm(x, gain, bias, 1e-6, "layer", None, None)[0]
        runs.append([y, *torch.autograd.grad(y.square().sum(), (x, gain, bias))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_refuses():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="float64"):
        triton_ops.norm(x.double(), None, None, 1e-6, "rms", None, None)
    with pytest.raises(ValueError, match="vectors"):
        triton_ops.norm(x, torch.ones(2, 4), None, 1e-6, "rms", None, None)
    with pytest.raises(ValueError, match="residual"):
        triton_ops.add_norm(x, x[:1], None, None, 1e-6, "rms", None, None)
