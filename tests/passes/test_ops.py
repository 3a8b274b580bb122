"""The vocabulary: defining formulas against PyTorch's own norms, in every registration path."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from normfuse.passes import ops
from torch.fx.experimental.proxy_tensor import make_fx

nf = torch.ops.normfuse
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def native_dtypes(dtype):
    stat = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    return {"stat_dtype": stat, "norm_dtype": stat, "out_dtype": dtype}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_is_bit_exact_against_torch(dtype, affine):
    x = torch.randn(3, 5, 16).to(dtype)
    gain, bias = (torch.randn(16).to(dtype), torch.randn(16).to(dtype)) if affine else (None, None)
    ours = nf.layer_norm(x, [-1], gain, bias, 1e-5, **native_dtypes(dtype))
    assert torch.equal(ours, F.layer_norm(x, (16,), gain, bias, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_formula_without_the_native_kernel(dtype):
    # a [1, 1, d] gain is no native call: the formula itself must agree to rounding
    x, gain = torch.randn(3, 5, 16).to(dtype), torch.randn(1, 1, 16).to(dtype)
    ours = nf.layer_norm(x, [-1], gain, None, 1e-5, **native_dtypes(dtype))
    theirs = F.layer_norm(x, (16,), gain.view(16), None, 1e-5)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [[-1], [-2, -1]])
def test_rms_norm_against_torch(dtype, dims):
    x = torch.randn(4, 6, 8).to(dtype)
    shape = x.shape[3 - len(dims) :]
    gain = torch.randn(shape).to(dtype)
    ours = nf.rms_norm(x, dims, gain, None, 1e-6, **native_dtypes(dtype))
    torch.testing.assert_close(ours, F.rms_norm(x, shape, gain, 1e-6))


def test_inner_dims_normalize_channels():
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    ours = nf.layer_norm(x, [-3], None, None, 1e-5)
    theirs = F.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, theirs)


def test_cast_order_is_part_of_the_contract():
    x = torch.randn(64, 128).to(torch.bfloat16) * 3
    gain = torch.randn(128).to(torch.bfloat16)
    early = nf.rms_norm(
        x,
        [-1],
        gain,
        stat_dtype=torch.float32,
        norm_dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
    )
    late = nf.rms_norm(
        x,
        [-1],
        gain,
        stat_dtype=torch.float32,
        norm_dtype=torch.float32,
        out_dtype=torch.bfloat16,
    )
    h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(early, h.to(torch.bfloat16) * gain)
    assert torch.equal(late, (h * gain).to(torch.bfloat16))
    assert not torch.equal(early, late)


def test_compressed_rms_norm_equals_rms_norm_of_the_completed_vector():
    x = torch.randn(5, 7, dtype=torch.float64)
    full = torch.cat([x, -x.sum(-1, keepdim=True)], -1)
    torch.testing.assert_close(
        nf.crms_norm(x, None, None, 1e-5), nf.rms_norm(full, [-1], None, None, 1e-5)[..., :-1]
    )


def test_residual_forms_read_the_rounded_sum():
    x, r = (torch.randn(9, 32).to(torch.bfloat16) for _ in range(2))
    kwargs = native_dtypes(torch.bfloat16)
    for name in ("rms_norm", "layer_norm"):
        y, stream = getattr(nf, f"add_{name}")(x, r, [-1], None, None, 1e-5, **kwargs)
        assert torch.equal(stream, x + r)
        assert torch.equal(y, getattr(nf, name)(x + r, [-1], None, None, 1e-5, **kwargs))


def test_scaled_linear_is_the_deferred_norm():
    x, w, b = torch.randn(4, 8).double(), torch.randn(6, 8).double(), torch.randn(6).double()
    deferred = nf.scaled_linear(x, w, nf.row_rstd(x, [-1], 1e-6), b)
    torch.testing.assert_close(deferred, F.linear(nf.rms_norm(x, [-1], None, None, 1e-6), w, b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_is_exactly_one_at_insertion(dtype):
    x = torch.randn(4, 8).to(dtype)
    down, up = torch.randn(2, 8).to(dtype), torch.zeros(8, 2).to(dtype)
    gated = nf.gated_rms_norm(x, [-1], None, None, down, up)
    assert torch.equal(gated, nf.rms_norm(x, [-1], None, None))


def test_gradients_in_float64():
    x, g, b = (torch.randn(*s).double().requires_grad_() for s in ((3, 6), (6,), (6,)))
    for op in (nf.layer_norm, nf.rms_norm):
        assert torch.autograd.gradcheck(lambda x, g, b, op=op: op(x, [-1], g, b, 1e-5), (x, g, b))
    assert torch.autograd.gradcheck(lambda x: nf.crms_norm(x, None, None, 1e-5), (x,))
    assert torch.autograd.gradcheck(lambda x: nf.row_rstd(x, [-1], 1e-5), (x,))
    assert torch.autograd.gradcheck(lambda x: nf.center(x, [-1]), (x,))


def test_ops_stay_whole_before_autograd_and_vanish_after_it():
    x = torch.randn(2, 8)
    run = lambda x: nf.rms_norm(x, [-1], None, None, 1e-6)  # noqa: E731
    whole = make_fx(run, pre_dispatch=True)(x)
    assert any(n.target is nf.rms_norm.default for n in whole.graph.nodes)
    flat = make_fx(run)(x)
    assert not any("normfuse" in str(n.target) for n in flat.graph.nodes)


def test_vmap_and_meta_and_empty():
    x = torch.randn(3, 4, 8)
    batched = torch.vmap(lambda t: nf.rms_norm(t, [-1], None, None))(x)
    torch.testing.assert_close(batched, nf.rms_norm(x, [-1], None, None))
    assert nf.layer_norm(x.to("meta"), [-1]).shape == x.shape
    assert nf.rms_norm(torch.empty(0, 8), [-1]).shape == (0, 8)


def test_nan_rows_stay_in_their_rows():
    x = torch.randn(4, 8)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    for op in (nf.rms_norm, nf.layer_norm):
        y = op(x, [-1], None, None, 1e-6)
        assert torch.isfinite(y[0]).all() and torch.isfinite(y[3]).all()
        assert torch.isnan(y[1]).all() and torch.isnan(y[2]).any()


def test_formula_lookup():
    assert ops.formula(nf.rms_norm.default) is ops.rms_norm


@pytest.mark.parametrize("name", sorted(ops._FORMULAS))
def test_defaults_of_schema_and_formula_agree(name):
    """The dispatcher drops arguments equal to the schema's default before it calls the formula."""
    parameters = inspect.signature(ops._FORMULAS[name]).parameters
    for argument in getattr(nf, name).default._schema.arguments:
        default = parameters[argument.name].default
        if argument.has_default_value():
            assert default == argument.default_value, argument.name
        else:
            assert default is inspect.Parameter.empty, argument.name


