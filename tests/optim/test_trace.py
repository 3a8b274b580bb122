"""``optim.compile``: foreign optimizers traced, their chains found, results unchanged."""

import copy
import math
import warnings
from collections import deque

import pytest
import torch
from normfuse import optim
from normfuse.optim import batching, trace
from torch import nn


class LoopMuon(torch.optim.Optimizer):
    """A Muon as people write it; ``spelling`` varies the iteration, ``tall`` the orientation."""

    def __init__(self, params, lr=0.02, spelling="keller", momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum, "spelling": spelling})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "buf" not in state:
                    state["buf"] = torch.zeros_like(p)
                state["buf"].mul_(group["momentum"]).add_(p.grad)
                u = self.orthogonal(state["buf"], group["spelling"])
                p.mul_(1 - group["lr"] * 0.1)
                p.add_(u, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)

    def orthogonal(self, g, spelling):
        a, b, c = 3.4445, -4.7750, 2.0315
        x = g / (g.norm() + 1e-7)
        if spelling == "right":
            for _ in range(5):
                gram = x.mT @ x
                x = a * x + x @ (b * gram + c * gram @ gram)
            return x
        if g.shape[0] > g.shape[1]:
            x = x.T
        for _ in range(5):
            gram = x @ x.transpose(-2, -1)
            if spelling == "keller":
                x = a * x + (b * gram + c * gram @ gram) @ x
            elif spelling == "addmm":
                poly = torch.addmm(gram, gram, gram, beta=b, alpha=c)
                x = torch.addmm(x, poly, x, beta=a)
            else:  # applied twice instead of squared, with a subtraction
                gx = gram @ x
                x = a * x - (-b) * gx + (gram @ gx) * c
        return x.T if g.shape[0] > g.shape[1] else x


SHAPES = [(6, 10), (10, 6), (6, 10), (5, 3)]


def models(shapes=SHAPES):
    g = torch.Generator().manual_seed(0)
    ps = [nn.Parameter(torch.randn(s, generator=g)) for s in shapes]
    return ps, [nn.Parameter(p.detach().clone()) for p in ps]


def drive(a, b, ps, qs, steps, schedule=True):
    sa = torch.optim.lr_scheduler.ExponentialLR(a, 0.8)
    sb = torch.optim.lr_scheduler.ExponentialLR(b, 0.8)
    for i in range(steps):
        g = torch.Generator().manual_seed(i)
        for p, q in zip(ps, qs, strict=True):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        a.step()
        b.step()
        if schedule:
            sa.step()
            sb.step()


@pytest.mark.parametrize("spelling", ["keller", "addmm", "applied", "right"])
def test_user_written_muon(spelling):
    ps, qs = models()
    inner = LoopMuon(ps, spelling=spelling)
    fast, plain = optim.compile(inner, strict=True), LoopMuon(qs, spelling=spelling)
    drive(fast, plain, ps, qs, 6)
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inner.state[p]["buf"], plain.state[q]["buf"])
    assert fast.refused is None and fast.traces == 1  # six rates, one graph
    assert sorted(fast.batches) == [1, 3]  # 5×3; 6×10 with its transpose


def test_torch_muon():
    ps, qs = models()
    fast = optim.compile(torch.optim.Muon(ps, lr=0.05), strict=True)
    plain = torch.optim.Muon(qs, lr=0.05)
    drive(fast, plain, ps, qs, 4)
    assert sorted(fast.batches) == [1, 3]
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=3e-2, atol=2e-2)  # both iterate in bfloat16


def test_optimizers_without_chains_and_two_groups():
    ps, qs = models()
    split = lambda x: [{"params": x[:2], "lr": 0.01}, {"params": x[2:], "lr": 0.1}]  # noqa: E731
    fast = optim.compile(torch.optim.SGD(split(ps), momentum=0.9, foreach=False), strict=True)
    plain = torch.optim.SGD(split(qs), momentum=0.9, foreach=False)
    drive(fast, plain, ps, qs, 5)
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q)
    assert fast.traces == 1


