"""Wrappers and diagnostics on cases whose answer is known."""

import copy
import math

import pytest
import torch
from normfuse import optim
from normfuse.optim import diagnostics as dg
from normfuse.optim.wrappers import CautiousWeightDecay
from torch import nn


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


@pytest.mark.parametrize("inner", ["Muon", "SGD", "AdamW"])
def test_normalize_and_project(inner):
    model = mlp()
    if inner == "Muon":
        base = optim.Muon(optim.param_groups(model, verbose=False), lr=0.1)
    else:
        base = getattr(torch.optim, inner)(model.parameters(), lr=0.1)
    opt = optim.NormalizeAndProject(base)
    start = [p.detach().norm() for p in opt.projected]
    sched = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    for _ in range(3):
        opt.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        opt.step()
        sched.step()
    for p, n in zip(opt.projected, start, strict=True):
        torch.testing.assert_close(p.detach().norm(), n)
    head_projected = any(p is model[2].weight for p in opt.projected)
    assert head_projected == (inner != "Muon")  # its role is known only to param_groups
    saved = copy.deepcopy(opt.state_dict())
    opt.norms[0] = opt.norms[0] * 2
    opt.load_state_dict(saved)
    torch.testing.assert_close(opt.norms[0].float(), start[0])
    assert float(opt.param_groups[0]["lr"]) == pytest.approx(0.1 / 8)


def test_every_and_zero_weights():
    p, z = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(2, 2))
    opt = optim.NormalizeAndProject(torch.optim.SGD([p, z], lr=0.5), every=2)
    norms = []
    for _ in range(2):
        p.grad, z.grad = torch.ones(2, 2) * 0.5, torch.ones(2, 2)
        opt.step()
        norms.append(float(p.norm()))
    assert norms == [pytest.approx(1.5), pytest.approx(2.0)]
    assert float(z.detach().norm()) > 0


@pytest.mark.parametrize("method", ["jvp", "finite_difference"])
@pytest.mark.parametrize("lr", [1e-3, 5.0])
def test_safe_step_on_affine_logits(method, lr):
    # logits = W·x: the derivative along ΔW is ΔW·x, and the bound is analytic
    torch.manual_seed(0)
    model = nn.Linear(3, 4, bias=False).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    before = model.weight.detach().clone()
    opt = optim.SafeStep(
        torch.optim.SGD(model.parameters(), lr=lr), model, radius=0.5, method=method
    )
    nn.functional.cross_entropy(10 * model(x), torch.arange(7) % 4).backward()
    full = -lr * model.weight.grad
    opt.step(args=(x,))
    moved = x @ full.T
    spread = float((moved.amax(1) - moved.amin(1)).max())
    want = min(1.0, 0.5 * math.pi / spread)
    assert opt.scale == pytest.approx(want, rel=1e-6)
    assert (want == 1.0) == (lr == 1e-3)
    torch.testing.assert_close(model.weight.detach(), before + want * full, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="batch"):
        opt.step()


def test_safe_step_over_a_member_on_a_deep_model():
    model = mlp()
    groups = optim.param_groups(model, verbose=False)
    opt = optim.SafeStep(optim.Muon(groups, lr=1e3), model)
    x, y = torch.randn(16, 6), torch.arange(16) % 4
    for _ in range(3):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step(args=(x,))
    assert opt.scale < 1
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("method", ["jvp", "finite_difference"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_safe_step_takes_no_step_it_cannot_judge(method, poison):
    model = mlp()
    opt = optim.SafeStep(torch.optim.SGD(model.parameters(), 0.1), model, method=method)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step(args=(torch.full((3, 6), poison),))
    assert opt.scale == 0.0
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_safe_step_through_fused_attention():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(layer, nn.Linear(8, 3))
    model[1].eval()
    scales = []
    for method in ("jvp", "finite_difference"):
        twin = copy.deepcopy(model).double()
        opt = optim.SafeStep(torch.optim.SGD(twin.parameters(), 1.0), twin, method=method)
        g = torch.Generator().manual_seed(0)
        for p in twin.parameters():
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=g)
        opt.step(args=(torch.randn(2, 5, 8, dtype=torch.float64, generator=g),))
        scales.append(opt.scale)
        assert twin.training and not twin[1].training
    assert 0 < scales[0] < 1 and scales[0] == pytest.approx(scales[1], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projection_of_huge_and_of_half_precision_weights(dtype):
    p = nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).to(dtype))
    opt = optim.NormalizeAndProject(torch.optim.SGD([p], 1.0))
    norm = p.detach().double().norm()
    p.grad = torch.full_like(p, 1e38)  # squares overflow in float32
    opt.step()
    torch.testing.assert_close(p.detach().double().norm(), norm, rtol=4e-3, atol=0)


