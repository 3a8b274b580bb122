"""``torch.compile(backend="normfuse")`` on CPU."""

import os
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import Transformer, ids, trained_like, wrong_recognition
from normfuse.passes import FoldAffine, NormfuseError, canonical, ir, verify
from normfuse.runtime import backend
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

ALWAYS = {"policy": "always", "strict": True}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    backend.clear_reports()
    backend._warned.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model():
    return trained_like(Transformer()).eval()


def compiled(model, options=None, **kwargs):
    return torch.compile(model, backend="normfuse", options=options or dict(ALWAYS), **kwargs)


@torch.no_grad()
def agree(a, b, *args):
    torch.testing.assert_close(a(*args)["logits"], b(*args)["logits"], rtol=1e-4, atol=1e-5)


def test_registered_by_entry_point():
    code = "import torch; assert 'normfuse' in torch._dynamo.list_backends(); print('found')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert "found" in out.stdout, out.stderr


def test_inference_full_graph_and_report(model):
    fast = compiled(model, {**ALWAYS, "verify": True}, fullgraph=True)
    agree(fast, model, ids())
    [report] = backend.reports()
    assert ("blocks.0.norm1", "fold_affine") in report.applied
    assert ("blocks.0.norm1", "remove_mean") in report.applied
    assert report.max_relative_error <= 1e-10 and report.mode == "inference"
    assert report.weight_bytes > 0
    assert any("models.py:" in s.where for s in report.sites)


def test_weight_updates_are_seen_without_recompiling(model):
    fast = compiled(model)
    agree(fast, model, ids())
    with torch.no_grad():
        model.blocks[0].norm1.weight.mul_(3)
    agree(fast, model, ids())
    model.load_state_dict(trained_like(Transformer(), seed=7).state_dict())
    agree(fast, model, ids())
    assert len(backend.reports()) == 1


def test_two_compiled_functions_share_weights_and_folded_copies(model):
    @torch.no_grad()
    def first(x):
        return model(x)

    @torch.no_grad()
    def second(x):
        return {"logits": model(x)["logits"] + 0}

    for f in (compiled(first), compiled(second)):
        agree(f, model, ids())
    with torch.no_grad():
        model.blocks[1].norm2.bias.add_(1)
    for f in (compiled(first), compiled(second)):
        agree(f, model, ids())


def test_training_gradients():
    model = trained_like(Transformer(tied=True)).train()
    fast = compiled(model)
    grads = []
    for m in (fast, model):
        model.zero_grad()
        m(ids(), ids(seed=2))["loss"].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert backend.reports()[0].mode == "training" and backend.reports()[0].applied


def test_default_policy_leaves_training_to_inductor():
    model = trained_like(Transformer()).train()
    fast = torch.compile(model, backend="normfuse")
    fast(ids(), ids(seed=2))["loss"].backward()
    [report] = backend.reports()
    assert not report.applied and report.refused
    assert all(reason for _, _, reason in report.refused)


def test_dynamic_shapes(model):
    fast = compiled(model, dynamic=True)
    for shape in ((2, 6), (3, 9), (5, 4)):
        agree(fast, model, ids(*shape))
    assert len(backend.reports()) == 1


def test_automatic_dynamic(model):
    fast = compiled(model)
    for shape in ((2, 6), (2, 7), (2, 8), (2, 9)):
        agree(fast, model, ids(*shape))
    assert len(backend.reports()) <= 2


def test_graph_breaks(model):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            h = self.inner.embed(x)
            h = self.inner.blocks[0](h)
            torch._dynamo.graph_break()
            h = self.inner.blocks[1](h)
            return {"logits": self.inner.head(self.inner.norm(h))}

    broken = Broken().eval()
    agree(compiled(broken), broken, ids())
    assert len(backend.reports()) == 2


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast(model, where, dynamic):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    target = Inside() if where == "inside" else model
    fast = compiled(target, dynamic=dynamic)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=where == "outside"):
        a, b = fast(ids())["logits"], target(ids())["logits"]
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)
    assert backend.reports()[0].applied


