"""Symmetric products and products with an addend, against float64."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from interpreter import DTYPES, check
from normfuse import optim
from normfuse.optim import coefficients as co
from normfuse.optim import kernel_products
from normfuse.runtime.kernels import plans, symmetric
from normfuse.runtime.triton_ops import launch
from normfuse.runtime.triton_ops import symmetric as ops

plain_launch = launch.launch


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(x, w, base, alpha, beta):
    y = alpha * (x @ w.mT)
    return y if base is None else y + beta * base


def once_rounded(x, w, base, alpha, beta):
    """Eager's best: float32 inside, one rounding at the end."""
    wide = (None if t is None else t.float() for t in (x, w, base))
    return plain(*wide, alpha, beta).to(x.dtype)


def compare(op, x, w, base=None, alpha=1.0, beta=0.0, slack=None):
    ours = op(x, w, base, alpha, beta)
    truth = plain(x.double(), w.double(), None if base is None else base.double(), alpha, beta)
    assert ours.shape == truth.shape and ours.dtype == x.dtype and ours.is_contiguous()
    check(ours, once_rounded(x, w, base, alpha, beta), truth, slack=slack)
    return ours


def exactly_symmetric(y):
    return torch.equal(y.nan_to_num(7.0), y.mT.nan_to_num(7.0))


def commuting(b, m, dtype, seed=0):
    """Symmetric matrices, the second a polynomial of the first; both rounded symmetrically."""
    s = randn(b, m, m, seed=seed).double() / m**0.5
    s = s + s.mT
    return s.to(dtype), (0.3 * s + s @ s + 0.1 * s @ s @ s).tril().to(dtype).double()


def symmetrized(b, m, dtype):
    s, low = commuting(b, m, dtype)
    return s, (low + low.tril(-1).mT).to(dtype)


@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    b=st.integers(1, 3),
    m=st.integers(1, 150),
    k=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-6, 1.0, 1e2]),
    tall=st.booleans(),
)
def test_gram_of_any_shape(b, m, k, dtype, scale, tall):
    if dtype == torch.float16 and scale != 1.0:
        scale = 1.0  # float16 holds neither square
    x = (randn(b, k, m).mT if tall else randn(b, m, k)).mul(scale).to(dtype)
    y = compare(ops.symmetric_product, x, x)
    assert exactly_symmetric(y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 64, 100])
def test_polynomials(m, dtype):
    """``b·A + c·A²`` and products of two commuting matrices."""
    s, t = symmetrized(2, m, dtype)
    for left, right, base in ((s, s, s), (s, t, s), (t, s, t)):
        y = compare(
            ops.symmetric_product, left, right, base, 2.0315, -4.775, slack=4 * eps_of(dtype)
        )
        assert exactly_symmetric(y)


def eps_of(dtype):
    # operands that are rounded commute to rounding only: which of the two halves is computed shows
    return torch.finfo(dtype).eps


@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    b=st.integers(1, 3),
    m=st.integers(1, 140),
    n=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    tall=st.booleans(),
    base=st.booleans(),
)
def test_application_of_any_shape(b, m, n, dtype, tall, base):
    """``a·X + B·X`` and, for a tall X, ``a·X + X·B``: nothing is transposed beforehand."""
    s = commuting(b, m, dtype)[0]
    x = randn(b, n, m, dtype=dtype) if tall else randn(b, m, n, dtype=dtype)
    left, right = (x, s) if tall else (s, x.mT)
    if base:
        compare(ops.add_product, left, right, x, 1.0, 3.4445)
    else:
        compare(ops.add_product, left, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [ops.symmetric_product, ops.add_product])
def test_any_strides(op, dtype):
    storage = randn(2, 140, 3, 70, dtype=dtype)
    views = {
        "rows apart": storage[:, ::2, 1],
        "columns apart": storage[:, :70, 1, ::3],
        "permuted": storage[:, :70, 0].permute(1, 0, 2)[:2],
        "expanded": storage[0, :70, 0].expand(2, 70, 70),
        "shifted": storage[1:, 1:70, 2, 5:],
    }
    for name, x in views.items():
        base = (x @ x.mT).tril()
        base = (base + base.tril(-1).mT).permute(1, 2, 0).contiguous().permute(2, 0, 1)
        y = op(x, x, base, 0.5, 2.0)
        args = (x.contiguous(), x.contiguous(), base.contiguous(), 0.5, 2.0)
        assert torch.equal(y, op(*args)), name
        assert y.is_contiguous()