def test_the_gates_gradient_is_added_by_its_product():
    """Both parts of y's gradient meet as matrices: ``mm`` and ``add`` with nothing between them."""
    y = torch.randn(2, 5, 8, requires_grad=True)
    down, up = torch.randn(3, 8), torch.randn(8, 3)

    def gradient(y):
        return torch.autograd.grad(nf.self_gate(y, down, up).sum(), y)[0]

    graph = make_fx(gradient)(y).graph
    sums = graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    assert any(torch.ops.aten.mm.default in {a.target for a in n.all_input_nodes} for n in sums)


@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 5, 8), (0, 5, 8), (2, 0, 3, 8)])
def test_the_gate_is_the_same_for_every_rank(shape):
    y = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    down, up = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    want = y * 2 * torch.sigmoid(F.silu(y @ down.T) @ up.T)
    got = nf.self_gate(y, down, up)
    assert got.shape == y.shape
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(y)
    (a,), (b,) = (torch.autograd.grad((out * weight).sum(), y) for out in (got, want))
    torch.testing.assert_close(a, b)


def test_a_gate_keeps_the_memory_layout():
    y = torch.randn(5, 2, 8).transpose(0, 1)
    down, up = torch.randn(3, 8), torch.randn(8, 3)
    out = nf.self_gate(y, down, up)
    assert out.stride() == y.stride()
    torch.testing.assert_close(out, nf.self_gate(y.contiguous(), down, up))
