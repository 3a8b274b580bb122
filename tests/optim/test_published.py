"""Members against the numbers of published implementations, where a package offers one.

``pytorch-optimizer`` fixes bfloat16 inside its Newton–Schulz; that cast is replaced, so that what is
compared is the algorithm and not the rounding.
"""

import functools

import pytest
import torch
from normfuse import optim
from torch import nn

STEPS = 20
SHAPES = [(9, 6), (6, 9), (8, 8), (9, 6), (5, 12)]


def trajectories(ours, theirs, dtype, context=None, shapes=SHAPES):
    """Both optimizers on the same gradients; returns the largest relative distance of a parameter."""
    g = torch.Generator().manual_seed(0)
    ps = [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]
    qs = [nn.Parameter(p.detach().clone()) for p in ps]
    start = [p.detach().clone() for p in ps]
    a, b = ours(ps), theirs(qs)
    for _ in range(STEPS):
        for p, q in zip(ps, qs, strict=True):
            p.grad = torch.randn(p.shape, generator=g).to(dtype)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    moved = [float((q - s).norm()) for q, s in zip(qs, start, strict=True)]
    assert min(moved) > 1e-3  # both did something
    return max(float((p - q).norm()) / m for p, q, m in zip(ps, qs, moved, strict=True))


@pytest.fixture
def published(monkeypatch):
    package = pytest.importorskip("pytorch_optimizer")
    base = pytest.importorskip("pytorch_optimizer.optimizer.muon.base")
    normuon = pytest.importorskip("pytorch_optimizer.optimizer.muon.normuon")
    muon = pytest.importorskip("pytorch_optimizer.optimizer.muon.muon")
    name = "zero_power_via_newton_schulz_5"
    exact = functools.partial(getattr(base, name), dtype=torch.float64)
    for module in (base, normuon, muon):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, exact)
    return package


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("rms", [True, False])
def test_muon(published, nesterov, rms):
    distance = trajectories(
        lambda ps: optim.Muon(
            ps,
            lr=0.02,
            weight_decay=0.1,
            nesterov=nesterov,
            adjust_lr_fn="match_rms_adamw" if rms else "original",
        ),
        lambda qs: published.Muon(
            [{"params": qs, "use_muon": True}],
            lr=0.02,
            weight_decay=0.1,
            nesterov=nesterov,
            use_adjusted_lr=rms,
            foreach=False,
        ),
        torch.float64,
    )
    assert distance < 1e-6  # its eps of 1e-7 is all that differs


@pytest.mark.parametrize("form", ["code", "paper"])
def test_normuon(published, form):
    distance = trajectories(
        lambda ps: optim.NorMuon(
            ps,
            lr=0.02,
            weight_decay=0.1,
            form=form,
            adjust_lr_fn="original" if form == "code" else "none",
        ),
        lambda qs: published.NorMuon(
            [{"params": qs, "use_muon": True}],
            lr=0.02,
            weight_decay=0.1,
            update_scale="preserve_norm" if form == "code" else "match_rms",
            foreach=False,
        ),
        torch.float64,
    )
    assert distance < 1e-6


def test_conda(published):
    # one basis for the whole run
    distance = trajectories(
        lambda ps: optim.Conda(ps, lr=0.02, weight_decay=0.0, scale=0.25, gap=1000),
        lambda qs: published.Conda(qs, lr=0.02, weight_decay=0.0, scale=0.25, update_proj_gap=1000),
        torch.float64,
    )
    assert distance < 1e-6


@pytest.mark.parametrize("nesterov", [True, False])
def test_adamp_and_sgdp(published, nesterov):
    kw = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov}
    for ours, theirs, more in (
        (optim.AdamP, published.AdamP, {}),
        (optim.SGDP, published.SGDP, {"momentum": 0.9}),
    ):
        distance = trajectories(
            lambda ps, ours=ours, more=more: ours(ps, **kw, **more),
            lambda qs, theirs=theirs, more=more: theirs(qs, **kw, **more),
            torch.float64,
        )
        assert distance < 1e-5, ours.__name__


def test_gram_newton_schulz():
    package = pytest.importorskip("gram_newton_schulz")
    rows = package.YOU_COEFFICIENTS
    g = torch.Generator().manual_seed(0)
    for shape in ((3, 40, 120), (3, 120, 40)):
        x = torch.randn(shape, generator=g)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "float16", torch.float32)  # its closures name the dtype there
            theirs = package.GramNewtonSchulz(
                ns_use_kernels=False, ns_coefficients=rows, compile_kwargs=None
            )(x.clone())
        for method in ("direct", "gram"):
            ours = optim.orthogonalize(x, None, method, coefficients="you")
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


def test_heavyball_newton_schulz(monkeypatch):
    heavyball = pytest.importorskip("heavyball")
    utils = heavyball.utils
    monkeypatch.setattr(utils, "compile_mode", None)
    x = torch.randn(3, 24, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = utils.zeropower_via_newtonschulz5(x)  # float64 input is iterated in float64
    ours = optim.orthogonalize(x, coefficients="you")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