@pytest.mark.parametrize("op", [ops.symmetric_product, ops.add_product])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_matrices_are_independent(op, bad):
    x, base = randn(3, 70, 50), randn(3, 70, 70)
    base = base + base.mT
    good = op(x, x, base, 2.0, 0.5)
    if bad == 0.0:
        x[1] = 0.0
    else:
        x[1, 3, 4] = bad
    y = op(x, x, base, 2.0, 0.5)
    assert torch.equal(y[0], good[0]) and torch.equal(y[2], good[2])
    if bad == 0.0:
        torch.testing.assert_close(y[1], 0.5 * base[1])
    else:
        # row and column 3 and nothing else
        spoiled = ~torch.isfinite(y[1])
        assert spoiled[3].all() and spoiled[:, 3].all()
        spoiled[3] = spoiled[:, 3] = False
        assert not spoiled.any()


@pytest.mark.parametrize("op", [ops.symmetric_product, ops.add_product])
def test_every_entry_is_stored_and_nothing_beyond(op, monkeypatch):
    """The result lies between two other matrices, all NaN beforehand."""

    def guarded(kernel, grid, on, *, out, **arguments):
        room = out.new_full((out.shape[0] + 2, *out.shape[1:]), float("nan"))
        plain_launch(kernel, grid, on, out=room[1:-1], **arguments)
        assert room[0].isnan().all() and room[-1].isnan().all()
        out.copy_(room[1:-1])

    monkeypatch.setattr(ops, "launch", guarded)
    for m in (1, 31, 64, 129):
        x = randn(2, m, 33)
        torch.testing.assert_close(op(x, x, None, 1.0, 0.0), x @ x.mT)


def test_wide_offsets_compute_the_same(monkeypatch):
    x, w = randn(2, 70, 90), randn(2, 90, 40).mT
    narrow = ops.add_product(x, w, None, 1.0, 0.0)
    seen = []

    def spy(kernel, grid, on, **arguments):
        seen.append(arguments["WIDE"])
        plain_launch(kernel, grid, on, **arguments)

    monkeypatch.setattr(ops, "launch", spy)
    assert torch.equal(ops.add_product(x, w, None, 1.0, 0.0), narrow)
    monkeypatch.setattr(ops, "_wide", lambda t: True)
    assert torch.equal(ops.add_product(x, w, None, 1.0, 0.0), narrow)
    assert seen == [False, True]


def test_when_offsets_are_wide():
    with torch.device("meta"):
        for x in (torch.empty(1, 1 << 16, 1 << 15), torch.empty(1 << 20, 64, 64)):
            assert ops._wide(x) is ops._wide(x.mT) is (x.shape[0] == 1)
        spread = torch.empty(1, 1024, 1 << 22)[:, :, :64]
        assert ops._wide(spread) and not ops._wide(spread.contiguous())


def test_half_of_the_tiles(monkeypatch):
    """Programs launched: the lower triangle's, for every matrix."""
    grids = []

    def counted(kernel, grid, on, **arguments):
        grids.append(grid)
        plain_launch(kernel, grid, on, **arguments)

    monkeypatch.setattr(ops, "launch", counted)
    x = randn(3, 190, 20)
    ops.symmetric_product(x, x, None, 1.0, 0.0)
    ops.add_product(x, x, None, 1.0, 0.0)
    assert plans.symmetric(3, 190, 4, 132).block == 64
    assert grids == [(3 * 6,), (3 * 9,)]


@triton.jit
def where_tiles_are(out, tiles, GROUP: tl.constexpr):
    i, j = symmetric.triangle_tile(tl.program_id(0), tiles, GROUP)
    tl.store(out + 2 * tl.program_id(0), i)
    tl.store(out + 2 * tl.program_id(0) + 1, j)