def test_numbers_of_a_dynamic_graph_under_autocast():
    """Dynamo keeps eps in a tensor there: reading it is no product that autocast would cast."""
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24))
    fast = compiled(model, dynamic=True)
    with torch.autocast("cpu", torch.bfloat16):
        for rows in (4, 7):
            x = torch.randn(rows, 16)
            torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)
    [report] = backend.reports()
    assert report.applied


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_eps_that_dynamo_keeps_variable(autocast, bounded):
    """Hand-written norms under ``dynamic=True``: recognized, and another eps is another graph."""

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.eps, self.layer = 1e-5, nn.Linear(16, 24)

        def forward(self, x):
            square = x.pow(2).mean(-1, keepdim=True)
            square = square.clamp(min=self.eps) if bounded else square + self.eps
            return self.layer(x * torch.rsqrt(square))

    model = Norm()
    fast = compiled(model, dynamic=True, fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for eps in (1e-5, 1e-5, 0.5, 2.0):
            model.eps = eps
            for rows in (4, 7):
                x = torch.randn(rows, 16)
                tight = 3e-2 if autocast else 1e-5
                torch.testing.assert_close(fast(x), model(x), rtol=tight, atol=tight)
    reports = backend.reports()
    assert len(reports) == 3 and all(r.sites[0].kind == "rms_norm" for r in reports)


def test_a_root_of_the_size_that_dynamo_keeps_variable():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.layer = 16**0.5, nn.Linear(16, 24)

        def forward(self, x):
            return self.layer(nn.functional.normalize(x, dim=-1) * self.scale)

    model = Norm()
    fast = compiled(model, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for rows in (4, 7):
            x = torch.randn(rows, 16)
            torch.testing.assert_close(fast(x), model(x))
    [report] = backend.reports()
    assert report.sites[0].kind == "rms_norm"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    model = trained_like(Transformer(d=32)).eval().to(dtype)
    truth = trained_like(Transformer(d=32)).eval().to(dtype).double()
    fast = compiled(model)
    with torch.no_grad():
        exact = truth(ids())["logits"]
        ours = (fast(ids())["logits"].double() - exact).abs().max()
        eager = (model(ids())["logits"].double() - exact).abs().max()
    assert ours <= 1.5 * eager


def test_first_call_inside_a_checkpoint():
    block = nn.Sequential(nn.RMSNorm(32), nn.Linear(32, 32))
    fast = torch.compile(block, backend="normfuse", options={"strict": True})
    x = torch.randn(8, 32, requires_grad=True)
    checkpoint(fast, x, use_reentrant=False).sum().backward()  # counts what is saved, both times
    got, x.grad = x.grad, None
    block(x).sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_gradient_checkpointing():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = trained_like(Transformer())

        def forward(self, x):
            h = self.inner.embed(x)
            for block in self.inner.blocks:
                h = checkpoint(block, h, use_reentrant=False)
            return self.inner.head(self.inner.norm(h))

    model = Checkpointed()
    grads = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for m in (torch.compile(model, backend="normfuse"), model):
            model.zero_grad()
            m(ids()).square().mean().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_models_without_norms_pass_through():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(model, backend="normfuse")(x), model(x))
    assert not backend.reports()[0].applied


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_autotun": True}, "max_autotune"),
        ({"verify": "yes"}, "verify"),
        ({"passes": "everything"}, "everything"),
        ({"policy": "never"}, "policy"),
        ({"disable": ["no_such"]}, "no_such"),
        ({"max_autotune": 3}, "max_autotune"),
    ],
)
def test_unknown_options_are_rejected_with_what_is_valid(options, text):
    with pytest.raises(Exception, match=text):
        torch.compile(nn.Linear(2, 2), backend="normfuse", options=options)(torch.randn(2, 2))


