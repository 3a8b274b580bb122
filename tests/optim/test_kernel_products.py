"""Where symmetric kernels are used, and what a compiler sees of them: on fake CUDA tensors.

What they compute is checked under the interpreter, in ``tests/runtime/kernels/check_symmetric.py``.
"""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from normfuse import optim
from normfuse.optim import coefficients as co
from normfuse.optim import kernel_products as kp
from normfuse.optim import newton_schulz as ns
from normfuse.optim import pipeline, polar
from normfuse.runtime import autotune_cache, devices
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime" / "kernels"))

import fake_gpu

CUDA = torch.device("cuda")
HALF = torch.float16
H100 = devices.by_name("NVIDIA H100 80GB HBM3")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(autotune_cache.ENV, str(tmp_path))
    monkeypatch.setattr(autotune_cache, "_loaded", {})
    monkeypatch.delenv(kp.ENV, raising=False)


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(devices, "find", lambda device: H100 if device.type == "cuda" else None)


def test_the_switch(monkeypatch):
    assert kp.policy() == "auto"
    monkeypatch.setenv(kp.ENV, "never")
    assert kp.policy() == "never" and kp.choose(64, 768, 3072, HALF, CUDA) is None
    with kp.kernels("always"):
        assert kp.policy() == "always"
        with kp.kernels("auto"):
            assert kp.policy() == "auto"
        found = kp.choose(1, 8, 8, HALF, CUDA)
        assert (found.by_gram, found.by_symmetric, found.by_apply) == (True, True, True)
        assert kp.choose(1, 8, 8, torch.float64, CUDA) is None
        assert kp.choose(1, 8, 8, torch.float32, torch.device("cpu")) is None
    monkeypatch.setenv(kp.ENV, "sometimes")
    with pytest.raises(ValueError, match=r"NORMFUSE_SYMMETRIC_KERNELS.*sometimes"):
        kp.policy()
    with pytest.raises(ValueError, match="sometimes"), kp.kernels("sometimes"):
        pass


def test_automatic_choice(h100, monkeypatch):
    """Large batches of large matrices in half precision; nothing else."""
    many = kp.choose(48, 768, 3072, HALF, CUDA)
    assert many.by_gram and many.by_symmetric and 0.5 < many.share < 0.9
    assert kp.choose(1, 4096, 4096, torch.bfloat16, CUDA).by_symmetric
    assert kp.choose(48, 192, 768, HALF, CUDA) is None  # too small
    assert kp.choose(48, 768, 3072, torch.float32, CUDA) is None  # without tensor cores
    one = kp.choose(1, 768, 768, HALF, CUDA)
    assert one is None or not one.by_gram  # 21 tiles for 132 processors
    monkeypatch.setattr(devices, "find", lambda device: None)
    assert kp.choose(48, 768, 3072, HALF, CUDA) is None  # unknown device


def test_prediction_is_against_us():
    """Never more promised than the FLOPs allow, and nothing without enough tiles."""
    for batch in (1, 8, 64):
        for m, n in ((256, 1024), (768, 768), (1024, 4096), (4096, 4096)):
            for kind in ("gram", "symmetric", "apply"):
                ours, library = kp.predicted(kind, batch, m, n, 2, H100)
                assert ours > 0 and library > 0 and library / ours < 2.0
    few, _ = kp.predicted("gram", 1, 768, 3072, 2, H100)
    many, _ = kp.predicted("gram", 100, 768, 3072, 2, H100)
    assert many < 100 * few
    exact, _ = kp.predicted("gram", 8, 1024, 4096, 4, H100)
    fast, _ = kp.predicted("gram", 8, 1024, 4096, 4, H100, tf32=True)
    assert fast < exact


def test_a_measurement_outweighs_the_prediction(h100):
    cuda = torch.device("cuda")
    assert kp.choose(48, 768, 3072, HALF, cuda).by_symmetric
    autotune_cache.record_verdict(
        cuda, kp.verdict_name("symmetric", 768, 3072), HALF, (48, 768), ours=2.0, inductor=1.0
    )
    found = kp.choose(48, 768, 3072, HALF, cuda)
    assert found.by_gram and not found.by_symmetric and found.share == 1.0
    assert not kp.choose(48, 768, 768, HALF, cuda).by_symmetric  # the same square
    autotune_cache.record_verdict(
        cuda, kp.verdict_name("apply", 768, 768), HALF, (1, 768), ours=1.0, inductor=2.0
    )
    assert kp.choose(1, 768, 768, HALF, cuda).by_apply


