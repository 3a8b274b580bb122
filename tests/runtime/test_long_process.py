"""Many models, one process: what is compiled, folded and kept when models come and go."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import normfuse
import pytest
import torch
from models import Transformer, ids, logits, trained_like
from normfuse.passes.weights import WeightCache
from normfuse.runtime import backend
from torch import nn
from torch._dynamo.utils import counters

ALWAYS = {"policy": "always", "strict": True}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    backend.clear_reports()
    yield
    torch._dynamo.reset()


@pytest.fixture
def folds(monkeypatch):
    """The weight programs that ran."""
    seen = []
    run = WeightCache._run
    monkeypatch.setattr(WeightCache, "_run", lambda self, x: (seen.append(self), run(self, x))[1])
    return seen


def test_blocks_compiled_one_by_one_share_a_graph_and_are_folded_once_each(folds):
    model = trained_like(Transformer(layers=5)).eval()
    with torch.no_grad():
        truth = model(ids())["logits"]
        for block in model.blocks:
            block.compile(backend="normfuse", options=ALWAYS)
        for _ in range(3):
            torch.testing.assert_close(model(ids())["logits"], truth, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == len(backend.reports()) == 1
    assert len(folds) == 5


def test_graphs_for_other_sizes_share_folded_weights(folds):
    model = trained_like(Transformer()).eval()
    fast = torch.compile(model, backend="normfuse", options=ALWAYS)
    with torch.no_grad():
        for time in (4, 5, 6):
            expected = model(ids(time=time))["logits"]
            torch.testing.assert_close(
                fast(ids(time=time))["logits"], expected, rtol=1e-4, atol=1e-5
            )
    assert len(backend.reports()) == 2 and len(folds) == 1


@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_graph_does_not_keep_a_model(training):
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    fast = torch.compile(model, backend="normfuse", options=ALWAYS)
    with torch.set_grad_enabled(training):
        fast(torch.randn(2, 8)).sum()
    assert backend.reports()[0].applied
    kept = [weakref.ref(t) for t in (model, *model.parameters())]
    del model, fast
    gc.collect()
    assert not any(r() is not None for r in kept)


def test_threads_rewrite_and_compile_at_once():
    """Tracing changes PyTorch for the whole process: threads trace in turn and leave no traces."""
    models = [trained_like(Transformer(layers=1), seed=s).eval() for s in range(4)]
    before = nn.Module.__call__, nn.Module.__getattr__
    truths = [logits(m, ids()) for m in models]

    def work(i):
        for _ in range(2):
            if i % 2:
                new = torch.compile(models[i], backend="aot_eager", dynamic=True)
            else:
                new, _ = normfuse.rewrite(models[i], (ids(),), policy="always")
            torch.testing.assert_close(logits(new, ids()), truths[i], rtol=1e-4, atol=1e-5)

    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(work, range(len(models))))
    assert (nn.Module.__call__, nn.Module.__getattr__) == before


def test_a_rewritten_module_goes_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        model = trained_like(Transformer(layers=1)).eval()
        new, _ = normfuse.rewrite(model, (ids(),), policy="always")
        gc.collect()  # of the capture
        logits(new, ids())
        copied = copy.deepcopy(new)
        logits(copied, ids())
        method = new.requires_grad_
        kept = [weakref.ref(t) for n in (new, copied) for t in (n, *n.parameters())]
        del new, copied, method
        assert not any(r() is not None for r in kept)
    finally:
        gc.enable()


def test_a_method_outlives_the_name_of_its_module():
    class Twice(Transformer):
        def twice(self, x):
            return 2 * self(x)["logits"]

    model = trained_like(Twice(layers=1)).eval()
    method = normfuse.rewrite(model, (ids(),), policy="always")[0].twice
    with torch.no_grad():
        torch.testing.assert_close(method(ids()), model.twice(ids()), rtol=1e-4, atol=1e-5)
