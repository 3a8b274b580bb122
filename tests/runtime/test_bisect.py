"""``normfuse.bisect``: the culprit by name, through values or gradients, and compiled models by fuel."""

import normfuse
import pytest
import torch
from models import Transformer, ids, trained_like
from normfuse.passes import NormfuseError
from normfuse.passes.exact import FoldAffine, RemoveMean
from normfuse.runtime import backend
from torch import nn


@pytest.fixture
def model():
    return trained_like(Transformer(layers=1)).eval()


def break_site(monkeypatch, kind, site, harm):
    """``harm`` is applied to what the last layer returns when ``kind`` rewrites ``site`` (any: None)."""
    real_run, real_attempt = kind.run, kind.attempt
    graphs = []

    def run(self, gm, context):
        graphs.append(gm)
        return real_run(self, gm, context)

    def attempt(self, context, result, key, plan):
        def bad_plan():
            commit = plan()

            def bad_commit():
                commit()
                if site in (key, None):
                    graph = graphs[-1].graph
                    last = [n for n in graph.nodes if n.target is torch.ops.aten.linear.default][-1]
                    with graph.inserting_after(last):
                        new = graph.call_function(harm, (last,))
                    new.meta = {k: v for k, v in last.meta.items() if k != "weight_program"}
                    last.replace_all_uses_with(new, delete_user_cb=lambda u: u is not new)

            return bad_commit

        return real_attempt(self, context, result, key, bad_plan)

    monkeypatch.setattr(kind, "run", run)
    monkeypatch.setattr(kind, "attempt", attempt)


def test_a_disabled_pass_is_not_searched(model, monkeypatch):
    break_site(monkeypatch, FoldAffine, "blocks.0.norm2", torch.ops.aten.neg.default)
    passes = ["fold_affine", "remove_mean"]
    culprit = normfuse.bisect(model, (ids(),), passes=passes)
    assert (culprit.pass_name, culprit.site) == ("fold_affine", "blocks.0.norm2")
    assert normfuse.bisect(model, (ids(),), passes=passes, disable="fold_affine") is None


def test_gradients_that_are_wrong_where_values_are_right(model, monkeypatch):
    break_site(monkeypatch, RemoveMean, None, torch.ops.aten.detach.default)
    passes = ["fold_affine", "remove_mean"]
    assert normfuse.bisect(model, (ids(),), passes=passes) is None
    culprit = normfuse.bisect(model, (ids(),), passes=passes, gradients=True)
    assert culprit.pass_name == "remove_mean"
    monkeypatch.undo()
    assert normfuse.bisect(model, (ids(),), passes=passes, gradients=True) is None


def test_gradients_need_some_and_the_default_check(model):
    with pytest.raises(NormfuseError, match="default check"):
        normfuse.bisect(model, (ids(),), check=lambda m: True, gradients=True)
    frozen = nn.Sequential(nn.LayerNorm(4)).requires_grad_(False)
    with pytest.raises(NormfuseError, match="no output"):
        normfuse.bisect(frozen, (torch.randn(2, 4),), gradients=True)


def test_the_recipe_for_compiled_models(model, monkeypatch):
    """docs/backend.md: the culprit is what the smallest wrong fuel adds."""
    break_site(monkeypatch, FoldAffine, "blocks.0.norm2", torch.ops.aten.neg.default)
    options = {"passes": ["fold_affine"], "policy": "always", "strict": True}

    def run(fuel):
        monkeypatch.setenv("NORMFUSE_FUEL", str(fuel))
        torch._dynamo.reset()
        with torch.no_grad():
            out = torch.compile(model, backend="normfuse", options=options)(ids())["logits"]
            right = torch.allclose(out, model(ids())["logits"], atol=1e-4)
        return right, backend.reports()[-1].applied

    right, before = run(1)
    assert right and len(before) == 1
    right, after = run(2)
    assert not right and set(after) - set(before) == {("blocks.0.norm2", "fold_affine")}
    torch._dynamo.reset()