def test_checkpoint_goes_through():
    ps, qs = models()
    fast, plain = optim.compile(LoopMuon(ps)), LoopMuon(qs)
    drive(fast, plain, ps, qs, 3, schedule=False)
    plain.load_state_dict(copy.deepcopy(fast.state_dict()))
    drive(fast, plain, ps, qs, 2, schedule=False)
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    fast.zero_grad()
    assert all(p.grad is None for p in ps)


class Counting(LoopMuon):
    """Muon with Adam beside it as people write it: counters and bias corrections in Python."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                s = self.state[p]
                s["n"] = s.get("n", 0) + 1
                s.setdefault("sq", torch.zeros_like(p)).lerp_(p.grad.square(), 1 - 0.99)
                fix = math.sqrt(1 - 0.99 ** s["n"]) / (1 - group["momentum"] ** s["n"])
                p.data.addcdiv_(p.grad, s["sq"].sqrt() + 1e-8, value=-(group["lr"] ** 2) * fix)


def test_python_counters_and_nonlinear_rates():
    ps, qs = models()
    fast, plain = optim.compile(Counting(ps), strict=True), Counting(qs)
    drive(fast, plain, ps, qs, 6)
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        n = fast.state[p]["n"]
        assert n == 6 and isinstance(n, int)
    assert fast.traces == 1 and sorted(fast.batches) == [1, 3]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "Adamax", "RMSprop", "Adagrad"])
def test_optimizers_of_torch_are_traced_bit_for_bit(name):
    ps, qs = models()
    fast = optim.compile(getattr(torch.optim, name)(ps, lr=0.01, foreach=False), strict=True)
    plain = getattr(torch.optim, name)(qs, lr=0.01, foreach=False)
    drive(fast, plain, ps, qs, 5)
    assert fast.traces == 1
    assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))


def cycle(make, steps=14):
    """Optimizers under a schedule that moves momentum, too: the traced one, and the largest distance."""
    ps, qs = models()
    fast, plain = optim.compile(make(ps)), make(qs)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20) for o in (fast, plain)]
    for i in range(steps):
        g = torch.Generator().manual_seed(i)
        for p, q in zip(ps, qs, strict=True):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        fast.step()
        plain.step()
        for s in schedules:
            s.step()
    return fast, max(float((p - q).detach().abs().max()) for p, q in zip(ps, qs, strict=True))


def test_a_cycled_momentum_becomes_an_input():
    fast, distance = cycle(LoopMuon)
    assert distance < 1e-5 and fast.refused is None
    assert fast.traces <= 3  # before it was seen to move, and with it as an input


def test_an_entry_that_moves_and_decides_is_given_up():
    make = lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, foreach=False)  # noqa: E731
    with pytest.warns(UserWarning, match="momentum moves and decides") as caught:
        fast, distance = cycle(make)  # SGD asks whether its momentum is 0
    assert distance == 0 and fast.refused and len(caught) == 1
    assert caught[0].filename == __file__  # whoever stepped
    assert len(fast._graphs) <= trace.MAX_GRAPHS


def test_hooks_closures_and_schedulers():
    ps, qs = models()
    fast, plain = optim.compile(LoopMuon(ps), strict=True), LoopMuon(qs)
    calls = []
    for o in (fast, plain):
        o.register_step_pre_hook(lambda opt, *_: calls.append(type(opt)))
        o.register_step_post_hook(lambda opt, *_: calls.append(type(opt)))
    drive(fast, plain, ps, qs, 3)
    assert calls == [LoopMuon] * 12
    copied = copy.deepcopy(fast)  # a scheduler has wrapped its step
    before = ps[0].detach().clone()
    for group in copied.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    copied.step()
    assert torch.equal(ps[0], before) and not torch.equal(
        copied.param_groups[0]["params"][0], before
    )

    evaluations = []

    def closure():
        evaluations.append(1)
        fast.zero_grad()
        loss = sum(p.square().sum() for p in ps)
        loss.backward()
        return loss

    losses = [float(fast.step(closure).detach()) for _ in range(3)]
    assert len(evaluations) == 3 and losses[2] < losses[0] and fast.refused is None


def test_an_optimizer_that_evaluates_again_gets_its_closure():
    p = nn.Parameter(torch.tensor([3.0, 2.0]))
    lbfgs = optim.compile(torch.optim.LBFGS([p], lr=0.5))

    def closure():
        lbfgs.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="closure"):
        lbfgs.step(closure)
    for _ in range(4):
        lbfgs.step(closure)
    assert p.abs().max() < 1e-3


def test_grad_scaler_over_a_fused_optimizer():
    """The scale goes to whoever supports it, and a wrapper is not the fused optimizer."""
    for wrap in (optim.compile, optim.NormalizeAndProject):
        ps, qs = models([(4, 5)])
        fast = wrap(torch.optim.Adam(ps, 0.1, fused=True))
        plain = torch.optim.Adam(qs, 0.1, fused=True)
        if wrap is optim.NormalizeAndProject:
            plain = wrap(torch.optim.Adam(qs, 0.1))
        for values, o in ((ps, fast), (qs, plain)):
            scaler = torch.amp.GradScaler("cpu")
            for factor in (1.0, math.inf, 2.0):
                scaler.scale(torch.ones(()))
                values[0].grad = torch.ones(4, 5) * factor * scaler.get_scale()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    scaler.step(o)
                scaler.update()
        assert torch.isfinite(ps[0]).all()
        torch.testing.assert_close(ps[0], qs[0])


def test_parameters_without_gradient_are_seen():
    class Zeros(LoopMuon):  # as the first public Muon: no gradient is a gradient of zero
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            super().step()

    ps, qs = models()
    fast, plain = optim.compile(Zeros(ps), strict=True), Zeros(qs)
    for i in range(5):
        g = torch.Generator().manual_seed(i)
        for k, (p, q) in enumerate(zip(ps, qs, strict=True)):
            p.grad = torch.randn(p.shape, generator=g) if k or i < 3 else None
            q.grad = None if p.grad is None else p.grad.clone()
        fast.step()
        plain.step()
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_compiled_iteration_is_seen_through():
    class Compiled(LoopMuon):
        helper = torch.compile(LoopMuon.orthogonal)  # never run: tracing takes what it wraps

        def orthogonal(self, g, spelling):
            return Compiled.helper(self, g, spelling)

    ps, qs = models()
    fast, plain = optim.compile(Compiled(ps), strict=True), LoopMuon(qs)
    for p in ps:  # so that no step runs untraced
        fast.inner.state[p]["buf"] = torch.zeros_like(p)
    drive(fast, plain, ps, qs, 3)
    assert sorted(fast.batches) == [1, 3]
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


class Branching(LoopMuon):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad.norm() > 1:
                p.sub_(p.grad)


class EveryOther(LoopMuon):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            s = self.state[p]
            s["n"] = s.get("n", 0) + 1
            if s["n"] % 2:
                p.sub_(p.grad)


class Attributes(LoopMuon):
    """What a step may keep outside its state; ``kind`` says which."""

    kind = "number"

    def __init__(self, params):
        super().__init__(params)
        self.n, self.table, self.scalar = 0, {"n": 0}, torch.zeros(())
        self.other = torch.zeros(3)

    @torch.no_grad()
    def step(self, closure=None):
        if self.kind == "number":
            self.n += 1
            n = self.n
        elif self.kind == "table":
            self.table["n"] += 1
            n = self.table["n"]
        elif self.kind == "scalar":
            n = self.scalar.add_(1)
        else:
            n = self.other.add_(1)[0]
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad / n)


@pytest.mark.parametrize(
    "cls,reason",
    [
        (Branching, "tensor's value.*test_trace.py:.*p.grad.norm"),
        (EveryOther, "number that moves.*test_trace.py:.*% 2"),
        (type("Number", (Attributes,), {}), "attribute 'n'"),
        (type("Table", (Attributes,), {"kind": "table"}), "attribute 'table'|no parameter"),
        (type("Scalar", (Attributes,), {"kind": "scalar"}), "attribute 'scalar'|no parameter"),
        (type("Other", (Attributes,), {"kind": "other"}), "no parameter, gradient or state"),
    ],
)
def test_refusals_leave_the_optimizer_as_it_was(cls, reason):
    ps, qs = models(SHAPES[:2])
    fast, plain = optim.compile(cls(ps)), cls(qs)
    with pytest.warns(UserWarning, match=reason) as caught:
        drive(fast, plain, ps, qs, 3, schedule=False)
    assert fast.refused and len(caught) == 1
    for p, q in zip(ps, qs, strict=True):
        assert torch.equal(p, q)
    strict = optim.compile(cls(ps), strict=True)
    with pytest.raises(trace.TraceRefused, match=reason):
        drive(strict, cls(qs), ps, qs, 2, schedule=False)


def test_what_is_refused_by_name():
    emb = nn.Embedding(5, 3, sparse=True)
    opt = optim.compile(torch.optim.SparseAdam(emb.parameters()))
    emb(torch.tensor([1])).sum().backward()
    with pytest.warns(UserWarning, match="gradient of parameter 0 of group 0 is sparse"):
        opt.step()
    p = nn.Parameter(torch.randn(3, 3))
    p.grad = torch.randn(3, 3)
    for inner, reason in (
        (torch.optim.LBFGS([p]), "closure"),
        (optim.Muon([p]), "compile=True"),
        (torch.optim.Adam([p], fused=True), "fused"),
    ):
        with pytest.raises(trace.TraceRefused, match=reason):
            optim.compile(inner, strict=True).step()
    view = p.detach().view(9)
    view.grad = torch.ones(9)
    with pytest.raises(trace.TraceRefused, match="share memory"):
        optim.compile(torch.optim.SGD([("w", p), ("v", view)], 0.1), strict=True).step()


def test_a_used_intermediate_is_not_a_chain():
    def f(x):
        gram = x @ x.T
        y = 2.0 * x + (-1.0 * gram + 0.5 * gram @ gram) @ x
        return y, gram.trace()

    gm = torch.fx.experimental.proxy_tensor.make_fx(f)(torch.randn(4, 6))
    assert batching.find_chains(gm.graph) == []


def test_gradients_that_come_and_go_are_not_traced_forever(monkeypatch):
    """Layers dropped at random: each step another graph, and a trace takes longer than many steps."""
    monkeypatch.setattr(trace, "MAX_GRAPHS", 2)
    monkeypatch.setattr(trace, "PATIENCE", 20)
    ps = [nn.Parameter(torch.ones(3)) for _ in range(5)]
    qs = [nn.Parameter(torch.ones(3)) for _ in range(5)]
    fast, plain = optim.compile(torch.optim.SGD(ps, 0.1)), torch.optim.SGD(qs, 0.1)
    fast._traced_at = deque(maxlen=2 * trace.MAX_GRAPHS)

    def step(pattern):
        for k, (p, q) in enumerate(zip(ps, qs, strict=True)):
            p.grad = torch.full((3,), k + 1.0) if pattern >> k & 1 else None
            q.grad = None if p.grad is None else p.grad.clone()
        fast.step()
        plain.step()

    with pytest.warns(UserWarning, match="which parameters have gradients") as caught:
        for pattern in range(1, 19):
            step(pattern)
    assert fast.traces == 4 and len(caught) == 1 and "which parameters" in fast.refused
    for _ in range(4):  # it has settled
        step(31)
    assert fast.traces == 5 and fast.refused is None
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q)
