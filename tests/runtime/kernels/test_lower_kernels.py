"""Which vocabulary ops become kernels, and what the compiler sees of them: on fake CUDA tensors."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

from normfuse.passes import ir
from normfuse.runtime import autotune_cache, devices
from normfuse.runtime.lower import expand
from normfuse.runtime.lower_kernels import kernels, lower_to_kernels

nf = torch.ops.normfuse
H100 = devices.by_name("NVIDIA H100 80GB HBM3")
F32 = torch.float32


def graph(f, *shapes, dtype=torch.bfloat16, device="cuda"):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        args = [torch.empty(s, dtype=dtype, device=device) for s in shapes]
        gm = make_fx(f, pre_dispatch=True)(*args)
    for n in gm.graph.nodes:
        if n.op == "placeholder":
            n.meta.update(kind="input", fqn=n.name)
        elif n.op == "call_function" and "normfuse" in str(n.target):
            n.meta["site"] = n.name
    return gm, mode, args


def deferred(act=None, own=True):
    def f(x, w, b, other):
        scale = nf.row_rstd(x if own else other, [-1], 1e-6, stat_dtype=F32)
        y = nf.scaled_linear(x, w, scale, b, out_dtype=torch.bfloat16)
        return y if act is None else act(y)

    return f


SHAPES = ((8, 4096), (4096, 4096), (4096,), (8, 4096))


def test_row_scale_behind_a_product_becomes_one_kernel():
    gm, *_ = graph(deferred(torch.nn.functional.silu), *SHAPES)
    done = lower_to_kernels(gm, "cuda", model=H100)
    assert [e.kernel for e in done if e.op == "scaled_linear"] == ["norm_linear"]
    assert "predicted faster on H100" in done[-1].reason
    text = targets(gm)
    assert text[0] == "normfuse_kernels.norm_linear.default" and "silu" not in " ".join(text)
    assert not any("row_rstd" in t for t in text)
    ir.check(gm)


def test_gelu_forms():
    for approximate in ("none", "tanh"):
        gm, *_ = graph(
            deferred(lambda y, a=approximate: torch.nn.functional.gelu(y, approximate=a)), *SHAPES
        )
        lower_to_kernels(gm, "cuda", policy="always")
        node = next(n for n in gm.graph.nodes if "norm_linear" in str(n.target))
        assert node.args[9] == ("gelu" if approximate == "none" else "gelu_tanh")


def test_activation_with_two_readers_stays():
    def f(x, w, b, other):
        y = deferred()(x, w, b, other)
        return torch.relu(y) + y

    gm, *_ = graph(f, *SHAPES)
    lower_to_kernels(gm, "cuda", policy="always")
    assert any("relu" in t for t in targets(gm))


def test_scale_of_another_tensor():
    gm, *_ = graph(deferred(own=False), *SHAPES)
    done = lower_to_kernels(gm, "cuda", model=H100)
    assert not any(e.kernel for e in done)
    assert "not the statistic of its own input" in done[0].reason
    gm, *_ = graph(deferred(own=False), *SHAPES)
    done = lower_to_kernels(gm, "cuda", policy="always")
    assert [e.kernel for e in done] == ["scaled_linear", "row_rstd"]


def test_large_products_stay_with_the_library():
    gm, *_ = graph(deferred(), (16384, 4096), (4096, 4096), (4096,), (16384, 4096))
    done = lower_to_kernels(gm, "cuda", model=H100)
    assert not any(e.kernel for e in done) and "not predicted faster" in done[0].reason


def test_plain_norms_stay_with_inductor_without_a_measurement():
    gm, *_ = graph(lambda x: nf.rms_norm(x, [-1], stat_dtype=F32), (8, 64))
    (entry,) = lower_to_kernels(gm, "cuda", model=H100)
    assert entry.kernel == "" and "no measurement" in entry.reason


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Records what ``benchmarks/kernels.py --tune`` would have found."""
    monkeypatch.setenv(autotune_cache.ENV, str(tmp_path))
    monkeypatch.setattr(autotune_cache, "_loaded", {})

    def record(kernel, sizes, faster):
        times = (1.0, 2.0) if faster else (2.0, 1.0)
        device = torch.device("cuda")
        autotune_cache.record_verdict(device, kernel, torch.bfloat16, sizes, *times)

    return record


def gated_pair(x, g, u):
    h = nf.rms_norm(x, [-1], stat_dtype=F32, out_dtype=x.dtype)
    return torch.nn.functional.silu(torch.nn.functional.linear(h, g)) * torch.nn.functional.linear(
        h, u
    )


