"""The traced step: equal to the eager one, compiled once, masks inside the graph."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from normfuse import optim
from normfuse.optim import pipeline as pl
from normfuse.optim.base import _algorithm
from torch import nn


def pair(name, shapes, **kw):
    g = torch.Generator().manual_seed(0)
    ps = [nn.Parameter(torch.randn(s, generator=g)) for s in shapes]
    qs = [nn.Parameter(p.detach().clone()) for p in ps]
    cls = getattr(optim, name)
    return ps, qs, cls(ps, compile=True, **kw), cls(qs, **kw)


@pytest.mark.parametrize("name", ["NorMuon", "AdamP", "ARO"])
def test_compiled_equals_eager_and_never_recompiles(name):
    kw = {"weight_decay": 0.1}
    ps, qs, a, b = pair(name, [(6, 10)] * 3, lr=0.05, **kw)
    start = pl.COMPILED.misses
    sa = torch.optim.lr_scheduler.ExponentialLR(a, 0.9)
    sb = torch.optim.lr_scheduler.ExponentialLR(b, 0.9)
    for i in range(20):
        for p, q in zip(ps, qs, strict=True):
            p.grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(i))
            q.grad = p.grad.clone()
        if i == 5:
            a.param_groups[0]["lr"] = torch.tensor(0.03)
            b.param_groups[0]["lr"] = torch.tensor(0.03)
        if i == 7:  # a part of the bucket: eager, no new graph
            ps[0].grad = qs[0].grad = None
        a.step()
        b.step()
        sa.step()
        sb.step()
        if "momentum" in a.param_groups[0]:
            a.param_groups[0]["momentum"] = b.param_groups[0]["momentum"] = 0.9 + 0.001 * i
    assert pl.COMPILED.misses - start <= 1
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for key, value in b.state.get(q, {}).items():
            torch.testing.assert_close(a.state[p][key], value, rtol=1e-5, atol=1e-6)
    assert a.compile_report()["seconds"] > 0
    # a second optimizer of the same shapes reuses the graph
    ps, _, a, _ = pair(name, [(6, 10)] * 3, lr=0.05, **kw)
    for p in ps:
        p.grad = torch.randn_like(p)
    a.step()
    assert pl.COMPILED.misses - start <= 1


@pytest.mark.parametrize("name", ["Muon", "NorMuon", "AdamP", "SCALE", "SinkGD", "SWAN", "ARO"])
def test_masked_step_is_the_step_of_the_finite_matrices(name):
    # what accelerators run: selection inside the graph instead of leaving matrices out
    cls = getattr(optim, name)
    g = torch.Generator().manual_seed(0)
    make = lambda n: [nn.Parameter(torch.full((5, 7), float(i + 1))) for i in range(n)]  # noqa: E731
    grads = torch.randn(4, 3, 5, 7, generator=g)
    ps, qs = make(3), make(3)
    a, b = cls(ps, lr=0.1, weight_decay=0.1), cls(qs, lr=0.1, weight_decay=0.1)
    for i in range(4):
        bad = math.nan if i == 2 else (math.inf if i == 3 else 0.0)
        for j, (p, q) in enumerate(zip(ps, qs, strict=True)):
            p.grad = grads[i, j] + (bad if j == 1 else 0.0)
            q.grad = p.grad.clone()
        b.step()
        with torch.no_grad():
            for bucket in a._current():
                of = lambda s: s.param.grad  # noqa: E731
                for task in bucket.tasks([0, 1, 2], compile=False, masked=True, grads=of):
                    task.run()
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q)
        for key, value in b.state.get(q, {}).items():
            torch.testing.assert_close(a.state[p][key], value)


def test_every_pipeline_traces_to_one_graph():
    from torch.fx.experimental.proxy_tensor import make_fx

    names = ["muon", "normuon", "root", "auon", "hybrid_auon", "muon_mup", "scale", "sinkgd"]
    for name in [*names, "swan", "adamw", "adamp", "sgdp", "conda", "aro"]:
        algorithm = _algorithm(name)
        p = nn.Parameter(torch.randn(5, 7))
        opt = optim.AdamW([{"params": [p], **algorithm.defaults, "algorithm": name}])
        (bucket,) = opt._current()
        param = torch.randn_like(bucket.stacks.get("x", torch.randn(1, bucket.rows, bucket.cols)))
        t = pl.Tensors(
            torch.randn(1, bucket.rows, bucket.cols),
            bucket.stacks,
            bucket.hyper,
            bucket.constants,
            bucket.step,
            param if bucket.pipeline.reads_param else None,
        )
        flat, layout = t.flatten()

        def traced(*args, pipeline=bucket.pipeline, layout=layout):
            return pl.run(pipeline, pl.Tensors.unflatten(args, layout), True)[0]

        graph = make_fx(traced, tracing_mode="fake")(*flat)
        calls = [str(n.target) for n in graph.graph.nodes]
        assert not any("_local_scalar_dense" in c for c in calls), name


def test_threads_compile_in_turn():
    """PyTorch's tracer serves one thread at a time; so do we."""

    def work(i):
        ps, qs, a, b = pair("Muon", [(6, 11 + i % 2)] * 2, lr=0.05)
        for p, q in zip(ps, qs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
        traced = optim.compile(torch.optim.SGD(qs, 0.1, momentum=0.9), strict=True)
        for _ in range(2):
            traced.step()
        assert traced.refused is None and traced.traces == 1
        torch.testing.assert_close(a.state[ps[0]], b.state[qs[0]], rtol=1e-5, atol=1e-6)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


def test_a_cache_too_small_for_what_is_in_use_grows():
    cache = pl.CompileCache(size=4)
    for i in range(20):  # ever new signatures: bounded
        assert cache.fetch(i, lambda i=i: i) == i
    assert len(cache._entries) == cache.size == 4
    for _ in range(4):  # seven in turn: found again soon
        for i in range(100, 107):
            cache.fetch(i, lambda i=i: i)
    misses = cache.misses
    for i in range(100, 107):
        cache.fetch(i, lambda i=i: i)
    assert cache.misses == misses and cache.size == 8
