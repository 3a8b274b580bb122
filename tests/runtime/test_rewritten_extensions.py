"""What a rewritten model learned in its new parameters survives copies, modes, captures, files."""

import copy
import pickle
import warnings

import normfuse
import pytest
import torch
from models import Transformer, ids
from normfuse import NormfuseError, passes
from normfuse.passes.errors import NormfuseWarning
from torch import nn

EXTENSIONS = [
    ("InsertGatedNorm", {}),
    ("InsertPreAffine", {}),
    ("SeeDNorm", {"heads": 2}),
    ("AdaRMSNorm", {}),
    ("InsertGatedAttention", {}),
    ("AffineScaledAttention", {}),
]


def extended(name="InsertGatedNorm", options=None):
    """A rewritten model whose new parameters moved, so that its original is another function."""
    torch.manual_seed(0)
    model = Transformer(norm=nn.RMSNorm, layers=1).eval()
    extension = getattr(passes, name)(**(options or {}))
    new, _ = normfuse.rewrite(model, (ids(),), passes=[extension])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        assert torch.equal(new(ids())["logits"], model(ids())["logits"])
        for path in new.new_parameters:
            p = new.get_parameter(path)
            if p.requires_grad:
                p.sub_(torch.rand(p.shape, generator=generator))
        assert not torch.allclose(out(new), model(ids())["logits"], atol=1e-3)
    return new


def out(module, x=None):
    with torch.no_grad():
        return module(ids() if x is None else x)["logits"]


@pytest.mark.parametrize("name, options", EXTENSIONS)
def test_a_second_rewrite_keeps_what_was_learned_and_extends_nothing_twice(name, options):
    new = extended(name, options)
    exact, report = normfuse.rewrite(new, (ids(),), policy="always")
    assert not report.failed_verification
    torch.testing.assert_close(out(exact), out(new))
    again, report = normfuse.rewrite(new, (ids(),), passes=[getattr(passes, name)(**options)])
    assert not report.applied and "already" in report.refused[0][-1]
    assert torch.equal(out(again), out(new))
    assert dict(again.named_parameters()).keys() == dict(new.named_parameters()).keys()


def test_copies_and_files_keep_it(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    new = extended()
    for module in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(out(module), out(new))
    copied = copy.deepcopy(new)
    with torch.no_grad():
        for path in new.new_parameters:  # a copy has weights of its own
            copied.get_parameter(path).zero_()
    assert not torch.allclose(out(copied), out(new), atol=1e-3)
    safetensors.save_file(new.state_dict(), tmp_path / "model.safetensors")
    copied.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    assert torch.equal(out(copied), out(new))


def test_captures_of_it_and_around_it_keep_it():
    new = extended()
    for module in (new, copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        gm = passes.capture(module, (ids(),))
        assert torch.equal(out(gm), out(new))
    baked, _ = normfuse.rewrite(new, (ids(),), weights="baked", policy="always")
    torch.testing.assert_close(out(baked), out(new))

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = new

        def forward(self, x):
            return {"logits": 2 * self.inner(x)["logits"]}

    wrapped, _ = normfuse.rewrite(Around(), (ids(),), policy="always")
    torch.testing.assert_close(out(wrapped), 2 * out(new))


def test_captures_know_the_modules():
    """Reports and calibrations of a rewritten model name its modules, as those of the model do."""
    model = Transformer(norm=nn.RMSNorm).eval()
    new, _ = normfuse.rewrite(model, (ids(),), passes=[passes.InsertGatedNorm()])
    before, after = (normfuse.calibrate(m, [ids()], progress=False) for m in (model, new))
    assert before.entries.keys() <= after.entries.keys()
    assert "stream:blocks.1.norm2" in after.entries and "linear:blocks.1.up" in after.entries


def compiled_out(module, **options):
    torch._dynamo.reset()
    return out(torch.compile(module, backend="eager", **options))


def test_compiling_a_copy_or_another_mode_keeps_it():
    """Dynamo cannot capture on its way: it breaks the graph there, and the next call is traced."""
    new = extended()
    for module in (new, copy.deepcopy(new)):
        assert torch.equal(compiled_out(module, fullgraph=True), out(new))
    assert torch.equal(compiled_out(pickle.loads(pickle.dumps(new))), out(new))
    new.train()
    torch._dynamo.reset()
    compiled = torch.compile(new, backend="eager")
    for _ in range(2):
        new.zero_grad()
        loss = compiled(ids())["logits"].square().mean()
        loss.backward()
        assert all(new.get_parameter(p).grad is not None for p in new.new_parameters)
    assert torch.equal(compiled_out(new, fullgraph=True), out(new))


def test_where_nothing_can_be_captured_the_error_says_what_to_do():
    new = pickle.loads(pickle.dumps(extended()))
    with pytest.raises(NormfuseError, match="call it once as it is called here"):
        torch.export.export(new, (ids(),))
    with pytest.raises(Exception, match="has not been captured yet"):
        compiled_out(new, fullgraph=True)
    assert torch.equal(
        out(torch.export.export(extended(), (ids(),)).module()), out(new)
    )  # called before


def test_the_original_is_no_substitute(monkeypatch):
    """Where the graph cannot be had, a model without what it learned must not run in its place."""
    new = extended()
    exact, _ = normfuse.rewrite(Transformer().eval(), (ids(),))
    monkeypatch.setattr("normfuse.runtime.rewrite.MAX_GRAPHS", 0)
    with pytest.raises(NormfuseError, match="no substitute: it runs without insert_gated_norm"):
        new.train()(ids())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        exact.train()(ids())
    assert any("running the original code" in str(w.message) for w in seen)


def test_a_mode_that_lacks_what_the_other_has_is_named():
    """Attention that drops weights in training cannot be extended there; that must not go unseen."""

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            p = 0.1 if self.training else 0.0
            y = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p)
            return y.transpose(1, 2).flatten(2)

    todo = [passes.AffineScaledAttention(), "fold_affine"]
    new, _ = normfuse.rewrite(Dropping().eval(), (torch.randn(2, 5, 16),), passes=todo)
    with pytest.warns(NormfuseWarning, match="training mode lacks 1 of 1.*drops weights"):
        new.train()(torch.randn(2, 5, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new.eval()(torch.randn(2, 5, 16))


def test_the_backend_trains_what_was_inserted():
    """Two extensions at once, one with a running state; nothing is left to plain Inductor."""
    model = Transformer(norm=nn.RMSNorm, layers=1).train()
    todo = [passes.InsertGatedNorm(), passes.AffineScaledAttention(rho=0.5)]
    new, _ = normfuse.rewrite(model, (ids(),), passes=todo)
    with torch.no_grad():
        for path in new.new_parameters:
            if (p := new.get_parameter(path)).requires_grad:
                p.sub_(torch.rand(p.shape))
    mean = "blocks.0.attention_affine_mean"
    torch._dynamo.reset()
    compiled = torch.compile(new, backend="normfuse", options={"strict": True})
    state = {name: t.clone() for name, t in new.state_dict().items()}
    grads = []
    for f in (new, compiled):
        new.load_state_dict(state)
        new.zero_grad()
        f(ids())["logits"].square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in new.named_parameters() if p.grad is not None})
        assert not torch.equal(new.state_dict()[mean], state[mean])
    torch.testing.assert_close(grads[1], grads[0])
    assert {n for n in new.new_parameters if n != mean} <= grads[0].keys()
