"""``orthogonalize`` against the scalar polynomial applied to a float64 SVD."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from normfuse import optim
from normfuse.optim import coefficients as co
from normfuse.optim import newton_schulz as ns
from normfuse.optim import polar, products, threads


def oracle(g, coefficients="polar_express", steps=5, shrink=None):
    """``U·diag(p(σ/‖σ‖))·Vᵀ`` in float64."""
    g = g.double()
    schedule = co.resolve(coefficients, steps)
    scale = co.input_scale(schedule, torch.float32) if shrink is None else shrink
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    norm = s.square().sum(-1, keepdim=True).sqrt()
    s = torch.where(norm > 0, s / norm.clamp(min=1e-300), 0.0) * scale
    return u @ torch.diag_embed(torch.as_tensor(co.scalar_map(schedule, s.numpy()))) @ v


def relative(a, b):
    return float((a.double() - b).norm() / b.norm().clamp(min=1e-30))


def matrix(shape, spectrum, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    if spectrum == "gaussian":
        return x
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    k = s.shape[-1]
    s = torch.logspace(0, -3, k, dtype=torch.float64)
    return u @ torch.diag_embed(s.expand(*shape[:-2], k)) @ v


SHAPES = [(24, 24), (12, 40), (40, 12), (1, 9), (9, 1), (3, 10, 16), (2, 2, 16, 10)]


@pytest.mark.parametrize("name", co.NAMES)
@pytest.mark.parametrize("method", ["direct", "gram"])
def test_every_set_and_form(name, method):
    bands = {"gaussian": 3e-4 if method == "direct" else 5e-4, "log": 1e-3}
    if name == "cans":
        bands["log"] = 3e-3
    for steps in (None, 8):
        if name in ("aol", "cubic5") and steps == 8:
            with pytest.raises(ValueError, match="unstable"):  # cycling leaves the interval
                optim.orthogonalize(torch.eye(3), steps, coefficients=name)
            continue
        for shape in SHAPES:
            for spectrum, band in bands.items():
                g = matrix(shape, spectrum)
                got32 = optim.orthogonalize(g.float(), steps, method, coefficients=name)
                assert got32.shape == g.shape and got32.dtype == torch.float32
                assert relative(got32, oracle(g, name, steps)) < band, (shape, spectrum, steps)
        exact = oracle(g, name, steps, co.input_scale(co.resolve(name, steps), torch.float64))
        got64 = optim.orthogonalize(g, steps, method, coefficients=name)
        assert relative(got64, exact) < 1e-9


@pytest.mark.parametrize("name", ["jordan", "you", "polar_express", "deepseekv4"])
def test_common_sets_are_tight_in_float32(name):
    for shape in ((24, 60), (60, 24), (30, 30)):
        g = matrix(shape, "gaussian")
        got = optim.orthogonalize(g.float(), None, "direct", coefficients=name)
        assert relative(got, oracle(g, name, None)) < 1e-5


@pytest.mark.parametrize("shape", [(352, 400), (400, 352), (352, 352)])
@pytest.mark.parametrize("method", ["direct", "gram"])
@pytest.mark.parametrize("name", ["jordan", "polar_express", "cubic5"])
def test_tiled_products(shape, method, name):
    plan = ns.make_plan(*shape, co.resolve(name), torch.float32, "cpu", method)
    g = matrix(shape, "gaussian")
    deeper = ns.Plan(plan.method, plan.restarts, 3, 0.0)  # uneven tiles
    scale = co.input_scale(co.resolve(name), torch.float32)
    x = (g / g.norm() * scale).float()[None]
    got = ns.iterate(x.clone(), co.resolve(name), deeper)
    assert relative(got[0], oracle(g, name)) < 5e-4
    assert (
        relative(optim.orthogonalize(g.float(), 5, method, coefficients=name), got[0].double())
        < 5e-4
    )


def test_tiles_cover_the_lower_triangle_once():
    for side in (*range(1, 70), 319, 320, 384, 577, 768, 1000):
        for halvings in range(5):
            count = torch.zeros(side, side)
            tiles = list(products.triangle(0, side, halvings))
            for tile in tiles:
                assert count[tile].numel()
                count[tile] += 1
                if tile[0] != tile[1]:
                    count.T[tile] += 1  # its mirror image
            assert (count == 1).all(), (side, halvings)
    diagonal = [rows for rows, cols in products.triangle(0, 768, 2) if rows == cols]
    assert diagonal == [slice(i, i + 192) for i in range(0, 768, 192)]


@pytest.mark.parametrize("method", ["direct", "gram"])
@pytest.mark.parametrize("shape", [(2, 330, 400), (3, 20, 30)])
def test_results_in_a_workspace_are_their_own(shape, method, monkeypatch):
    monkeypatch.setattr(threads, "available", lambda: 1)  # else each thread has one of its own
    x, y = matrix(shape, "gaussian").float(), matrix(shape, "gaussian", 1).float()
    want = [optim.orthogonalize(v, 4, method) for v in (x, y)]
    with products.workspace():
        first = optim.orthogonalize(x, 4, method)
        with products.workspace():  # an inner one joins the outer
            second = optim.orthogonalize(y, 4, method)
        assert products._LOCAL.buffers
    assert products._LOCAL.buffers is None
    assert torch.equal(first, want[0]) and torch.equal(second, want[1])


@pytest.mark.parametrize("size", [1e-25, 1e-13, 1.0, 1e14, 1e18, 5e37])
def test_norms_at_every_scale(size):
    x = matrix((2, 30, 50), "gaussian") * size
    x[0, 0, 0] = 3 * size  # one more entry than the rest of the row
    got = polar._norms(x.float())
    want = torch.linalg.matrix_norm(x.float().double(), keepdim=True)
    torch.testing.assert_close(got, want, rtol=3e-7, atol=0.0)
    # 5e37: norms beyond float32, whose inverses would not be normal numbers
    exact = optim.orthogonalize(x.float().double())
    torch.testing.assert_close(optim.orthogonalize(x.float()).double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype,band", [(torch.float16, 2e-2), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("method", ["direct", "auto"])
@pytest.mark.parametrize("name", ["jordan", "you", "polar_express"])
def test_half_precision_bands(dtype, band, method, name):
    for shape in ((32, 96), (96, 32)):
        g = matrix(shape, "gaussian").float()
        scale = co.input_scale(co.resolve(name), dtype)
        got = optim.orthogonalize(g, 5, method, coefficients=name, ns_dtype=dtype)
        assert relative(got, oracle(g, name, shrink=scale)) < band
        g = matrix(shape, "log").float()
        got = optim.orthogonalize(g, 5, method, coefficients=name, ns_dtype=dtype)
        assert relative(got, oracle(g, name, shrink=scale)) < (5e-2 if band == 2e-2 else 0.12)


def test_unstable_gram_is_refused_not_run():
    with pytest.raises(ValueError, match="not accurate"):
        optim.orthogonalize(
            torch.randn(8, 64), 8, "gram", ns_dtype=torch.bfloat16, coefficients="polar_express"
        )
    plan = ns.make_plan(8, 64, co.resolve("polar_express", 8), torch.bfloat16, "cpu")
    assert plan.method == "direct"


def test_cost_model():
    wide = ns.make_plan(768, 3072, co.resolve("jordan"), torch.float32, "cpu")
    square = ns.make_plan(768, 768, co.resolve("jordan"), torch.float32, "cpu")
    assert wide.method == "gram" and square.method == "direct"
    # the formulas of the literature: 20n²m + 10n³ and, with one restart, 8n²m + 28n³
    n, m = 64, 256
    s = co.resolve("you")
    assert ns.flops(n, m, s, None) == 20 * n * n * m + 10 * n**3
    assert ns.flops(n, m, s, (2,)) == 8 * n * n * m + 28 * n**3
    assert ns.flops(n, m, s, (2,), 0.5) == 6 * n * n * m + 14 * n**3


@pytest.mark.parametrize("normalization", ["schatten", "aol"])
@pytest.mark.parametrize("shape", [(2, 12, 40), (2, 40, 12), (2, 16, 16)])
def test_other_normalizations(normalization, shape):
    g = matrix(shape, "gaussian")
    gram = g @ g.mT if shape[-2] <= shape[-1] else g.mT @ g
    if normalization == "schatten":
        x = g / gram.norm(dim=(-2, -1), keepdim=True).sqrt()
    else:
        x = g / g.norm(dim=(-2, -1), keepdim=True)
        gram = gram / g.norm(dim=(-2, -1), keepdim=True) ** 2
        s = gram.abs().sum(-1).rsqrt()
        x = s[..., :, None] * x if shape[-2] <= shape[-1] else x * s[..., None, :]
    assert float(torch.linalg.matrix_norm(x, 2).max()) <= 1 + 1e-12
    u, sv, v = torch.linalg.svd(x, full_matrices=False)
    want = u @ torch.diag_embed(torch.as_tensor(co.scalar_map(co.resolve("you"), sv.numpy()))) @ v
    for method in ("direct", "gram"):
        got = optim.orthogonalize(
            g.float(), 5, method, coefficients="you", normalization=normalization
        )
        assert relative(got, want) < 1e-4


@pytest.mark.parametrize("normalization", ["frobenius", "schatten", "aol"])
@pytest.mark.parametrize("shape", [(3, 8, 12), (3, 12, 8)])
def test_zero_and_non_finite(normalization, shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    alone = optim.orthogonalize(g[1:2], normalization=normalization)
    for value in (0.0, float("nan"), float("inf"), -float("inf")):
        bad = g.clone()
        if value == 0:
            bad[0] = 0
        else:
            bad[0, 2, 3] = value
        out = optim.orthogonalize(bad, normalization=normalization)
        assert torch.count_nonzero(out[0]) == 0
        torch.testing.assert_close(out[1:2], alone, rtol=1e-5, atol=1e-6)
        if value != 0:
            with pytest.raises(ValueError, match=r"\[0\]"):
                optim.orthogonalize(bad, normalization=normalization, non_finite="raise")


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_invariance(scale):
    g = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    want = optim.orthogonalize(g)
    torch.testing.assert_close(optim.orthogonalize(g * scale), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        optim.orthogonalize((g * scale).double()).float(), want, rtol=1e-4, atol=1e-5
    )
    # an explicit eps is honoured
    assert float(optim.orthogonalize(g * 1e-12, eps=1e-7).norm()) < 0.1 * float(want.norm())


def test_input_is_never_modified():
    for g in (torch.randn(6, 10), torch.randn(10, 6), torch.randn(400, 330), torch.randn(2, 4, 4)):
        for kw in ({}, {"normalization": "schatten"}, {"method": "gram"}, {"steps": 0}):
            before = g.clone()
            out = optim.orthogonalize(g, **kw)
            assert torch.equal(g, before)
            assert out.data_ptr() != g.data_ptr()


def test_lists_mix_shapes_transposes_and_dtypes():
    gen = torch.Generator().manual_seed(2)
    shapes = [(6, 10), (10, 6), (6, 10), (3, 10, 6), (5, 5), (1, 7), (0, 4), (330, 340), (340, 330)]
    parts = [torch.randn(s, generator=gen) for s in shapes]
    parts.append(torch.randn(10, 6, generator=gen, dtype=torch.float64))
    parts.append(torch.randn(6, 10, generator=gen).mT)  # not contiguous
    out = optim.orthogonalize(parts)
    for g, o in zip(parts, out, strict=True):
        assert o.shape == g.shape and o.dtype == g.dtype and o.is_contiguous()
        if g.numel():
            assert relative(o, oracle(g)) < 1e-4
    assert optim.orthogonalize([]) == []


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_orthogonal_equivariance(r, c, seed):
    gen = torch.Generator().manual_seed(seed)
    g, a, b = (torch.randn(s, generator=gen).double() for s in ((r, c), (r, r), (c, c)))
    p, q = torch.linalg.qr(a)[0], torch.linalg.qr(b)[0]
    left = optim.orthogonalize(p @ g @ q)
    torch.testing.assert_close(left, p @ optim.orthogonalize(g) @ q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", co.NAMES)
def test_rank_one_keeps_its_sign(name):
    u, v = torch.randn(8), torch.randn(20)
    u, v = u / u.norm(), v / v.norm()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for factor in (1.0, 1e-6, 1e6):
            out = optim.orthogonalize(
                factor * torch.outer(u, v), None, coefficients=name, ns_dtype=dtype
            )
            # half precision also fills the null space with noise; the direction itself must hold
            assert 0.3 < float(u @ out @ v) < 1.4


@pytest.mark.parametrize(
    "g,message",
    [
        (torch.randn(3), "matrix"),
        (torch.randn(3, 3, dtype=torch.complex64), "floating"),
        (torch.ones(3, 3, dtype=torch.int64), "floating"),
        (torch.eye(3).to_sparse(), "dense"),
        (torch.eye(3).to(torch.float8_e4m3fn), "float16 to float64"),
    ],
)
def test_bad_input(g, message):
    with pytest.raises(ValueError, match=message):
        optim.orthogonalize(g)
    with pytest.raises(ValueError, match=r"G\[1\]"):
        optim.orthogonalize([torch.eye(2), g])


def test_bad_options():
    g = torch.eye(2)
    with pytest.raises(TypeError, match="NoneType"):
        optim.orthogonalize(None)
    for kw in (
        {"method": "magic"},
        {"normalization": "l1"},
        {"non_finite": "ignore"},
        {"eps": -1.0},
        {"ns_dtype": torch.int32},
        {"coefficients": "nope"},
        {"steps": 2.5},
        {"restarts": (9,), "method": "gram"},
    ):
        with pytest.raises(ValueError):
            optim.orthogonalize(g, **kw)


def test_operator_form():
    from normfuse.optim import polar

    x = torch.randn(2, 5, 7)
    args = (x, polar.flatten_schedule(co.resolve("you")), "auto", "frobenius", 0.0, None, None)
    torch.library.opcheck(
        polar.orthogonalize_op, args, test_utils=("test_schema", "test_faketensor")
    )
    np.testing.assert_allclose(
        polar.orthogonalize_op(*args).numpy(),
        optim.orthogonalize(x, coefficients="you").numpy(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_inside_a_compiled_function():
    g = torch.randn(2, 6, 7)
    kw = {"coefficients": [(2, -1.5, 0.5)], "steps": 3, "normalization": "schatten"}
    one = torch.compile(lambda x: optim.orthogonalize(x + 1, **kw) * 2, fullgraph=True)
    torch.testing.assert_close(one(g), 2 * optim.orthogonalize(g + 1, **kw))
    many = torch.compile(lambda xs: optim.orthogonalize(xs, coefficients="jordan"), fullgraph=True)
    xs = [g[0], g[1].T, g]
    for got, want in zip(many(xs), optim.orthogonalize(xs, coefficients="jordan"), strict=True):
        torch.testing.assert_close(got, want)