def test_cautious_weight_decay():
    p = nn.Parameter(torch.tensor([1.0, 1.0, -2.0]))
    p.grad = torch.tensor([1.0, -1.0, 1.0])
    CautiousWeightDecay(torch.optim.SGD([p], lr=0.1), 0.5).step()
    # entries: shrunk (decays), grown (does not), grown in magnitude (does not)
    torch.testing.assert_close(p.detach(), torch.tensor([1 - 0.1 - 0.05, 1.1, -2.1]))
    with pytest.raises(ValueError, match="already"):
        CautiousWeightDecay(torch.optim.AdamW([p], weight_decay=0.1), 0.5)


def test_scale_weight_decay():
    model = mlp()
    groups = [
        {"params": [model[0].weight], "lr": 1e-2, "weight_decay": 0.1},
        {"params": [model[0].bias], "lr": 1e-2, "weight_decay": 0.1},
    ]
    wide = optim.scale_weight_decay(groups, 4.0)
    assert (wide[0]["lr"], wide[0]["weight_decay"]) == (1e-2 / 4, 0.2)
    assert (wide[1]["lr"], wide[1]["weight_decay"]) == (1e-2, 0.0)
    assert groups[0]["weight_decay"] == 0.1
    # the invariant of the law: √(lr/λ)·width^0.75 does not change
    law = lambda g, d: math.sqrt(g["lr"] / g["weight_decay"]) * d**0.75  # noqa: E731
    assert law(wide[0], 4.0) == pytest.approx(law(groups[0], 1.0))
    with pytest.raises(ValueError, match="muon"):
        optim.scale_weight_decay([{**groups[0], "algorithm": "muon"}], 2.0)
    with pytest.raises(ValueError, match="mixes"):
        optim.scale_weight_decay([{**groups[0], "params": list(model.parameters())}], 2.0)


def test_diagnostics():
    q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    s = torch.tensor([4.0, 2.0, 1.0, 1.0, 0, 0, 0, 0], dtype=torch.float64)
    w = q @ torch.diag(s) @ q.T
    summary = dg.singular_summary(w)
    assert summary["max"] == pytest.approx(4.0) and summary["min"] == pytest.approx(0, abs=1e-12)
    assert summary["stable_rank"] == pytest.approx(22 / 16)
    assert dg.stable_rank(w, 30) == pytest.approx(22 / 16, rel=1e-6)
    assert dg.singular_summary(q)["effective_rank"] == pytest.approx(8)
    assert dg.stable_rank(torch.zeros(3, 4)) == 0.0
    # a power law in the eigenvalues is found again; Pareto with exponent 2.5
    n = 4000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    eig = u.pow(-1 / 1.5)
    tail = eig.sort().values[n // 2 :]
    alpha = 1 + len(tail) / float((tail / tail[0]).log().sum())
    assert alpha == pytest.approx(2.5, rel=0.02)
    diag = torch.diag(eig[:200].sqrt())
    one = dg.heavy_tail_exponent(diag, windows=1)
    kept = eig[:200].sort().values[100:]
    assert one == pytest.approx(1 + 100 / float((kept / kept[0]).log().sum()), rel=1e-6)
    # windows make the exponent nearly independent of the shape
    torch.manual_seed(0)
    a = dg.heavy_tail_exponent(torch.randn(64, 64))
    b = dg.heavy_tail_exponent(torch.randn(64, 512))
    assert abs(a - b) < 0.3


def test_monitor():
    model = mlp()
    monitor = dg.SpectralMonitor(model, every=2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    opt.register_step_post_hook(monitor)
    for _ in range(4):
        opt.step()
    assert [h["step"] for h in monitor.history] == [2, 4]
    assert set(monitor.history[0]["layers"]) == {"0.weight", "2.weight"}
