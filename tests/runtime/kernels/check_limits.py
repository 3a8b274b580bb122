"""Determinism, offsets beyond 2³¹, and nothing left unwritten."""

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from interpreter import triton_ops
from normfuse.passes import ops
from normfuse.runtime.kernels import plans

BF16 = torch.bfloat16


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm(x, kind="layer"):
    return triton_ops.norm(x, randn(x.shape[1], seed=1), None, 1e-6, kind, None, torch.float32)


def linear(x, kind="layer", n=20):
    w, b = randn(n, x.shape[1], seed=1).to(x.dtype), randn(n, seed=2).to(x.dtype)
    return triton_ops.norm_linear(x, w, b, None, None, None, None, 1e-6, kind, "silu", None)


def scaled(x):
    w, s = randn(20, x.shape[1], seed=1).to(x.dtype), randn(x.shape[0], 1, seed=2)
    return (triton_ops.scaled_linear(x, w, s, None, None, None, "identity", None),)


def gated(x):
    d = x.shape[1]
    down, up = randn(4, d, seed=1).to(x.dtype), randn(d, 4, seed=2).to(x.dtype)
    return triton_ops.gated_norm(x, None, None, down, up, 1e-6, 2.0, None, None)


OPS = {
    "norm": norm,
    "add_norm": lambda x: triton_ops.add_norm(x, x, None, None, 1e-6, "crms", None, None),
    "row_rstd": lambda x: (triton_ops.row_rstd(x, 1e-6),),
    "norm_linear": linear,
    "scaled_linear": scaled,
    "gated_norm": gated,
}
SHAPES = {"tile": (5, 70), "long": (2, 16390), "split K": (3, 2100), "many rows": (70, 40)}


@contextlib.contextmanager
def deterministic():
    """PyTorch's mode also fills memory that is allocated empty with NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def values_and_gradients(name, x):
    x = x.clone().requires_grad_()
    out = OPS[name](x)
    found = [y for y in out if y.requires_grad]
    return [*out, *torch.autograd.grad(found, x, [torch.ones_like(y) for y in found])]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_deterministic_mode(name, shape):
    """Same bits, and every element of every result is written."""
    # the gated norm has one regime, and the interpreter is slow
    x = randn(*(SHAPES[shape] if name != "gated_norm" else (len(shape), 150)))
    plain = values_and_gradients(name, x)
    with deterministic():
        strict = values_and_gradients(name, x)
    for a, b in zip(plain, strict, strict=True):
        assert torch.isfinite(b).all() and torch.equal(a, b)


def test_the_shapes_reach_all_regimes():
    assert plans.norm_forward(2, 16390, 132).regime == "split"
    assert plans.gemm(3, 20, 2100, 4, 132).splits > 1
    assert plans.gemm(70, 20, 40, 4, 132).regime == "medium"


@pytest.fixture(scope="module")
def sparse():
    """Rows further apart than 2³¹ elements; what is never touched takes no memory."""
    try:
        base = torch.empty(2 * (2**31 + 64) + 64, dtype=BF16)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    return base.as_strided((3, 64), (2**31 + 64, 1))


@pytest.mark.parametrize("name", OPS)
def test_offsets_beyond_32_bits(name, sparse):
    x = randn(3, 64, dtype=BF16)
    sparse.copy_(x)
    for far, near in zip(OPS[name](sparse), OPS[name](x), strict=True):
        assert torch.equal(far, near)


def test_gradients_at_offsets_beyond_32_bits(sparse):
    x = randn(3, 64, dtype=BF16)
    sparse.copy_(x)
    dy, stats = randn(3, 64, dtype=BF16, seed=3), norm(x)[1]
    for h, g in ((sparse, dy), (x, sparse)):
        far = triton_ops.norm_backward(h, g, None, None, stats, "layer", True, None)
        near = triton_ops.norm_backward(x, g.clone(), None, None, stats, "layer", True, None)
        assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


@pytest.mark.parametrize("name", ["norm", "add_norm", "norm_linear", "gated_norm"])
def test_normalized_rows_are_not_kept_for_backward(name):
    """Inputs, the residual sum (which is a result), and what is small beside a row."""
    x, kept = randn(40, 300).requires_grad_(), []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = OPS[name](x)
    known = {t.data_ptr() for t in (x, *(out[1:2] if name == "add_norm" else ()))}
    assert any(t.data_ptr() in known for t in kept)
    large = [t.shape for t in kept if t.shape[:1] == x.shape[:1] and t.data_ptr() not in known]
    assert all(shape[1:].numel() <= 4 for shape in large), large


@pytest.mark.parametrize("name", ["norm", "add_norm", "norm_linear", "gated_norm"])
@pytest.mark.parametrize("linear_loss", [True, False])
def test_second_derivatives_are_refused(name, linear_loss):
    """Not wrong, not zero; a graph of gradients that nobody differentiates is fine."""
    x = randn(5, 70).requires_grad_()
    y = OPS[name](x)[0]
    loss = y.sum() if linear_loss else y.square().sum()
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(once, twice)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(twice.square().sum() + x.square().sum(), x)


@pytest.mark.parametrize("name", ["row_rstd", "scaled_linear"])
def test_second_derivatives_that_exist_are_right(name):
    def formula(x):
        if name == "row_rstd":
            return ops.row_rstd(x, [-1], 1e-6)
        w, s = randn(20, x.shape[1], seed=1).to(x.dtype), randn(x.shape[0], 1, seed=2).to(x.dtype)
        return torch.nn.functional.linear(x, w) * s

    found = []
    for f, x in ((lambda x: OPS[name](x)[0], randn(5, 70)), (formula, randn(5, 70).double())):
        x = x.requires_grad_()
        (g,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), x)[0])
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-4, atol=1e-4)
