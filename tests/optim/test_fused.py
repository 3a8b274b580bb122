"""Compiled steps on large matrices: one loop a matrix, equal to the eager step."""

import pytest
import torch
from normfuse import optim
from normfuse.optim.pipeline import COMPILED
from torch import nn
from torch._dynamo.utils import counters

SHAPES = ((600, 700), (800, 500), (3, 512, 520))  # more than CACHE_BYTES each


def twins(shapes, dtype=torch.float32):
    torch.manual_seed(0)
    a = [nn.Parameter(torch.randn(s).to(dtype)) for s in shapes]
    return a, [nn.Parameter(p.detach().clone()) for p in a]


def gradients(a, b):
    for p, q in zip(a, b, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()


def members():
    """The kinds of pipelines: products in the middle, elementwise alone, a decay of its own, cautious."""
    yield "muon", lambda ps, **k: optim.Muon(ps, weight_decay=0.1, **k)
    yield "normuon, cautious", lambda ps, **k: optim.NorMuon(ps, cautious=True, **k)
    yield (
        "adamw",
        lambda ps, **k: optim.Muon(
            [{"params": ps, "algorithm": "adamw", "weight_decay": 0.1}], **k
        ),
    )
    yield "adamp", lambda ps, **k: optim.AdamP(ps, weight_decay=0.1, **k)
    yield "root", lambda ps, **k: optim.ROOT(ps, **k)


@pytest.mark.parametrize(
    ("name", "make"), list(members()), ids=lambda v: v if type(v) is str else ""
)
def test_equals_the_eager_step(name, make):
    shapes = SHAPES if name == "adamw" else SHAPES[:2]
    a, b = twins(shapes)
    eager, fast = make(a, lr=1e-2), make(b, lr=1e-2, compile=True)
    for _ in range(3):
        gradients(a, b)
        eager.step()
        fast.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(q, p, rtol=2e-6, atol=2e-6)
        for key, value in eager.state[p].items():
            torch.testing.assert_close(fast.state[q][key], value, rtol=2e-6, atol=2e-6)


def test_half_precision_rounds_once():
    a, b = twins(SHAPES[:1], torch.bfloat16)
    eager, fast = (
        optim.Muon(ps, lr=1e-3, weight_decay=0.1, compile=c) for ps, c in ((a, False), (b, True))
    )
    gradients(a, b)
    eager.step()
    fast.step()
    torch.testing.assert_close(b[0], a[0], rtol=2**-7, atol=1e-6)
    assert fast.state[b[0]]["momentum_buffer"].dtype == eager.state[a[0]]["momentum_buffer"].dtype


def test_one_compilation_for_all_sizes_and_rates():
    shapes = [(520 + 8 * i, 600 - 8 * i) for i in range(5)]
    _, b = twins(shapes)
    fast = optim.Muon(b, lr=1e-3, compile=True)
    gradients(b, b)
    fast.step()
    graphs, misses = counters["stats"]["unique_graphs"], COMPILED.misses
    for step in range(4):
        fast.param_groups[0]["lr"] = 1e-3 / (step + 1)
        gradients(b, b)
        fast.step()
    assert counters["stats"]["unique_graphs"] == graphs and COMPILED.misses == misses


def test_versions_move_and_non_finite_matrices_are_left_alone():
    _, b = twins(SHAPES[:2])
    fast = optim.Muon(b, lr=1e-2, compile=True)
    gradients(b, b)
    b[0].grad[3, 4] = float("nan")
    before, versions = [p.detach().clone() for p in b], [p._version for p in b]
    fast.step()
    assert torch.equal(b[0], before[0]) and not torch.equal(b[1], before[1])
    assert not torch.equal(fast.state[b[1]]["momentum_buffer"], torch.zeros_like(b[1]))
    assert torch.equal(fast.state[b[0]]["momentum_buffer"], torch.zeros_like(b[0]))
    assert b[1]._version > versions[1]  # autograd and weight caches see that it was written


def test_parts_without_gradient_and_strided_parameters():
    a, b = twins([(600, 700), (600, 700), (600, 700)])
    a[1], b[1] = (nn.Parameter(p.detach().mT.contiguous().mT) for p in (a[1], b[1]))
    eager, fast = optim.Muon(a, lr=1e-2), optim.Muon(b, lr=1e-2, compile=True)
    for step in range(3):
        gradients(a, b)
        if step == 1:
            a[2].grad = b[2].grad = None
        eager.step()
        fast.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(q, p, rtol=2e-6, atol=2e-6)
