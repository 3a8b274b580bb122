"""Extensions on architectures of ``transformers``: the identity at insertion, everywhere it applies."""

import normfuse
import pytest
import torch
import zoo
from normfuse import passes
from normfuse.passes import Context, PassManager, ir
from torch.utils import _pytree as pytree

pytest.importorskip("transformers")

#: per architecture: norms on its stream, norms elsewhere, attentions, whether they are fused
ARCHITECTURES = {
    "gpt2": (5, 0, 2, True),
    "llama": (5, 0, 2, True),
    "qwen3": (5, 4, 2, True),
    "gemma2": (9, 0, 2, False),
    "bert": (5, 0, 2, True),
    "vit": (5, 0, 2, True),
}


def tensors(tree):
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_extension_is_the_identity_and_trains(name):
    stream, elsewhere, attentions, _ = ARCHITECTURES[name]
    model, inputs = zoo.build(name)
    gm = passes.capture(model, (), inputs, dynamic=False)
    with torch.no_grad():
        before = tensors(gm(**inputs))
    todo = [
        passes.InsertGatedAttention(),
        passes.InsertPreAffine(),
        passes.InsertGatedNorm(),
    ]
    gm, report = PassManager(todo, Context(training=True)).run(gm)
    counts = {p.name: sum(a[1] == p.name for a in report.applied) for p in todo}
    assert counts == {
        "insert_gated_attention": attentions,
        "insert_pre_affine": stream,
        "insert_gated_norm": stream,
    }
    assert len(report.refused) == 2 * elsewhere
    assert all("not a norm of a residual stream" in r for _, _, r in report.refused)
    after = tensors(gm(**inputs))
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a, b)
    sum(t.float().square().mean() for t in after if t.is_floating_point()).backward()
    new = gm.meta["new_parameters"]
    assert len(new) == attentions + 3 * stream
    for key, p in new.items():
        if key.endswith("gate_down"):  # behind a zero matrix: no gradient in the first step
            assert float(p.grad.abs().max()) == 0
        else:
            assert p.grad.isfinite().all() and p.grad.abs().max() > 0, key
    # again: everything is there already
    _, again = PassManager([passes.InsertGatedNorm(), passes.InsertGatedAttention()]).run(gm)
    assert not again.applied


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_affine_scaled_attention_needs_a_visible_mask(name):
    model, inputs = zoo.build(name)
    gm = passes.capture(model, (), inputs, dynamic=False)
    with torch.no_grad():
        before = tensors(gm(**inputs))
    gm, report = PassManager([passes.AffineScaledAttention()]).run(gm)
    if ARCHITECTURES[name][3]:
        assert len(report.applied) == 2
    else:
        assert len(report.refused) == 2
        assert all("written out" in r for _, _, r in report.refused)
    with torch.no_grad():
        for a, b in zip(tensors(gm(**inputs)), before, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_calibration_sees_streams_linears_and_heads(name):
    stream, elsewhere, attentions, _ = ARCHITECTURES[name]
    model, inputs = zoo.build(name)
    stats = normfuse.calibrate(model, [inputs, inputs], progress=False, min_keys=2)
    kinds = {k: len(stats.of_kind(k)) for k in ("stream", "norm", "attention")}
    assert kinds["norm"] == stream + elsewhere
    assert kinds["attention"] == attentions
    assert 0 < kinds["stream"] <= stream
    assert stats.batches == 2 and stats.verdict()
    modules = dict(model.named_modules())
    assert all(e.module in modules for e in stats.of_kind("linear"))


def test_written_out_attention_gates_what_the_gate_formula_says():
    """Gemma 2's attention is softmax and two products; the gate multiplies each head's result."""
    model, inputs = zoo.build("gemma2")
    gm = passes.capture(model, (), inputs, dynamic=False)
    gm, report = PassManager([passes.InsertGatedAttention(per="element")]).run(gm)
    assert len(report.applied) == 2
    seen = {}

    class Spy(torch.fx.Interpreter):
        def run_node(self, n):
            out = super().run_node(n)
            if ir.is_call(n, torch.ops.normfuse.gate_heads):
                seen[n] = (self.fetch_args_kwargs_from_env(n)[0], out)
            return out

    with torch.no_grad():
        for p in gm.meta["new_parameters"].values():
            p.normal_()
        Spy(gm).run(*pytree.tree_leaves(((), inputs)), enable_io_processing=False)
    assert len(seen) == 2
    for (y, x, w), out in seen.values():
        gate = 2 * torch.sigmoid(x @ w.T)  # (batch, tokens, heads·width)
        gate = gate.unflatten(-1, (y.shape[1], y.shape[3])).transpose(1, 2)
        torch.testing.assert_close(out, y * gate)