MEASURED = {
    "norm": (lambda x: nf.rms_norm(x, [-1], stat_dtype=F32), ((8, 64),), (8, 64)),
    "add_norm": (
        lambda x, r: nf.add_rms_norm(x, r, [-1], stat_dtype=F32),
        ((8, 64), (8, 64)),
        (8, 64),
    ),
    "row_rstd": (lambda x: nf.row_rstd(x, [-1], 1e-6, stat_dtype=F32), ((8, 64),), (8, 64)),
    "gated_norm": (
        lambda x, d, u: nf.gated_rms_norm(x, [-1], None, None, d, u, stat_dtype=F32),
        ((4000, 4096), (16, 4096), (4096, 16)),
        (4096, 4096, 16),
    ),
    # the model would decline the first and take the second
    "norm_linear": (
        deferred(),
        ((16384, 4096), SHAPES[1], SHAPES[2], SHAPES[0]),
        (16384, 4096, 4096),
    ),
    "norm_linear pair": (gated_pair, ((8, 4096), (8192, 4096), (8192, 4096)), (8, 8192, 4096)),
}


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("kernel", MEASURED)
def test_a_measurement_decides(kernel, faster, measured):
    f, shapes, sizes = MEASURED[kernel]
    measured(kernel, sizes, faster)
    gm, *_ = graph(f, *shapes)
    done = lower_to_kernels(gm, "cuda", model=H100)
    said = "measured faster" if faster else "own code was measured faster"
    assert [e.kernel for e in done if said in e.reason] == [
        kernel.removesuffix(" pair") if faster else ""
    ]
    assert faster or not any(e.kernel for e in done)


def test_a_measurement_of_one_layer_does_not_speak_for_several(measured):
    """Each was measured with a norm of its own: the model decides, a slower one still declines."""

    def f(x, a, b):
        h = nf.rms_norm(x, [-1], stat_dtype=F32, out_dtype=x.dtype)
        return torch.nn.functional.linear(h, a), torch.nn.functional.linear(h, b)

    shapes = ((16384, 4096), (4096, 4096), (2048, 4096))
    measured("norm_linear", (16384, 4096, 4096), True)
    measured("norm_linear", (16384, 2048, 4096), True)
    gm, *_ = graph(f, *shapes)
    entry, *_ = lower_to_kernels(gm, "cuda", model=H100)
    assert entry.kernel == "" and "not predicted faster" in entry.reason
    measured("norm_linear", (16384, 2048, 4096), False)
    gm, *_ = graph(f, *shapes)
    entry, *_ = lower_to_kernels(gm, "cuda", model=H100)
    assert entry.kernel == "" and "own code was measured faster" in entry.reason


@pytest.mark.parametrize(
    "f, shapes, reason",
    [
        (lambda x: nf.rms_norm(x, [-1]), ((8, 64),), "statistic is taken in torch.bfloat16"),
        (
            lambda x: nf.rms_norm(x, [-1], floor=True, stat_dtype=F32),
            ((8, 64),),
            "bounded from below",
        ),
        (lambda x: nf.rms_norm(x, [-2, -1], stat_dtype=F32), ((8, 8, 64),), "last one"),
        (lambda x: nf.rms_norm(x, [-1], stat_dtype=F32, floor=True), ((8, 64),), "from below"),
        (lambda x: nf.row_rstd(x, [-1], stat_dtype=F32, floor=True), ((8, 64),), "from below"),
        (lambda x, g: nf.rms_norm(x, [-1], g, stat_dtype=F32), ((8, 64), (8, 1)), "per feature"),
        (
            lambda x, d, u: nf.gated_rms_norm(x, [-1], None, None, d, u, stat_dtype=F32),
            ((8, 64), (80, 64), (64, 80)),
            "rank is over 64",
        ),
        (lambda x: nf.rms_norm(x.t(), [-1], stat_dtype=F32), ((64, 8),), "contiguously"),
        (
            lambda x, r: nf.add_rms_norm(x, r, [-1], stat_dtype=F32),
            ((8, 64), (1, 64)),
            "broadcast",
        ),
    ],
)
def test_refusals(f, shapes, reason):
    gm, *_ = graph(f, *shapes)
    (entry,) = lower_to_kernels(gm, "cuda", policy="always")
    assert entry.kernel == "" and reason in entry.reason
    expand(gm)
    assert not any("normfuse" in t for t in targets(gm))


def test_cpu_graphs_are_left_alone():
    gm, *_ = graph(lambda x: nf.rms_norm(x, [-1]), (8, 64), device="cpu")
    assert lower_to_kernels(gm, "cpu", policy="always") == []