def test_inductor_options_and_modes_pass_through(model):
    fast = compiled(model, {**ALWAYS, "max_fusion_size": 8})
    agree(fast, model, ids())
    torch._dynamo.reset()
    fast = torch.compile(model, backend="normfuse", mode="reduce-overhead")
    agree(fast, model, ids())
    with pytest.raises(Exception, match="no mode"):
        backend.normfuse(None, [], mode="fastest")


def test_failure_falls_back_with_one_warning(model, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("planted")

    monkeypatch.setattr(backend, "capture_fx", fail)
    fast = torch.compile(model, backend="normfuse")
    with pytest.warns(UserWarning, match="planted") as said:
        agree(fast, model, ids())
    assert said[0].filename == __file__  # who called the model
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(torch.compile(model, backend="normfuse"), model, ids())
    assert "planted" in backend.reports()[0].notes[0]
    torch._dynamo.reset()
    with pytest.raises(Exception, match="planted"):
        compiled(model)(ids())


def test_switches(model, monkeypatch):
    fast = compiled(model, {**ALWAYS, "disable": ["fold_affine"]})
    agree(fast, model, ids())
    assert "fold_affine" not in {p for _, p in backend.reports()[0].applied}
    torch._dynamo.reset()
    monkeypatch.setenv("NORMFUSE_FUEL", "1")
    agree(compiled(model), model, ids())
    assert len(backend.reports()[-1].applied) == 1


def test_constants_in_the_code():
    class Constants(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.norm(x)) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.tensor(5)

    model = trained_like(Constants()).eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert backend.reports()[0].applied


def test_memory_limit_of_folded_weights(model):
    fast = torch.compile(model, backend="normfuse", options={"max_folded_bytes": 100})
    agree(fast, model, ids())
    [report] = backend.reports()
    assert not report.applied
    assert any("max_folded_bytes" in reason for _, _, reason in report.refused)


def test_weights_that_are_not_finite_are_left_alone():
    class Squashed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            h = self.norm(x)
            return torch.tanh(self.a(h)) + self.b(h)

    model = trained_like(Squashed()).eval()
    with torch.no_grad():
        model.a.weight[2, 3] = float("inf")
        x = torch.randn(4, 8)
        fast = torch.compile(model, backend="normfuse", options={"policy": "always"})
        torch.testing.assert_close(fast(x), model(x))
    report = backend.reports()[-1]
    assert any("not finite" in n and "a.weight" in n for n in report.notes)
    assert any("a.weight holds Inf or NaN" in r for _, _, r in report.refused)


def test_threads(model):
    models = [trained_like(Transformer(layers=1), seed=s).eval() for s in range(3)]
    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(lambda m: agree(compiled(m), m, ids()), models))


def test_tensor_subclasses_are_left_alone():
    from torch.testing._internal.two_tensor import TwoTensor

    norm = nn.LayerNorm(4)
    x = torch.randn(2, 4)
    with torch.no_grad():
        out = torch.compile(norm, backend="normfuse")(TwoTensor(x, x + 1))
        torch.testing.assert_close(out.a, norm(x))
        torch.testing.assert_close(out.b, norm(x + 1))
    assert "TwoTensor" in backend.reports()[0].notes[0]


