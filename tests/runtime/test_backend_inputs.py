"""The backend on inputs that are not finite, with passes switched off, and on a model of a library."""

import pytest
import torch
from models import Transformer, ids, trained_like
from normfuse.runtime import backend
from torch import nn

ALWAYS = {"policy": "always", "strict": True}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    backend.clear_reports()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_rows_that_are_not_finite_are_so_where_eagers_are(norm):
    model = trained_like(
        nn.Sequential(
            nn.Linear(8, 8), norm(8), nn.Linear(8, 8), nn.GELU(), norm(8), nn.Linear(8, 4)
        )
    ).eval()
    x = torch.randn(6, 8)
    x[1, 2], x[3, 0], x[4, 5] = float("nan"), float("inf"), -float("inf")
    with torch.no_grad():
        ours = torch.compile(model, backend="normfuse", options=dict(ALWAYS))(x)
        torch.testing.assert_close(ours, model(x), equal_nan=True, rtol=1e-4, atol=1e-5)
    assert ours[[0, 2, 5]].isfinite().all() and not ours[[1, 3, 4]].isfinite().any()
    assert backend.reports()[-1].applied


def test_passes_switched_off_by_the_environment(monkeypatch):
    monkeypatch.setenv("NORMFUSE_DISABLE", "fold_affine, merge_linears")
    model = trained_like(Transformer(layers=1)).eval()
    with torch.no_grad():
        fast = torch.compile(model, backend="normfuse", options=dict(ALWAYS))
        torch.testing.assert_close(
            fast(ids())["logits"], model(ids())["logits"], rtol=1e-4, atol=1e-5
        )
    [report] = backend.reports()
    off = {p.name for p in report.passes if p.disabled}
    assert off == {"fold_affine", "merge_linears"}
    ran = {name for _, name in report.applied}
    assert "remove_mean" in ran and not ran & off


def test_gpt2_trains_and_infers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=16, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    model = trained_like(transformers.GPT2LMHeadModel(config))
    fast = torch.compile(model, backend="normfuse", options=dict(ALWAYS))
    tokens = ids(vocab=64)
    losses, grads = [], []
    for m in (fast, model):
        model.zero_grad()
        loss = m(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    for ours, eager in zip(*grads, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-4)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            fast(input_ids=tokens).logits, model(input_ids=tokens).logits, rtol=1e-3, atol=1e-4
        )
    modes = {r.mode for r in backend.reports() if r.applied}
    assert modes == {"training", "inference"}