def test_unknown_devices_are_declined():
    gm, *_ = graph(deferred(), *SHAPES)
    done = lower_to_kernels(gm, "cuda")
    assert not any(e.kernel for e in done)


ALL = {
    "norm_fwd_tile": (lambda x, r: nf.layer_norm(x, [-1], stat_dtype=F32), ((8, 64), (8, 64))),
    "norm_partials": (
        lambda x, r: nf.rms_norm(x, [-1], stat_dtype=F32),
        ((8, 40000), (8, 40000)),
    ),
    "norm_fwd_tile+": (
        lambda x, r: nf.add_rms_norm(x, r, [-1], stat_dtype=F32),
        ((8, 64), (8, 64)),
    ),
    "gated_fwd": (
        lambda x, d, u: nf.gated_rms_norm(x, [-1], None, None, d, u, stat_dtype=F32),
        ((8, 64), (16, 64), (64, 16)),
    ),
    "norm_linear_split": (deferred(), SHAPES),
    "norm_linear_kernel": (deferred(), ((128, 256), (256, 256), (256,), (128, 256))),
}


def targets(gm):
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def launches(gm):
    """Names of the launched kernels; asserts that no op of ours is left."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    assert "normfuse" not in " ".join(targets(gm))
    kernels = [
        kernel_side_table.get_kernel(n.kwargs["kernel_idx"])
        for n in gm.graph.nodes
        if "triton_kernel_wrapper" in str(n.target)
    ]
    return [getattr(k, "fn", k).__name__ for k in kernels]


class Flat(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *args):
        out = self.f(*args)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)


class Loss(Flat):
    def forward(self, *args):
        return (sum(o.float().square().sum() for o in super().forward(*args)),)


@pytest.mark.parametrize("name", ALL)
def test_aot_tracing_sees_the_launches(name):
    """After AOT tracing no op of ours is left: only kernel launches Inductor can schedule."""
    from torch._functorch.aot_autograd import aot_export_module

    f, shapes = ALL[name]
    gm, mode, args = graph(f, *shapes)
    done = lower_to_kernels(gm, "cuda", policy="always")
    assert any(e.kernel for e in done)
    with mode, torch.no_grad():
        flat = aot_export_module(Flat(gm), args, trace_joint=False)[0]
    assert name.rstrip("+") in launches(flat)


def training_ops():
    nk = kernels()
    return {
        "norm_bwd_tile": (lambda x, g: nk.norm(x, g, None, 1e-6, "layer", None, F32)[0], (8, 64)),
        "norm_bwd_loop": (lambda x, g: nk.norm(x, g, None, 1e-6, "layer", None, F32)[0], (8, 9000)),
        "norm_bwd_columns": (
            lambda x, g: nk.add_norm(x, x * 2, g, None, 1e-6, "rms", None, F32)[:2],
            (8, 9000),
        ),
        "gated_bwd_rows": (
            lambda x, g: nk.gated_norm(
                x, g, None, x[:4] * 1.0, x[:4].t() * 1.0, 1e-6, 2.0, None, F32
            )[0],
            (8, 64),
        ),
    }


@pytest.mark.parametrize("name", training_ops())
def test_joint_graph_has_the_backward_launches(name):
    """On fake CPU tensors: PyTorch without CUDA cannot run autograd on fake CUDA tensors."""
    from torch._functorch.aot_autograd import aot_export_module

    f, shape = training_ops()[name]
    with FakeTensorMode():
        leaves = [torch.empty(s, requires_grad=True) for s in (shape, shape[-1:])]
        # without a GPU's triton driver all kernel arguments count as written: shield the leaves
        shielded = Loss(lambda x, g: f(x * 1.0, g * 1.0))
        joint = aot_export_module(shielded, leaves, trace_joint=True, output_loss_index=0)[0]
    assert name in launches(joint)


def test_dynamic_rows_add_no_guard():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    nk, env = kernels(), ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    x = mode.from_tensor(torch.empty(24, 64), static_shapes=False)
    w = mode.from_tensor(torch.empty(32, 64), static_shapes=True)
    guards = len(env.guards)
    with mode, torch.no_grad():
        y, _ = nk.norm(x, None, None, 1e-6, "layer", None, None)
        z, _ = nk.norm_linear(x, w, *(None,) * 5, 1e-6, "rms", "gelu", None)
    assert y.shape[0] is not None and str(z.shape[0]) == str(x.shape[0])
    new = [str(g.expr) for g in env.guards[guards:]]
    assert not any("24" in g or "<=" in g for g in new), new


def test_only_vocabulary_targets_have_plans():
    from normfuse.runtime.lower_kernels import _PLANS

    assert all(t.namespace == "normfuse" for t in _PLANS)