def test_the_form_is_chosen_by_what_products_cost():
    """Square symmetric products at 0.6 of their price turn 1:1.6 matrices to the Gram form."""
    schedule = co.resolve("you")
    cheap = kp.KernelProducts(True, True, True, 0.6)
    plain = ns.make_plan(1024, 1664, schedule, HALF, "cuda", restarts=(2,))
    ours = ns.make_plan(1024, 1664, schedule, HALF, "cuda", restarts=(2,), kernels=cheap)
    assert plain.kernels is None and ours.kernels is cheap and ours.halvings == 0
    assert (
        ours.flops
        == min(ns.flops(1024, 1664, schedule, r, 0.6) for r in (None, (2,)))
        < plain.flops
    )


def calls(gm):
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def trace(f, *shapes, dtype=torch.float32):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        args = [torch.empty(s, dtype=dtype, device="cuda") for s in shapes]
        return make_fx(f)(*args), mode, args


@pytest.mark.parametrize("method", ["direct", "gram"])
@pytest.mark.parametrize("shape", [(16, 768, 3072), (16, 3072, 768)])
def test_a_compiler_sees_the_launches(h100, method, shape):
    """The whole iteration is in the graph; after AOT tracing, kernel launches and nothing of ours."""
    from torch._functorch.aot_autograd import aot_export_module
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    s = polar.settings(coefficients="you", method=method, ns_dtype=HALF)
    gm, mode, args = trace(lambda x: (polar.apply_settings(x, s),), shape)
    found = calls(gm)
    symmetric = sum("symmetric_product" in c for c in found)
    applied = sum("add_product" in c for c in found)
    plan = ns.make_plan(*shape[1:], s.schedule, HALF, "cuda", method)
    restarts = len(plan.restarts)
    steps = len(s.schedule)
    if method == "direct":
        assert symmetric == 2 * steps and applied in (0, steps)
    else:
        segments = restarts + 1
        accumulated = steps - segments
        assert symmetric == segments + steps + accumulated + 2 * (steps - segments)
        assert applied == 0
    assert not any("normfuse_optim" in c for c in found)
    with mode, torch.no_grad():
        flat = aot_export_module(gm, args, trace_joint=False)[0]
    assert "normfuse" not in " ".join(calls(flat))
    kernels = [
        kernel_side_table.get_kernel(n.kwargs["kernel_idx"])
        for n in flat.graph.nodes
        if "triton_kernel_wrapper" in str(n.target)
    ]
    assert len(kernels) == symmetric + applied
    assert {getattr(k, "fn", k).__name__ for k in kernels} == {"batched_product"}


@pytest.mark.parametrize("method", ["direct", "gram"])
def test_inductors_code_for_a_gpu(h100, method):
    """Normalization in a few kernels of its own, then launches of ours: no copies, nothing opaque."""
    from torch._functorch.aot_autograd import aot_export_module
    from torch._inductor.decomposition import select_decomp_table

    class Step(torch.nn.Module):
        def forward(self, x):
            return (polar.apply_settings(x, s),)

    s = polar.settings(coefficients="you", method=method, ns_dtype=HALF)
    with fake_gpu.pretended(), kp.kernels("always"):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, torch.no_grad():
            args = [torch.empty(16, 768, 3072, device="cuda:0")]
            flat = aot_export_module(
                Step(), args, trace_joint=False, decompositions=select_decomp_table()
            )[0]
        text = fake_gpu.code(flat, args, mode)
    launches = re.findall(r"^\s*(\w+?)(?:_\d+)?\.run\(", text, re.M)
    ours = [n for n in launches if n == "batched_product"]
    # direct: three products a step; Gram with one restart: see the test above, and two plain products
    assert len(ours) == (15 if method == "direct" else 16)
    assert text.count("extern_kernels.") == (0 if method == "direct" else 2)
    assert len(launches) - len(ours) <= 6
    for word in ("clone", "copy_", "normfuse_optim", "reinterpret_tensor(arg"):
        assert word not in text, word