@pytest.mark.parametrize("tiles", [1, 7, 8, 19])
@pytest.mark.parametrize("group", [1, 4, 8, 16])
def test_every_tile_once_and_bands_in_order(tiles, group):
    out = torch.empty(tiles * (tiles + 1) // 2, 2, dtype=torch.int32)
    where_tiles_are[(out.shape[0],)](out, tiles, GROUP=group)
    found = [tuple(p) for p in out.tolist()]
    assert sorted(found) == [(i, j) for i in range(tiles) for j in range(i + 1)]
    assert [i // group for i, _ in found] == sorted(i // group for i, _ in found)


@triton.jit
def rows_of_numbers(numbers, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out + i, symmetric.row_of(tl.load(numbers + i)))


def test_rows_of_far_tiles():
    """Where float32 rounds the number of a tile: the first and last of rows up to 32,767."""
    rows = torch.tensor([*range(1, 64), *range(3000, 3064), *range(32704, 32768)])
    first, last = rows * (rows + 1) // 2, (rows + 1) * (rows + 2) // 2 - 1
    numbers = torch.cat([first, last, torch.tensor([0, 0])]).int()
    numbers = torch.nn.functional.pad(numbers, (0, 512 - len(numbers)))
    out = torch.empty_like(numbers)
    rows_of_numbers[(1,)](numbers, out, COUNT=512)
    assert out[: 2 * len(rows)].tolist() == [*rows.tolist(), *rows.tolist()]
    assert out[2 * len(rows) :].count_nonzero() == 0


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty(shape):
    x = torch.ones(shape)
    for op in (ops.symmetric_product, ops.add_product):
        assert torch.equal(op(x, x, None, 3.0, 0.0), x @ x.mT)
        base = torch.ones(shape[0], shape[1], shape[1])
        assert torch.equal(op(x, x, base, 3.0, 2.0), x @ x.mT + 2 * base)


def test_what_does_not_fit_is_refused():
    x = randn(2, 4, 5)
    f = ops.symmetric_product
    for args in ((x, x[0], None), (x, x[:1], None), (x, randn(2, 4, 6), None)):
        with pytest.raises(ValueError, match="of one length"):
            f(*args, 1.0, 0.0)
    with pytest.raises(ValueError, match="not symmetric"):
        f(x, randn(2, 3, 5), None, 1.0, 0.0)
    with pytest.raises(ValueError, match="one dtype"):
        f(x, x.half(), None, 1.0, 0.0)
    with pytest.raises(ValueError, match="cannot be added"):
        f(x, x, x, 1.0, 1.0)


def test_float64_is_left_to_torch(monkeypatch):
    def unwanted(*args, **kwargs):
        raise AssertionError("launched")

    monkeypatch.setattr(ops, "launch", unwanted)
    x = randn(2, 8, 5).double()
    base = x @ x.mT
    torch.testing.assert_close(ops.symmetric_product(x, x, base, 2.0, -1.0), base)
    assert not ops.runs(x.dtype, x.device) and ops.runs(torch.float32, x.device)
    assert not ops.runs(torch.int32, x.device) and not ops.runs(torch.float32, torch.device("meta"))


@pytest.mark.parametrize("op", [ops.symmetric_product, ops.add_product])
@pytest.mark.parametrize("with_base", [False, True])
def test_gradients(op, with_base):
    x, w = randn(2, 7, 5).requires_grad_(), randn(2, 7, 5, seed=1).requires_grad_()
    base = randn(2, 7, 7, seed=2).requires_grad_() if with_base else None
    leaves = [t for t in (x, w, base) if t is not None]
    g = randn(2, 7, 7, seed=3)
    ours = torch.autograd.grad(op(x, w, base, 1.5, 0.5), leaves, g)
    torch.testing.assert_close(
        ours, torch.autograd.grad(plain(x, w, base, 1.5, 0.5), leaves, g), rtol=1e-5, atol=1e-5
    )


def test_a_kernel_that_fails_is_replaced(monkeypatch):
    def fails(*args, **kwargs):
        raise launch.KernelFailed("no")

    x, base = randn(2, 30, 50), randn(2, 30, 30)
    base = base + base.mT
    good = ops.symmetric_product(x, x, base, 0.5, 2.0)
    said = []
    monkeypatch.setattr(ops, "launch", fails)
    monkeypatch.setattr(launch, "_warn_once", lambda name, failure: said.append(name))
    y = ops.symmetric_product(x, x, base, 0.5, 2.0)
    torch.testing.assert_close(y, good)
    assert exactly_symmetric(y)
    torch.testing.assert_close(ops.add_product(x, x, None, 0.5, 0.0), 0.5 * x @ x.mT)
    assert said == ["symmetric_product", "add_product"]


@pytest.mark.parametrize("setting,want", [("ieee", "ieee"), ("tf32", "tf32")])
def test_float32_as_precise_as_torch_is_set_to(setting, want, monkeypatch):
    seen = []
    monkeypatch.setattr(ops, "launch", lambda k, g, on, **a: seen.append(a["PRECISION"]))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        x = randn(1, 8, 5)
        ops.symmetric_product(x, x, None, 1.0, 0.0)
        ops.symmetric_product(x.half(), x.half(), None, 1.0, 0.0)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert seen == [want, "ieee"]


# -- inside Newton–Schulz ----------------------------------------------------------------------------


def iterated(x, schedule):
    """The defining loop in float64."""
    x = x.double()
    norm = x.norm(dim=(-2, -1), keepdim=True)
    x = x / torch.where(norm > 0, norm, 1.0)
    turned = x.shape[-2] > x.shape[-1]
    x = x.mT if turned else x
    for a, b, c in schedule:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if turned else x


def relative(y, truth):
    return float((y.double() - truth).norm() / truth.norm().clamp(min=1e-30))


BANDS = {torch.float32: {"direct": 3e-4, "gram": 5e-4}, torch.float16: 2e-2, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["direct", "gram"])
@pytest.mark.parametrize("shape", [(66, 72), (72, 66), (2, 1, 9)])
def test_orthogonalize(dtype, method, shape):
    """The whole iteration through the kernels: within the documented bands of the CPU's."""
    x = randn(*shape)
    options = {"method": method, "coefficients": "jordan", "ns_dtype": dtype}
    with kernel_products.kernels("always"):
        ours = optim.orthogonalize(x, **options)
    band = BANDS[dtype] if dtype != torch.float32 else BANDS[dtype][method]
    assert relative(ours, iterated(x, co.resolve("jordan"))) < band
    with kernel_products.kernels("never"):
        assert relative(ours, optim.orthogonalize(x, **options).double()) < band


@pytest.mark.parametrize("method", ["direct", "gram"])
def test_partly_kernels_partly_library(method, monkeypatch):
    x = randn(1, 20, 28)
    truth = iterated(x, co.resolve("you"))
    for flags in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        found = kernel_products.KernelProducts(*map(bool, flags))
        monkeypatch.setattr(kernel_products, "choose", lambda *a, found=found: found)
        for turned in (False, True):
            y = optim.orthogonalize(x.mT if turned else x, 5, method, coefficients="you")
            assert relative(y.mT if turned else y, truth) < 2e-5


@pytest.mark.parametrize("normalization", ["frobenius", "schatten", "aol"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_one_matrix_spoils_only_itself(normalization, bad):
    x = randn(3, 10, 15)
    with kernel_products.kernels("always"):
        good = optim.orthogonalize(x, 2, normalization=normalization)
        if bad == 0.0:
            x[1] = 0.0
        else:
            x[1, 2, 3] = bad
        y = optim.orthogonalize(x, 2, normalization=normalization)
    assert torch.equal(y[[0, 2]], good[[0, 2]])
    assert y[1].count_nonzero() == 0


def test_steps_of_an_optimizer():
    """Muon with kernels and without, two steps: the same parameters to rounding."""
    results = []
    for choice in ("always", "never"):
        torch.manual_seed(0)
        ps = [torch.nn.Parameter(torch.randn(s)) for s in ((20, 30), (30, 20), (20, 30))]
        with kernel_products.kernels(choice):
            opt = optim.Muon(ps, lr=0.1)
            for _ in range(2):
                for p in ps:
                    p.grad = torch.randn(p.shape)
                opt.step()
        results.append(ps)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
