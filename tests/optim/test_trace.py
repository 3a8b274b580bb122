"""``optim.compile``: foreign optimizers traced, their chains found, results unchanged."""

import copy

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


class PythonCounter(LoopMuon):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            s = self.state[p]
            s["n"] = s.get("n", 0) + 1
            p.add_(p.grad, alpha=-0.1 / s["n"])


class Branching(LoopMuon):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad.norm() > 1:
                p.sub_(p.grad)


class Quadratic(LoopMuon):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] ** 2).sub_(p.grad)


@pytest.mark.parametrize(
    "cls,reason",
    [
        (PythonCounter, "Python int"),
        (Branching, "data-dependent|Data"),
        (Quadratic, "affine"),
    ],
)
def test_refusals_leave_the_optimizer_as_it_was(cls, reason):
    ps, qs = models(SHAPES[:2])
    fast, plain = optim.compile(cls(ps)), cls(qs)
    with pytest.warns(UserWarning, match=reason):
        drive(fast, plain, ps, qs, 3, schedule=False)
    assert fast.refused
    for p, q in zip(ps, qs, strict=True):
        assert torch.equal(p, q)
    strict = optim.compile(cls(ps), strict=True)
    with pytest.raises(trace.TraceRefused, match=reason):
        drive(strict, cls(qs), ps, qs, 2, schedule=False)


def test_sparse_gradients_and_lbfgs_are_refused():
    emb = nn.Embedding(5, 3, sparse=True)
    opt = optim.compile(torch.optim.SparseAdam(emb.parameters()))
    emb(torch.tensor([1])).sum().backward()
    with pytest.warns(UserWarning, match="sparse"):
        opt.step()
    p = nn.Parameter(torch.randn(3, 3))
    lbfgs = optim.compile(torch.optim.LBFGS([p]), strict=True)
    p.grad = torch.randn(3, 3)
    with pytest.raises(trace.TraceRefused, match="closure"):
        lbfgs.step()


def test_a_used_intermediate_is_not_a_chain():
    def f(x):
        gram = x @ x.T
        y = 2.0 * x + (-1.0 * gram + 0.5 * gram @ gram) @ x
        return y, gram.trace()

    gm = torch.fx.experimental.proxy_tensor.make_fx(f)(torch.randn(4, 6))
    assert batching.find_chains(gm.graph) == []