def test_without_kernels_a_graph_has_one_operator(h100):
    s = polar.settings(coefficients="you", ns_dtype=HALF)
    with kp.kernels("never"):
        gm, *_ = trace(lambda x: polar.apply_settings(x, s), (16, 768, 3072))
    assert [c for c in calls(gm) if "aten" not in c] == ["normfuse_optim.orthogonalize.default"]


def test_slices_of_a_large_batch(h100, monkeypatch):
    monkeypatch.setattr(polar, "MAX_SCRATCH_BYTES", 16 * (3 * 768**2 + 3 * 768 * 1024) * 2)
    s = polar.settings(ns_dtype=HALF, method="direct")
    gm, *_ = trace(lambda x: polar.apply_settings(x, s), (40, 768, 1024), dtype=torch.bfloat16)
    assert gm.graph.find_nodes(op="output")[0].args[0].meta["val"].shape == (40, 768, 1024)
    assert sum("symmetric_product" in c for c in calls(gm)) == 3 * 2 * 5


@pytest.mark.parametrize("method", ["direct", "gram"])
@pytest.mark.parametrize("shape", [(3, 20, 33), (3, 33, 20), (2, 1, 9), (2, 12, 12)])
@pytest.mark.parametrize("normalization", ["frobenius", "schatten", "aol"])
def test_functional_products_compute_the_same(method, shape, normalization, monkeypatch):
    """The form with kernels, computed by its formulas, against the form that reuses memory."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    for steps in (5, 3, 0):
        options = {"steps": steps, "method": method, "normalization": normalization}
        want = optim.orthogonalize(x, coefficients="you", **options)
        with monkeypatch.context() as patch:
            patch.setattr(kp, "choose", lambda *a: kp.KernelProducts(True, True, True))
            got = optim.orthogonalize(x, coefficients="you", **options)
            half = optim.orthogonalize(x.bfloat16(), coefficients="you", **options)
        assert got.is_contiguous() and got.data_ptr() != x.data_ptr()
        # the band of the Gram form in float32
        assert (got - want).norm() <= 5e-4 * want.norm()
        assert half.dtype == torch.bfloat16 and half.shape == x.shape
    assert torch.equal(x, before)


def muon(compile):
    torch.manual_seed(0)
    # float64, iterating in float32: no host decision on the way, as on GPUs
    ps = [torch.nn.Parameter(torch.randn(12, 20).double()) for _ in range(3)]
    for p in ps:
        p.grad = torch.randn(12, 20).double()
    return ps, optim.Muon(ps, lr=0.1, compile=compile, ns_dtype=torch.float32)


def test_a_step_whose_kernels_do_not_compile(monkeypatch):
    """Inductor has no Triton for CPUs: the step is compiled again without kernels, with one warning."""
    monkeypatch.setattr(pipeline, "COMPILED", pipeline.CompileCache())
    monkeypatch.setattr("normfuse.optim.buckets.COMPILED", pipeline.COMPILED)
    ps, plain = muon(compile=False)
    plain.step()
    monkeypatch.setattr(kp._ops(), "runs", lambda dtype, device: dtype in (torch.float32, HALF))
    with kp.kernels("always"):
        s = polar.settings(ns_dtype=torch.float32)
        traced = make_fx(lambda x: polar.apply_settings(x, s), tracing_mode="fake")
        assert kp.are_in(traced(torch.randn(2, 12, 20).double()))
        qs, fast = muon(compile=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fast.step()
        # the operator, when it runs, may say that kernels fail there as well
        said = [str(w.message) for w in caught if "inside an optimizer step" in str(w.message)]
        assert len(said) == 1, [str(w.message) for w in caught]
        for p, q in zip(ps, qs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        misses = pipeline.COMPILED.misses
        fast.step()
        assert pipeline.COMPILED.misses == misses
    fast.step()  # another policy is another graph
    assert pipeline.COMPILED.misses == misses + 1


def test_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from normfuse import optim; from normfuse.optim import kernel_products as k\n"
        "with k.kernels('always'):\n"
        "    assert k.choose(4, 512, 512, torch.float16, torch.device('cuda')) is None\n"
        "    optim.orthogonalize(torch.eye(3))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
