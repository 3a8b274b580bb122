"""The gate in C++ on CPUs: its values and gradients, where it is used, and what stands in for it."""

import shutil
import subprocess

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from normfuse import passes
from normfuse.passes import ir, ops
from normfuse.runtime import autotune_cache, doctor
from normfuse.runtime.cpp import gate, library
from normfuse.runtime.lower_cpp import lower_to_cpp
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

nf = torch.ops.normfuse
op = torch.ops.normfuse_cpp.self_gate
here = pytest.mark.skipif(
    library.load("gate") is None, reason=library.why_absent("gate") or "built"
)


def make(rows, d, rank, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(rows, d, generator=g)
    down, up = torch.randn(rank, d, generator=g) / d**0.5, torch.randn(d, rank, generator=g)
    return y, down, up * spread, torch.randn(rows, d, generator=g)


def with_gradients(f, tensors, dout):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = f(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def ours(y, down, up):
    return op(y, down, up, 2.0)[0]


def error(got, truth):
    return float((got.double() - truth).norm() / truth.norm().clamp_min(1e-30))


def errors(f, tensors, dout):
    truth = with_gradients(ops.self_gate, [t.double() for t in tensors], dout)
    found = with_gradients(f, tensors, dout)
    assert [t.shape for t in found] == [t.shape for t in truth]
    return torch.tensor([error(got, want) for got, want in zip(found, truth, strict=True)])


def no_worse_than_eager(cases, slack=1.5):
    """In the mean over ``cases``: of few numbers, one that cancels may be most of the error."""
    got, eager = (sum(errors(f, t, dout) for *t, dout in cases) / len(cases)
                  for f in (ours, ops.self_gate))  # fmt: skip
    assert (got <= slack * eager + 1.2e-7).all(), (got, eager)


@here
@settings(max_examples=60, deadline=None)
@example(1, 16, 1, 1.0)
@example(193, 768, 16, 1.0)
@example(96, 4096, 16, 1.0)
@given(
    st.integers(1, 220), st.sampled_from([16, 32, 48, 80, 176, 768]),
    st.sampled_from([1, 2, 15, 16, 17, 40, 64, 70]), st.sampled_from([0.0, 1.0, 100.0]),
)  # fmt: skip
def test_no_worse_than_eager(rows, d, rank, spread):
    few = rows * rank < 64 or spread > 1
    cases = [make(rows, d, rank, seed, spread) for seed in range(24 if few else 1)]
    no_worse_than_eager(cases, slack=4.0 if few else 1.5)


@here
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 1000), st.sampled_from([16, 80, 256]), st.integers(2, 5))
def test_threads_and_other_rows_change_no_bit(rows, d, threads):
    *tensors, dout = make(rows, d, 16)
    default, results = torch.get_num_threads(), []
    for count in (1, threads):
        torch.set_num_threads(count)
        try:
            results.append(with_gradients(ours, tensors, dout))
        finally:
            torch.set_num_threads(default)
    for one, more in zip(*results, strict=True):
        assert torch.equal(one, more)
    y, down, up = tensors
    alone = with_gradients(
        lambda row: ours(row, down, up), [y[rows // 2 :][:1]], dout[rows // 2 :][:1]
    )
    assert torch.equal(alone[0][0], results[0][0][rows // 2])
    assert torch.equal(alone[1][0], results[0][1][rows // 2])


@here
def test_a_new_gate_changes_no_bit():
    y, down, up, _ = make(100, 64, 16)
    y[1], y[2], y[3] = 0.0, 1e-41, 1e30
    assert torch.equal(ours(y, down, up * 0), y)


@here
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_stays_one(bad):
    *tensors, dout = make(100, 64, 16)
    good = with_gradients(ours, tensors, dout)
    tensors[0][7, 3] = bad
    got = with_gradients(ours, tensors, dout)
    eager = with_gradients(ops.self_gate, tensors, dout)
    others = [i for i in range(100) if i != 7]
    for i in (0, 1):  # the rows, and their gradients
        assert torch.equal(got[i][others], good[i][others])
        assert torch.equal(got[i][7].isnan(), eager[i][7].isnan())
    assert got[2].isnan().any() and got[3].isnan().any()


@here
def test_logits_as_large_as_they_come():
    y, down, up, dout = make(30, 32, 4, spread=1e6)
    assert all(t.isfinite().all() for t in with_gradients(ours, (y, down, up), dout))
    no_worse_than_eager([make(30, 32, 4, seed, spread=1e6) for seed in range(24)], slack=4.0)


@here
def test_any_layout_and_no_rows():
    y, down, up, dout = make(60, 64, 16)
    want = ours(y, down, up)
    assert torch.equal(ours(y.view(3, 4, 5, 64), down, up), want.view(3, 4, 5, 64))
    wide = torch.full((60, 80), float("nan"))
    wide[:, 8:72] = y
    for v in (wide[:, 8:72], y.t().contiguous().t(), y.view(6, 10, 64).transpose(0, 1)):
        assert torch.equal(
            ours(v, down, up).reshape(60, 64), ours(v.contiguous(), down, up).reshape(60, 64)
        )
    assert torch.equal(ours(y, down.t().contiguous().t(), up.t().contiguous().t()), want)
    expanded = with_gradients(ours, (y, down, up), torch.ones(1).expand(60, 64))
    plain = with_gradients(ours, (y, down, up), torch.ones(60, 64))
    assert all(torch.equal(a, b) for a, b in zip(expanded, plain, strict=True))
    none = with_gradients(ours, (y[:0], down, up), dout[:0])
    assert none[0].shape == (0, 64) and not none[2].any() and not none[3].any()


@here
@pytest.mark.parametrize("change, said", [
    (lambda y, d, u: (y[:, :24].contiguous(), d[:, :24], u[:24]), "multiple of 16"),
    (lambda y, d, u: (y, d, u[:32]), r"\(32, 4\)"),
    (lambda y, d, u: (y, d[:0], u[:, :0]), "multiple of 16"),
    (lambda y, d, u: (y.sum(), d, u), "multiple of 16"),
    (lambda y, d, u: (y.double(), d, u), "float64"),
    (lambda y, d, u: (y, d, u.bfloat16()), "bfloat16"),
])  # fmt: skip
def test_bad_arguments_are_named(change, said):
    y, down, up, dout = make(20, 64, 4)
    with pytest.raises((TypeError, ValueError), match=said):
        op(*change(y, down, up), 2.0)
    with pytest.raises(ValueError, match="dout must be"):
        torch.ops.normfuse_cpp.self_gate_backward(y, dout[1:], down, up, y @ down.t(), 2.0)


@here
def test_as_an_operator():
    y, down, up, _ = make(20, 32, 4)
    leaves = [t.requires_grad_() for t in (y, down, up)]
    torch.library.opcheck(op.default, (*leaves, 2.0), atol=1e-5, rtol=1e-4)
    (first,) = torch.autograd.grad(ours(*leaves).sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        first.sum().backward()
    with FlopCounterMode(display=False) as counted:
        ours(*leaves).sum().backward()
    with FlopCounterMode(display=False) as formula:
        ops.self_gate(*leaves).sum().backward()
    # the formula keeps the logits, the op makes them again
    assert counted.get_total_flops() == formula.get_total_flops() + 2 * 20 * 32 * 4


@here
def test_without_the_library_the_formula(monkeypatch):
    *tensors, dout = make(50, 64, 16)
    want = with_gradients(ours, tensors, dout)
    monkeypatch.setattr(gate, "_functions", lambda: None)
    for got, other in zip(with_gradients(ours, tensors, dout), want, strict=True):
        torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-5)
    no_worse_than_eager([(*tensors, dout)])


# --- where it is used ------------------------------------------------------------------------------


def graph(f, *shapes, dtype=torch.float32):
    with FakeTensorMode():
        gm = make_fx(f, pre_dispatch=True)(*(torch.empty(s, dtype=dtype) for s in shapes))
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            node.meta.update(kind="input", fqn=node.name)
        node.meta["site"] = node.name
    return gm


def targets(gm):
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


SHAPES = ((1024, 64), (16, 64), (64, 16))


@here
def test_norms_stay_with_inductor():
    gm = graph(lambda x, d, u: nf.gated_rms_norm(x, [-1], None, None, d, u), *SHAPES)
    (entry,) = lower_to_cpp(gm)
    assert entry.kernel and "measured" in entry.reason
    assert targets(gm)[:2] == ["normfuse.rms_norm.default", "normfuse_cpp.self_gate.default"]
    ir.check(gm)


@here
@pytest.mark.parametrize(
    "f, shapes, dtype, said",
    [
        (nf.self_gate, SHAPES, torch.bfloat16, "takes float32"),
        (nf.self_gate, ((128, 24), (16, 24), (24, 16)), torch.float32, "multiples of 16"),
        (nf.self_gate, ((128, 64), (0, 64), (64, 0)), torch.float32, "a rank"),
        (nf.self_gate, ((1024, 64), (65, 64), (64, 65)), torch.float32, "over 64"),
        (nf.self_gate, ((512, 64), (16, 64), (64, 16)), torch.float32, "few rows"),
        (lambda y, d, u: nf.self_gate(y.t(), d, u), ((64, 1024), *SHAPES[1:]), torch.float32, "contig"),
        (
            lambda x, d, u: nf.gated_rms_norm(x, [0, 1], None, None, d, u),
            SHAPES, torch.float32, "the last one",
        ),
    ],
)  # fmt: skip
def test_left_to_inductor(f, shapes, dtype, said):
    gm = graph(f, *shapes, dtype=dtype)
    before = targets(gm)
    (entry,) = lower_to_cpp(gm)
    assert entry.kernel == "" and said in entry.reason and targets(gm) == before


def gated(norm=nn.RMSNorm, d=64, **options):
    torch.manual_seed(0)
    model = nn.Sequential(norm(d, **options), nn.Linear(d, d), norm(d, **options), nn.Linear(d, 8))
    model = normalized(model, torch.randn(1024, d))
    for name, p in model.named_parameters():
        if "up" in name:
            nn.init.normal_(p, std=0.3)
    return model


def normalized(model, x):
    gm = passes.capture(model, (x,), dynamic=True)
    todo = [passes.InsertGatedNorm(sites=["*"])]
    return passes.PassManager(todo, passes.Context(training=True)).run(gm)[0]


@pytest.fixture
def calls(monkeypatch):
    torch._dynamo.reset()
    done = []
    functions = gate._functions()

    def counted(index):
        return lambda *args: (done.append(index), functions[index](*args))

    monkeypatch.setattr(gate, "_functions", lambda: (counted(0), counted(1), functions[2]))
    return done


@here
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_compiled_models_use_it(norm, calls):
    model = gated(norm)
    compiled = torch.compile(model, backend="normfuse", options={"strict": True})
    for rows in (1024, 1100, 1500):  # the second makes it dynamic
        x = torch.randn(rows, 64)

        def step(f, x=x):
            leaf = x.clone().requires_grad_()
            model.zero_grad()
            f(leaf).square().sum().backward()
            return [leaf.grad, *(p.grad.clone() for p in model.parameters())]

        for got, want in zip(step(compiled), step(model), strict=True):
            assert error(got, want.double()) < 2e-6
        with torch.no_grad():
            assert error(compiled(x), model(x).double()) < 2e-6
    assert calls.count(0) == 12 and calls.count(1) == 6  # two gates, three sizes, two modes


@here
def test_gradients_behind_a_cpp_wrapper(calls):
    model, x = gated(), torch.randn(1024, 64)
    options = {"strict": True, "cpp_wrapper": True}
    compiled = torch.compile(model, backend="normfuse", options=options)
    gradients = []
    for f in (compiled, model):
        model.zero_grad()
        f(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for got, want in zip(*gradients, strict=True):
        assert error(got, want.double()) < 2e-6
    with torch.no_grad():
        for rows in (1024, 1100):  # the second makes it dynamic
            y = torch.randn(rows, 64)
            assert error(compiled(y), model(y).double()) < 2e-6
    assert calls.count(0) == 2 + 4 and calls.count(1) == 2


@here
def test_asked_not_to(calls):
    model, x = gated(), torch.randn(1024, 64)
    compiled = torch.compile(model, backend="normfuse", options={"strict": True, "kernels": False})
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert not calls


@here
def test_autocast_is_left_to_inductor(calls):
    model, x = gated(), torch.randn(1024, 64)
    compiled = torch.compile(model, backend="normfuse", options={"strict": True})
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(x), model(x)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want.float(), rtol=0.05, atol=0.05)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("target", sorted(library._TARGETS))
def test_compiles_for_every_target_without_a_warning(target, tmp_path):
    command = ["g++", *library._FLAGS, *library._TARGETS[target], "-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        [*command, "-o", str(tmp_path / "gate.so"), str(library._FOLDER / "gate.cpp")], check=True
    )


def test_no_compiler_is_said(monkeypatch, tmp_path):
    if torch.backends.cpu.get_cpu_capability() not in library._TARGETS:
        pytest.skip("not a processor it is written for")
    monkeypatch.setenv(autotune_cache.ENV, str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    library._load_once.cache_clear()
    try:
        gm = graph(nf.self_gate, *SHAPES)
        (entry,) = lower_to_cpp(gm)
        (line,) = [f for f in doctor.examine().findings if f.what == "gates on CPUs"]
    finally:
        library._load_once.cache_clear()
    assert entry.kernel == "" and "no compiler no-such-compiler" in entry.reason
    assert line.ok is None and "no compiler no-such-compiler" in line.advice