def test_nested_tensors_inside_are_left_alone():
    class Ragged(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            ends = torch.tensor([0, 3, 10])
            rows = torch.nested.nested_tensor_from_jagged(self.fc(self.norm(x)), ends)
            return (rows * 2).values()

    model = trained_like(Ragged()).eval()
    x = torch.randn(10, 8)
    fast = torch.compile(model, backend="normfuse", options={"strict": True})
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    [note] = backend.reports()[-1].notes
    assert "makes a NestedTensor at" in note and "test_backend.py:" in note


def test_zero_size_batch(model):
    fast = compiled(model, dynamic=False)
    with torch.no_grad():
        assert fast(ids(0, 6))["logits"].shape == (0, 6, 32)


SCRIPT = """
import sys, torch
from torch import nn
import normfuse.passes.ops as ops
if sys.argv[1] == "changed":
    original = ops.rms_norm
    def changed(x, dims, gain=None, bias=None, eps=1e-6, **kw):
        return original(x, dims, gain, bias, eps, **kw) * 2
    ops._FORMULAS["rms_norm"] = changed
torch.manual_seed(0)
model = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8)).eval()
with torch.no_grad():
    model[0].weight.mul_(1.5)
    fast = torch.compile(model, backend="normfuse",
                         options={"passes": ["fold_affine"], "policy": "always", "strict": True})
    x = torch.randn(4, 8)
    print("ERROR", (fast(x) - model(x)).abs().max().item())
from torch._dynamo.utils import counters
print("HITS", counters["inductor"]["fxgraph_cache_hit"])
"""


def run_script(tmp_path, variant):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    out = subprocess.run(
        [sys.executable, str(script), variant], capture_output=True, text=True, env=env
    )
    assert out.returncode == 0, out.stderr
    values = dict(line.split()[:2] for line in out.stdout.splitlines() if line.strip())
    return float(values["ERROR"]), int(values["HITS"])


def test_compile_cache_hits_across_processes_but_never_serves_a_changed_formula(tmp_path):
    error, hits = run_script(tmp_path, "same")
    assert error < 1e-5 and hits == 0
    error, hits = run_script(tmp_path, "same")
    assert error < 1e-5 and hits >= 1
    error, hits = run_script(tmp_path, "changed")
    assert error > 1e-2 and hits == 0  # the edited formula really ran


def test_needs_torch_compile():
    gm = torch.fx.symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(NormfuseError, match=r"torch\.compile"):
        backend.rewrite_dynamo(gm, [torch.randn(2, 2)], backend.Options(), backend.Report())


VERIFY = {"policy": "always", "verify": True}


def test_verification_has_both_errors(model):
    agree(compiled(model, {**VERIFY, "strict": True}), model, ids())
    [report] = backend.reports()
    assert 0 < report.max_relative_error <= 1e-10 and not report.failed_verification
    assert report.working_error["rewritten"] <= 2 * report.working_error["eager"] + 2.4e-7


def test_verification_of_a_wrong_pass_raises_or_warns_once(model, monkeypatch):
    run = FoldAffine.run

    def wrong(self, gm, context):
        result = run(self, gm, context)
        if "blocks.0.norm1" in result.applied:
            node = next(n for n in ir.norm_nodes(gm) if n.meta["site"] == "blocks.0.norm1")
            node.args = tuple(0.5 if isinstance(a, float) else a for a in node.args)
        return result

    monkeypatch.setattr(FoldAffine, "run", wrong)
    with pytest.raises(BackendCompilerFailed, match=r"fold_affine at blocks\.0\.norm1"):
        compiled(model, {**VERIFY, "strict": True})(ids())
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="undid rewrites.*blocks.0.norm1") as said:
        agree(compiled(model, dict(VERIFY)), model, ids())
    assert len([w for w in said if "undid" in str(w.message)]) == 1
    report = backend.reports()[-1]
    assert report.failed_verification
    assert ("blocks.0.norm1", "fold_affine") not in report.applied
    assert ("blocks.1.norm1", "fold_affine") in report.applied


def test_verification_of_a_wrong_recognition_raises_or_falls_back(model, monkeypatch):
    monkeypatch.setattr(canonical, "canonicalize", wrong_recognition)
    with pytest.raises(
        BackendCompilerFailed, match=r"after recognition.*first at blocks\.0\.norm1"
    ):
        compiled(model, {**VERIFY, "strict": True})(ids())
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="left a graph to Inductor unchanged.*blocks.0.norm1"):
        agree(compiled(model, dict(VERIFY)), model, ids())
    report = backend.reports()[-1]
    assert report.failed_verification and report.sites and not report.applied


def test_a_worse_working_error_leaves_the_graph_to_inductor(model, monkeypatch):
    monkeypatch.setattr(verify, "FACTOR", -1e6)
    with pytest.warns(UserWarning, match="in the working dtype"):
        agree(compiled(model, dict(VERIFY)), model, ids())
    report = backend.reports()[-1]
    assert report.failed_verification and not report.applied
