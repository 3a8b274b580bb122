"""The code Inductor writes around our kernels, for a GPU that is not here: launches and nothing else.

Backward launches with sums behind them are in ``test_lower_kernels.py``: PyTorch without CUDA cannot
trace sums of fake CUDA tensors.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

import fake_gpu
from normfuse.runtime.kernels import plans
from normfuse.runtime.lower_kernels import kernels, lower_to_kernels
from normfuse.runtime.triton_ops import linear as linear_ops

F32, BF16 = torch.float32, torch.bfloat16
nf = torch.ops.normfuse


def empty(*shape, dtype=BF16):
    return lambda device: torch.empty(shape, dtype=dtype, device=device)


ROWS, VECTOR = empty(8, 64), empty(64)
X, W = empty(4096, 512), empty(1024, 512)


def linear(kind, act="identity"):
    def f(x, w, up=None, sums=None):
        args = (x, w, None, sums, up, None, None, 1e-6, kind, act, None)
        return kernels().norm_linear(*args)[0]

    return f


def gated(x, down, up):
    return kernels().gated_norm(x, None, None, down, up, 1e-6, 2.0, F32, BF16)[0]


def backward(kind):
    return lambda x, dy, stats: kernels().norm_backward(
        x, dy, None, None, stats, kind, False, None
    )[0]


#: Name: function, inputs, kernels of ours in their order.
CASES = {
    "norm": (
        lambda x, g: kernels().norm(x, g, None, 1e-6, "rms", F32, BF16)[0],
        (ROWS, VECTOR),
        ["norm_fwd_tile"],
    ),
    "long norm": (
        lambda x: kernels().norm(x, None, None, 1e-6, "layer", F32, BF16)[0],
        (empty(8, 40000),),
        ["norm_partials", "norm_apply"],
    ),
    "add_norm": (
        lambda x, r: kernels().add_norm(x, r, None, None, 1e-6, "layer", F32, BF16)[:2],
        (ROWS, ROWS),
        ["norm_fwd_tile"],
    ),
    "norm, backward": (backward("rms"), (ROWS, ROWS, empty(1, 8, dtype=F32)), ["norm_bwd_tile"]),
    "long norm, backward": (
        backward("layer"),
        (empty(8, 40000), empty(8, 40000), empty(2, 8, dtype=F32)),
        ["norm_bwd_loop"],
    ),
    "norm_linear": (linear("rms", "silu"), (empty(128, 512), W), ["norm_linear_kernel"]),
    "norm_linear, LayerNorm": (
        lambda x, w, sums: linear("layer")(x, w, None, sums),
        (empty(128, 512), W, empty(1024, dtype=F32)),
        ["norm_linear_kernel"],
    ),
    "norm_linear, few rows": (
        linear("rms"),
        (empty(8, 4096), empty(4096, 4096)),
        ["norm_linear_split", "norm_linear_finish"],
    ),
    "norm_linear, pair": (linear("rms", "silu"), (X, W, W), ["norm_linear_kernel"]),
    "norm_linear, float32 rows": (
        linear("rms"),
        (empty(128, 512, dtype=F32), W),
        ["norm_linear_kernel"],
    ),
    "norm_linear, descriptors": (linear("rms"), (X, W), ["norm_linear_persistent"]),
    "gated_norm": (gated, (ROWS, empty(16, 64), empty(64, 16)), ["gated_fwd"]),
}


class Flat(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *args):
        out = self.f(*args)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def traced(f, makers, device):
    from torch._functorch.aot_autograd import aot_export_module

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        args = [make(device) for make in makers]
        return aot_export_module(Flat(f), args, trace_joint=False)[0], args, mode


def launched(text):
    """Kernels of ours and of Inductor, in the order of the generated code."""
    names = re.findall(r"^\s*(\w+?)(?:_\d+)?\.run\(", text, re.M)
    return [n for n in names if not n.startswith("triton_")], [
        n for n in names if n.startswith("triton_")
    ]


def generated(name, monkeypatch, device="cuda:0"):
    f, makers, wanted = CASES[name]
    if "descriptors" in name:
        plan = plans.GemmPlan("large", 128, 128, 64, 8, 3, descriptors=True)
        monkeypatch.setattr(linear_ops, "tuned", lambda *args, **options: plan)
    with fake_gpu.pretended():
        gm, args, mode = traced(f, makers, device)
        return fake_gpu.code(gm, args, mode), wanted


@pytest.mark.parametrize("name", CASES)
def test_launches_without_copies(name, monkeypatch):
    text, wanted = generated(name, monkeypatch)
    ours, others = launched(text)
    assert (ours, others) == (wanted, [])
    for word in ("clone", "copy_", "reinterpret_tensor(arg", "extern_kernels"):
        assert word not in text, word


@pytest.mark.parametrize("name", ["norm", "norm_linear, descriptors", "norm_linear, few rows"])
def test_another_device_and_its_stream(name, monkeypatch):
    text, wanted = generated(name, monkeypatch, "cuda:1")
    assert launched(text)[0] == wanted
    assert "_DeviceGuard(1)" in text and "get_raw_stream(1)" in text
    assert len(re.findall(r"stream=(?:raw_)?stream1\)", text)) == len(wanted)
    assert "stream0" not in text


def test_vocabulary_ops_of_a_block_and_what_is_around_them():
    """What is left around a kernel Inductor fuses as ever."""

    def f(x, w, g):
        y = nf.rms_norm(x * 2, [-1], g, stat_dtype=F32, out_dtype=BF16)
        scale = nf.row_rstd(y, [-1], 1e-6, stat_dtype=F32)
        return nf.scaled_linear(y, w, scale, out_dtype=BF16).relu() + 1

    with fake_gpu.pretended():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            args = [m("cuda:0") for m in (empty(128, 512), W, empty(512))]
            gm = make_fx(f, pre_dispatch=True)(*args)
        for n in gm.graph.nodes:
            n.meta.update(kind="input", fqn=n.name) if n.op == "placeholder" else None
        done = lower_to_kernels(gm, "cuda", policy="always")
        assert [e.kernel for e in done if e.kernel] == ["norm_linear", "norm"]
        flat, args, mode = traced(gm, (empty(128, 512), W, empty(512)), "cuda:0")
        ours, others = launched(fake_gpu.code(flat, args, mode))
    assert ours == ["norm_fwd_tile", "norm_linear_kernel"]
    assert len(others) == 2, others


def test_workspace_comes_from_pytorch_unless_the_user_chose_otherwise():
    """What eager launches of kernels with descriptors need; compiled graphs provide it themselves."""
    from contextvars import copy_context

    import triton
    from normfuse.runtime.triton_ops import launch
    from triton.runtime import _allocation

    def chosen():
        launch._give_workspace(torch.device("cpu"))
        found = _allocation._allocator
        return found.get() if hasattr(found, "get") else found

    def run():
        got = chosen()(256, 128, None)
        assert got.numel() == 256 and got.dtype == torch.uint8

        def own(size, alignment, stream):
            return None

        triton.set_allocator(own)
        assert chosen() is own

    copy_context().run(run)
