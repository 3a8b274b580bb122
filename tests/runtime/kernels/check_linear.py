"""Norm and linear in one product, gated pairs, and products scaled per row."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from interpreter import DTYPES, KINDS, check, formula, triton_ops
from normfuse.passes import ops
from normfuse.runtime.kernels import plans
from normfuse.runtime.triton_ops import linear

ACTS = triton_ops.ACTIVATIONS


def make(m, n, k, dtype, mean=0.0, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = ((torch.randn(m, k, generator=g) + mean) * scale).to(dtype)
    w = (torch.randn(n, k, generator=g) / max(k, 1) ** 0.5).to(dtype)
    return x, w, torch.randn(n, generator=g).to(dtype)


def pair(m, n, k, dtype, **options):
    """Inputs of a gated pair: two layers."""
    x, w, b = make(m, n, k, dtype, **options)
    _, up, up_bias = make(1, n, k, dtype, seed=9)
    return x, w, b, up, up_bias


def double(*tensors):
    return [t.double() for t in tensors]


def ours(x, w, b=None, up=None, up_bias=None, kind="rms", act="identity", eps=1e-5):
    return triton_ops.norm_linear(x, w, b, None, up, up_bias, None, eps, kind, act, None)


def reference(x, w, b=None, up=None, up_bias=None, kind="rms", act="identity", eps=1e-5):
    """Norm, then linear, then activation, as eager PyTorch rounds them."""
    native = {"stat_dtype": torch.float32, "norm_dtype": torch.float32, "out_dtype": w.dtype}
    native = {} if x.dtype == torch.float64 else native
    h = formula(kind, x, eps=eps, **native)
    y = ACTS[act](F.linear(h, w, b))
    return y if up is None else y * F.linear(h, up, up_bias)


def rstd_of(x, kind, eps=1e-5):
    rows = x.double().reshape(-1, x.shape[-1])
    if kind == "layer":
        rows = rows - rows.mean(-1, keepdim=True)
    if kind == "crms":
        rows = torch.cat([rows, -rows.sum(-1, keepdim=True)], -1)
    return torch.rsqrt(rows.square().mean(-1) + eps)


def compare(x, w, b, up=None, up_bias=None, kind="rms", act="identity", gradients=True):
    results = []
    for who in ("ours", "eager", "truth"):
        args = [
            None if t is None else (t.double() if who == "truth" else t.clone()).requires_grad_()
            for t in (x, w, b, up, up_bias)
        ]
        if who == "ours":
            y, stats = ours(*args, kind=kind, act=act)
            tight = 1e-5 if x.dtype == torch.float32 else 1e-4
            torch.testing.assert_close(stats[0].double(), rstd_of(x, kind), rtol=tight, atol=0)
        else:
            y = reference(*args, kind=kind, act=act)
        grads = ()
        if gradients:
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
            grads = torch.autograd.grad(y, [t for t in args if t is not None], dy)
        results.append([y, *grads])
    for mine, eager, truth in zip(*results, strict=True):
        slack = 2e-6 if w.dtype == torch.float32 else torch.finfo(w.dtype).eps / 2
        check(mine.detach(), eager.detach(), truth.detach(), slack=slack)


@settings(max_examples=30, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 80),
    k=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    bias=st.booleans(),
    act=st.sampled_from(list(ACTS)),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e4]),
)
def test_any_shape(m, n, k, dtype, kind, bias, act, scale):
    if dtype == torch.float16:
        scale = 1.0  # float16 holds neither 1e4·4 nor 1e-6 to full precision
    if kind == "layer" and k < 4:
        k = 4  # one or two centered elements: the result is all rounding
    x, w, b = make(m, n, k, dtype, scale=scale)
    # at 1e-6 gradients with respect to x are 1e2 and more of everything else: values only
    compare(x, w, b if bias else None, kind=kind, act=act, gradients=scale == 1.0)


MIXED = [(a, b) for a in DTYPES for b in DTYPES if a != b and linear.combines(a, b)]


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mean", [0.0, 0.6, 3.0, 100.0])
def test_rows_of_another_dtype_than_the_weights(dtypes, kind, mean):
    """Multiplied in the weights' dtype, as a cast behind the norm would have it; rows far from zero
    are centered before they are rounded."""
    x = make(9, 40, 150, dtypes[0], mean=mean)[0]
    _, w, b, up, up_bias = pair(9, 40, 150, dtypes[1])
    if mean > 30 and dtypes[0] == torch.bfloat16:
        x[:, ::2] += 8
    compare(x, w, b, kind=kind, gradients=mean < 1)
    compare(x, w, b, up, up_bias, kind=kind, act="silu", gradients=False)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_another_dtype_where_k_is_split(kind):
    x, w, b = make(3, 70, 2100, torch.float32, mean=2.0)
    compare(x, w.bfloat16(), b.bfloat16(), kind=kind, gradients=False)


def test_float16_weights_take_no_other_rows():
    """Rows are rounded before they are scaled: float16 would overflow."""
    assert not any(linear.combines(t, torch.float16) for t in (torch.float32, torch.bfloat16))
    x, w, _ = make(3, 8, 20, torch.float32, scale=1e6)
    y, _ = ours(x, w.bfloat16())
    truth = reference(x.double(), w.double())
    torch.testing.assert_close(y.double(), truth, rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match=r"weight is torch.float16"):
        ours(x, w.half())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu", "sigmoid"])
def test_gated_pairs(dtype, act):
    x, w, b, up, up_bias = pair(5, 33, 100, dtype)
    compare(x, w, b, up, up_bias, act=act)
    compare(x, w, None, up, None, act=act)


@pytest.mark.parametrize("kind", ["layer", "crms"])
def test_gated_pair_of_another_norm(kind):
    compare(*pair(5, 33, 100, torch.float32, mean=0.5), kind=kind, act="silu")


def test_pair_in_one_weight_and_in_two_layouts():
    x, w, b = make(5, 66, 64, torch.float32)
    merged = ours(x, w[33:], b[33:], w[:33], b[:33], act="silu")[0]
    copied = ours(x, w[33:].clone(), b[33:].clone(), w[:33].clone(), b[:33].clone(), act="silu")[0]
    assert torch.equal(merged, copied)
    other = w[:33].t().contiguous().t()
    torch.testing.assert_close(ours(x, w[33:], b[33:], other, b[:33], act="silu")[0], merged)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True])
def test_split_k(gated, kind):
    """A few rows, long K: partial products and partial sums added up by a second kernel."""
    plan = plans.gemm(3, 70, 2100, 4, 132, dual=gated)
    assert plan.splits > 1
    x, w, b, up, up_bias = pair(3, 70, 2100, torch.float32)
    if gated:
        compare(x, w, b, up, up_bias, kind=kind, act="silu", gradients=False)
    else:
        compare(x, w, b, kind=kind, act="gelu_tanh", gradients=False)


def test_split_k_of_a_given_scale():
    x, w, b = make(3, 70, 2100, torch.float32)
    scale = torch.rand(3, 1) + 0.5
    y = triton_ops.scaled_linear(x, w, scale, b, None, None, "relu", None)
    truth = F.relu(F.linear(x.double(), w.double()) * scale.double() + b.double())
    torch.testing.assert_close(y.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("regime, m", [("medium", 70), ("large", 520)])
def test_more_rows(regime, m):
    assert plans.gemm(m, 96, 64, 4, 132).regime == regime
    x, w, b = make(m, 96, 64, torch.float32)
    for kind in KINDS:
        compare(x, w, b, kind=kind, gradients=False)


SCALES = {torch.float32: [1e-6, 1e4], torch.bfloat16: [1e-6, 1e4], torch.float16: [1e-2, 1e2]}


@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    m=st.integers(1, 5),
    k=st.integers(301, 16384),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    scale=st.sampled_from([0, 1]),
    mean=st.sampled_from([0.0, 3.0]),
)
def test_long_rows(m, k, dtype, kind, scale, mean):
    x, w, b = make(m, 20, k, dtype, scale=SCALES[dtype][scale], mean=mean)
    compare(x, w, b, kind=kind, gradients=False)


LONGEST = [(3, 16384, dtype, kind) for dtype in DTYPES for kind in KINDS]
LONGEST += [(3, 16383, dtype, "rms") for dtype in DTYPES]
LONGEST += [(66, 16384, torch.bfloat16, "rms"), (66, 16381, torch.float16, "crms")]


@pytest.mark.parametrize("m, k, dtype, kind", LONGEST, ids=str)
def test_longest_rows(m, k, dtype, kind):
    """To 16,384 columns, split and not, ragged too: large and small rows, rows of zeros, NaN and Inf,
    and (LayerNorm) far from zero; each compared by itself."""
    assert (plans.gemm(m, 20, k, dtype.itemsize, 132).splits > 1) == (m == 3)
    x, w, b = make(m + 5, 20, k, dtype)
    small, large = SCALES[dtype]
    x[1], x[2], x[3] = x[1] * small, x[2] * large, 0.0
    x[4, k - 1], x[5, 7] = float("nan"), float("-inf")
    if kind == "layer":
        x[6] += {torch.float32: 30.0, torch.float16: 10.0}.get(dtype, 100.0)
    y, _ = ours(x, w, b, kind=kind)
    eager, truth = reference(x, w, b, kind=kind), reference(*double(x, w, b), kind=kind)
    assert torch.equal(torch.isfinite(y), torch.isfinite(truth))
    assert torch.isnan(y[4:6]).all()
    slack = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for row in (0, 1, 2, 3, 6, 7):
        check(y[row], eager[row], truth[row], slack=slack)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_longest_rows_of_pairs_and_given_scales(dtype):
    k = 16384
    x, w, b, up, up_bias = pair(2, 20, k, dtype)
    compare(x, w, b, up, up_bias, act="silu", gradients=False)
    scale = torch.rand(2, 1) + 0.5
    y = triton_ops.scaled_linear(x, w, scale, b, None, None, "identity", None)
    native = ops.scaled_linear(x, w, scale, b, out_dtype=dtype)
    truth = ops.scaled_linear(*double(x, w, scale, b))
    check(y, native, truth, slack=2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)


def far_from_zero(m, k, dtype, mean):
    x, w, b, up, up_bias = pair(m, 24, k, dtype, mean=mean)
    if dtype != torch.float32 and mean > 30:
        x[:, ::2] += 2 * torch.finfo(dtype).eps * mean * 8  # keep a deviation the dtype can hold
    return x, w, b, up, up_bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [3.0, 7.0, 30.0, 300.0])
def test_cancellation_is_caught(dtype, mean):
    """Means far beyond the deviation: the tile is computed again, centered first."""
    compare(*far_from_zero(6, 200, dtype, mean)[:3], kind="layer", gradients=False)


@pytest.mark.parametrize("dtype, mean", zip(DTYPES, [3.0, 300.0, 30.0], strict=True))
def test_cancellation_is_caught_where_k_is_split(dtype, mean):
    k = 2100
    assert plans.gemm(2, 24, k, dtype.itemsize, 132).splits > 1
    x, w, b, up, up_bias = far_from_zero(2, k, dtype, mean)
    x[1] -= mean  # a row that needs nothing beside one that does
    compare(x, w, b, kind="layer", gradients=False)
    compare(x, w, b, up, up_bias, kind="layer", act="silu", gradients=False)


@pytest.mark.parametrize("k", [200, 2100])
def test_cancellation_without_the_guard_is_bad(monkeypatch, k):
    """The guard does something: switched off, the same case loses its digits."""
    x, w, b = make(2, 24, k, torch.float32, mean=300.0)
    truth = reference(x.double(), w.double(), b.double(), kind="layer")

    def error():
        return (ours(x, w, b, kind="layer")[0].double() - truth).abs().max()

    guarded = error()
    monkeypatch.setitem(linear.CENTER_LIMIT, torch.float32, 1e30)
    assert error() > 20 * guarded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [256, 2100])
def test_bound_of_the_guard(dtype, k):
    """Just under the bound the uncentered form is as good as eager."""
    limit = linear.CENTER_LIMIT[dtype]
    x, w, b = make(8, 24, k, torch.float32)
    x = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) + 0.95 * limit**0.5
    compare(x.to(dtype), w.to(dtype), b.to(dtype), kind="layer", gradients=False)


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    out=st.sampled_from([None, torch.float32]),
    gated=st.booleans(),
)
def test_scaled_linear(m, n, k, dtype, out, gated):
    x, w, b, up, up_bias = pair(m, n, k, dtype)
    scale = torch.rand(m, 1) + 0.5
    results = []
    for who in ("ours", "eager", "truth"):
        args = [
            (t.double() if who == "truth" else t.clone()).requires_grad_()
            for t in ((x, w, scale, b, up, up_bias) if gated else (x, w, scale, b))
        ]
        if who == "ours":
            y = triton_ops.scaled_linear(
                *(args if gated else (*args, None, None)), "silu" if gated else "identity", out
            )
        else:
            kept = {"out_dtype": (out or dtype) if who == "eager" else None}
            y = ops.scaled_linear(*args[:4], **kept)
            if gated:
                y = F.silu(y) * ops.scaled_linear(args[0], args[4], args[2], args[5], **kept)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
        results.append([y, *torch.autograd.grad(y, args, dy)])
    for mine, eager, truth in zip(*results, strict=True):
        slack = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        check(mine.detach(), eager.detach(), truth.detach(), slack=slack)


def test_three_dims_transposed_weight_and_odd_strides():
    x = torch.randn(3, 4, 60).transpose(0, 1)
    w = torch.randn(60, 33).t()
    y, _ = ours(x, w, eps=1e-6)
    torch.testing.assert_close(y, F.linear(ops.rms_norm(x, [-1]), w), rtol=1e-4, atol=1e-4)
    scale = torch.rand(4, 3, 1)
    y = triton_ops.scaled_linear(x[..., ::2], w[:, ::2], scale, None, None, None, "relu", None)
    truth = F.relu(F.linear(x[..., ::2], w[:, ::2]) * scale)
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("m, k", [(6, 100), (70, 100), (6, 2100)])
@pytest.mark.parametrize("kind", KINDS)
def test_only_bad_rows_are_bad(kind, m, k):
    x, w, b = make(m, 40, k, torch.float32)
    x[1, 3], x[2, 5], x[3, 7], x[4] = float("nan"), float("inf"), float("-inf"), 0.0
    y, _ = ours(x, w, b, kind=kind, act="relu")
    good = [i for i in range(m) if i not in (1, 2, 3)]
    truth = reference(x.double(), w.double(), b.double(), kind=kind, act="relu")
    torch.testing.assert_close(y[good].double(), truth[good], rtol=1e-4, atol=1e-5)
    assert torch.isnan(y[1]).all() and torch.isnan(truth[1]).all()
    assert torch.equal(torch.isfinite(y), torch.isfinite(truth))


def test_given_column_sums_are_used():
    x, w, b = make(4, 20, 50, torch.float32, mean=0.5)
    args = (None, None, None, 1e-5, "layer", "identity", None)
    y = triton_ops.norm_linear(x, w, b, w.sum(1), *args)[0]
    assert torch.equal(y, ours(x, w, b, kind="layer")[0])
    assert not torch.allclose(y, triton_ops.norm_linear(x, w, b, w.sum(1) + 1, *args)[0])


@pytest.mark.parametrize("m, n, k", [(0, 7, 5), (3, 0, 5), (3, 7, 0), (0, 0, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_empty(m, n, k, kind):
    """Rows of nothing have a result all the same: the bias."""
    leaves = [t.requires_grad_() for t in pair(m, n, k, torch.float32)]
    scale = torch.rand(m, 1)
    for args in ((*leaves[:3], None, None), leaves):
        y, stats = ours(*args, kind=kind, act="gelu")
        if m and k:  # nothing is left as the memory was
            want = rstd_of(args[0].detach(), kind).float()
            torch.testing.assert_close(stats[0].flatten(), want)
        given = triton_ops.scaled_linear(args[0], args[1], scale, *args[2:], "gelu", None)
        used = [t for t in args if t is not None]
        bias, up_bias = args[2], args[4]
        truth = F.gelu(bias) * (1 if up_bias is None else up_bias) + torch.zeros(m, 1)
        for z in (y, given):
            assert z.shape == (m, n)
            if k == 0:
                torch.testing.assert_close(z, truth)
            found = torch.autograd.grad(z.sum(), used, retain_graph=True)
            assert all(torch.isfinite(g).all() for g in found)


@pytest.mark.parametrize("m, k", [(6, 100), (6, 2100), (70, 100)])
@pytest.mark.parametrize("what", ["inf", "nan", "far"])
def test_rows_change_no_other_row(m, k, what):
    """To the last bit, also where one of them makes its tile be multiplied again."""
    x, w, b = make(m, 40, k, torch.float32)
    spoiled = x.clone()
    spoiled[2] = spoiled[2] + 50 if what == "far" else float(what)
    for kind in KINDS:
        before, after = ours(x, w, b, kind=kind), ours(spoiled, w, b, kind=kind)
        good = [i for i in range(m) if i != 2]
        for p, q in zip(before, after, strict=True):
            rows = 0 if p.shape[0] == m else 1
            assert torch.equal(*(t.index_select(rows, torch.tensor(good)) for t in (p, q)))
        assert torch.isfinite(after[0][2]).all() == (what == "far")


def test_refuses():
    x, w, b = make(2, 6, 8, torch.float32)
    with pytest.raises(ValueError, match="weight is"):
        ours(x, w.half(), b)
    with pytest.raises(ValueError, match="tanh"):
        ours(x, w, b, act="tanh")
    with pytest.raises(ValueError, match="no statistic is called"):
        ours(x, w, b, kind="batch")
    with pytest.raises(ValueError, match="the pair's weights"):
        ours(x, w, None, w[:5])
    with pytest.raises(ValueError, match="both layers"):
        ours(x, w, b, w)
    with pytest.raises(ValueError, match="the pair's weights are"):
        ours(x, w, None, w.bfloat16())
    with pytest.raises(ValueError, match="weight is"):
        triton_ops.scaled_linear(
            x, w.bfloat16(), torch.ones(2, 1), None, None, None, "identity", None
        )
    with pytest.raises(ValueError, match="column sums"):
        triton_ops.norm_linear(
            x, w, b, w.sum(1).half(), None, None, None, 1e-5, "layer", "identity", None
        )
    with pytest.raises(ValueError, match="one floating-point number per row"):
        triton_ops.scaled_linear(x, w, torch.ones(1, 2), b, None, None, "identity", None)
