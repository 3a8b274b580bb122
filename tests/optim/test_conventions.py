"""PyTorch's own conventions for every member, and the defects other implementations have."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from normfuse import optim
from torch import nn

MEMBERS = [
    "Muon",
    "NorMuon",
    "ROOT",
    "AuON",
    "HybridAuON",
    "MuonMuP",
    "SCALE",
    "SinkGD",
    "SWAN",
    "AdamW",
    "AdamP",
    "SGDP",
    "Conda",
    "ARO",
]
MATRIX = [m for m in MEMBERS if m not in ("AdamW", "AdamP", "SGDP")]
WITH_STATE = [m for m in MEMBERS if m not in ("SCALE", "SinkGD", "SWAN")]
SHAPES = [(6, 4), (4, 6), (6, 4), (5, 5), (1, 7)]


def params(seed=0, dtype=torch.float32, shapes=SHAPES):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]


def set_grads(ps, step, skip=()):
    g = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(ps):
        value = torch.randn(p.shape, generator=g).to(p.dtype)
        p.grad = None if i in skip else value


def train(opt, ps, steps, start=0, **kw):
    for i in range(start, start + steps):
        set_grads(ps, i, **kw)
        opt.step()


def build(name, ps, **kw):
    kw = {"lr": 0.05, "weight_decay": 0.1, **kw}
    if name == "Conda":
        kw.setdefault("gap", 3)
    if name == "SGDP":
        kw.setdefault("momentum", 0.9)
    return getattr(optim, name)(ps, **kw)


def assert_same(ps, qs):
    for p, q in zip(ps, qs, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", MEMBERS)
def test_save_and_load_bit_for_bit(name):
    for dtype in (torch.float32, torch.bfloat16):
        ps = params(dtype=dtype)
        opt = build(name, ps)
        train(opt, ps, 4)
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        qs = [nn.Parameter(p.detach().clone()) for p in ps]
        other = build(name, qs)
        other.load_state_dict(torch.load(file, weights_only=True))
        for p, q in zip(ps, qs, strict=True):
            assert opt.state[p].keys() == other.state[q].keys()
            for key, value in opt.state[p].items():
                assert value.dtype == other.state[q][key].dtype, key
                assert torch.equal(value, other.state[q][key]), key
        train(opt, ps, 3, start=4)
        train(other, qs, 3, start=4)
        assert_same(ps, qs)


@pytest.mark.parametrize("name", MEMBERS)
def test_deepcopy_and_pickle(name):
    ps = params()
    opt = build(name, ps)
    train(opt, ps, 2)
    twin_ps, twin = copy.deepcopy((ps, opt))
    assert isinstance(twin, type(opt)) and twin._options == opt._options
    thawed_ps, thawed = pickle.loads(pickle.dumps((ps, opt)))
    for o, q in ((opt, ps), (twin, twin_ps), (thawed, thawed_ps)):
        train(o, q, 2, start=2)
    assert_same(ps, twin_ps)
    assert_same(ps, thawed_ps)


@pytest.mark.parametrize("name", MEMBERS)
def test_missing_gradients_leave_parameter_and_state(name):
    ps = params()
    opt = build(name, ps)
    train(opt, ps, 1)
    before = [p.detach().clone() for p in ps]
    state = {k: v.clone() for k, v in opt.state[ps[0]].items()} if ps[0] in opt.state else {}
    train(opt, ps, 1, start=1, skip=(0,))
    assert torch.equal(before[0], ps[0])
    for key, value in state.items():
        assert torch.equal(value, opt.state[ps[0]][key])
    assert all(not torch.equal(b, p) for b, p in zip(before[1:], ps[1:], strict=True))
    # and equals an optimizer that never saw the others
    q = [nn.Parameter(before[0].clone())]
    lone = build(name, q)
    lone.load_state_dict(
        {
            "state": {0: opt.state_dict()["state"][0]} if state else {},
            "param_groups": [{**opt.state_dict()["param_groups"][0], "params": [0]}],
        }
    )
    g = torch.randn(6, 4)
    for p in ps:
        p.grad = None
    ps[0].grad, q[0].grad = g, g.clone()
    opt.step()
    lone.step()
    torch.testing.assert_close(ps[0], q[0])


@pytest.mark.parametrize("name", MEMBERS)
def test_zero_and_none_gradients_do_nothing(name):
    ps = params()
    opt = build(name, ps, weight_decay=0.0)
    before = [p.detach().clone() for p in ps]
    opt.step()
    assert_same(before, ps)
    for p in ps:
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        opt.step()
    assert_same(before, ps)
    for s in opt.state.values():
        assert all(torch.isfinite(v).all() for v in s.values())


@pytest.mark.parametrize("name", MEMBERS)
def test_non_finite_gradients_stay_in_their_matrix(name):
    for bad in (math.nan, math.inf, -math.inf):
        ps, qs = params(), params()
        opt, ref = build(name, ps), build(name, qs)
        train(opt, ps, 2)
        train(ref, qs, 2)
        before = ps[0].detach().clone()
        state = copy.deepcopy(opt.state_dict()["state"].get(0, {}))
        set_grads(ps, 2)
        set_grads(qs, 2)
        ps[0].grad[1, 2] = bad
        opt.step()
        ref.step()
        assert torch.equal(ps[0], before)
        for key, value in state.items():
            assert torch.equal(value, opt.state[ps[0]][key])
        for p, q in zip(ps[1:], qs[1:], strict=True):
            torch.testing.assert_close(p, q)
    strict = build(name, ps, non_finite="raise")
    kept = [p.detach().clone() for p in ps]
    with pytest.raises(ValueError, match="parameter 0 of group 0"):
        strict.step()
    assert_same(kept, ps)


@pytest.mark.parametrize("name", MATRIX)
def test_a_step_under_autocast_is_the_same_step(name):
    def stepped(autocast):
        g = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(12, 20, generator=g)) for _ in range(2)]
        opt = getattr(optim, name)(params, lr=0.1)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=g)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                opt.step()
        return [p.detach() for p in params]

    torch.testing.assert_close(stepped(True), stepped(False), rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MATRIX)
def test_non_finite_gradients_stay_in_their_expert(name, masked):
    """A stack is many matrices; ``masked``: as accelerators do it, by selection in the graph."""
    g = torch.Generator().manual_seed(0)
    start, grads = torch.randn(4, 6, 5, generator=g), torch.randn(4, 4, 6, 5, generator=g)
    grads[1, 2, 0, 0], grads[2, 0, 1, 1], grads[2, 3, 1, 1] = math.nan, math.inf, math.nan
    stack = nn.Parameter(start.clone())
    alone = [nn.Parameter(m.clone()) for m in start]
    kw = {"lr": 0.1, "weight_decay": 0.2} | ({"gap": 2} if name == "Conda" else {})
    a = getattr(optim, name)([{"params": [stack], "view": "batch"}], **kw)
    b = getattr(optim, name)(alone, **kw)
    for step in grads:
        stack.grad = step.clone()
        for p, one in zip(alone, step, strict=True):
            p.grad = one.clone()
        b.step()
        if masked:
            with torch.no_grad():
                for bucket in a._current():
                    of = lambda s: s.param.grad  # noqa: E731
                    for task in bucket.tasks([0], compile=False, masked=True, grads=of):
                        task.run()
        else:
            a.step()
        if name == "Conda":
            break  # its basis is renewed by the count of the parameter's steps, not of each matrix's
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in alone]))
    for key, value in a.state[stack].items():
        if key != "step":
            each = torch.stack([b.state[p][key] for p in alone])
            torch.testing.assert_close(value, each.view_as(value))


@pytest.mark.parametrize("name", MEMBERS)
def test_contiguous_or_not_and_gradients_kept(name):
    ps = params()
    qs = [nn.Parameter(p.detach().mT.contiguous().mT) for p in ps]
    a, b = build(name, ps), build(name, qs)
    for i in range(3):
        set_grads(ps, i)
        for p, q in zip(ps, qs, strict=True):
            q.grad = p.grad.mT.contiguous().mT
        kept = [p.grad.clone() for p in ps]
        a.step()
        b.step()
        assert_same(kept, [p.grad for p in ps])
        assert_same(kept, [q.grad for q in qs])
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", MEMBERS)
def test_tensor_lr_and_schedulers(name):
    ps, qs = params(), params()
    a = build(name, ps)
    b = build(name, qs, lr=torch.tensor(0.05, dtype=torch.float64))
    sa = torch.optim.lr_scheduler.StepLR(a, 1, 0.5)
    sb = torch.optim.lr_scheduler.StepLR(b, 1, 0.5)
    for i in range(3):
        train(a, ps, 1, start=i)
        train(b, qs, 1, start=i)
        sa.step()
        sb.step()
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q)
    assert float(b.param_groups[0]["lr"]) == pytest.approx(0.05 / 8)


def test_more_schedulers():
    sched = torch.optim.lr_scheduler
    for make in (
        lambda o: sched.CosineAnnealingLR(o, 5),
        lambda o: sched.OneCycleLR(o, 0.1, total_steps=10),
        lambda o: sched.LinearLR(o),
        lambda o: sched.ReduceLROnPlateau(o),
    ):
        ps = params()
        opt = build("Muon", ps)
        s = make(opt)
        for i in range(4):
            train(opt, ps, 1, start=i)
            s.step(*([1.0] if isinstance(s, sched.ReduceLROnPlateau) else []))
        assert all(torch.isfinite(p).all() for p in ps)


@pytest.mark.parametrize("name", MEMBERS)
def test_closure_and_hooks(name):
    ps = params()
    opt = build(name, ps)
    calls = []
    opt.register_step_pre_hook(lambda *a: calls.append("pre"))
    opt.register_step_post_hook(lambda *a: calls.append("post"))

    def closure():
        opt.zero_grad()
        loss = sum((p**2).sum() for p in ps)
        loss.backward()
        calls.append("closure")
        return loss

    assert float(opt.step(closure)) > 0
    assert calls == ["pre", "closure", "post"]
    assert type(opt).__name__ in repr(opt)


@pytest.mark.parametrize("name", WITH_STATE)
def test_state_is_eager_and_stateless_members_have_none(name):
    ps = params()
    opt = build(name, ps)
    assert set(opt.state) == set(ps)
    keys = [sorted(opt.state[p]) for p in ps]
    train(opt, ps, 1)
    assert keys == [sorted(opt.state[p]) for p in ps]
    for s in opt.state.values():
        assert all(isinstance(v, torch.Tensor) for v in s.values())


@pytest.mark.parametrize("name", ["SCALE", "SinkGD", "SWAN"])
def test_stateless(name):
    ps = params()
    opt = build(name, ps)
    train(opt, ps, 2)
    assert len(opt.state) == 0 and opt.state_dict()["state"] == {}
    assert opt.memory()["state"] == 0


FORMULA = {  # state bytes per float32 r×c matrix
    "Muon": lambda r, c: 4 * r * c,
    "NorMuon": lambda r, c: 4 * (r * c + r),
    "ROOT": lambda r, c: 4 * r * c,
    "AuON": lambda r, c: 4 * r * c,
    "HybridAuON": lambda r, c: 4 * r * c,
    "MuonMuP": lambda r, c: 4 * r * c,
    "AdamW": lambda r, c: 4 * (2 * r * c + 1),
    "AdamP": lambda r, c: 4 * (2 * r * c + 1),
    "SGDP": lambda r, c: 4 * r * c,
    "Conda": lambda r, c: 4 * (2 * r * c + min(r, c) ** 2 + 1),
    "ARO": lambda r, c: 4 * (r * c + min(r, c) ** 2),
}


@pytest.mark.parametrize("name", FORMULA)
def test_state_bytes(name):
    opt = build(name, params())
    want = sum(FORMULA[name](*s) for s in SHAPES)
    assert opt.memory()["state"] == want
    counted = sum(v.numel() * v.element_size() for s in opt.state.values() for v in s.values())
    assert counted == want


def test_torch_muon_states_travel_both_ways():
    ps = params()
    a = torch.optim.Muon(ps, lr=0.05)
    train(a, ps, 3)
    qs = [nn.Parameter(p.detach().clone()) for p in ps]
    b = optim.Muon(qs, lr=0.05, ns_dtype=torch.bfloat16, ns_method="direct")
    b.load_state_dict(a.state_dict())
    for p, q in zip(ps, qs, strict=True):
        assert torch.equal(a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"])
    train(a, ps, 2, start=3)
    train(b, qs, 2, start=3)
    for p, q in zip(ps[:4], qs[:4], strict=True):
        torch.testing.assert_close(p, q, rtol=3e-2, atol=3e-3)
    back = torch.optim.Muon([nn.Parameter(q.detach().clone()) for q in qs], lr=0.05)
    back.load_state_dict(b.state_dict())
    assert all("momentum_buffer" in s for s in back.state.values())


def test_signature_accepts_torch_muon_positionally():
    p = params(shapes=[(6, 4)])
    a = (1e-2, 0.2, 0.9, False, (3.0, -4.0, 2.0), 1e-7, 4, "match_rms_adamw")
    ours, theirs = optim.Muon(p, *a), torch.optim.Muon(params(shapes=[(6, 4)]), *a)
    for key, value in theirs.defaults.items():
        assert ours.defaults[key] == value
    q = theirs.param_groups[0]["params"]
    ours._options["compile"] = False
    train(ours, p, 3)
    train(theirs, q, 3)
    torch.testing.assert_close(p[0], q[0], rtol=3e-2, atol=3e-3)


def test_groups_added_frozen_and_resized_later():
    ps = params()
    opt = build("NorMuon", ps[:3])
    train(opt, ps, 1)
    opt.add_param_group({"params": ps[3:], "lr": 0.01})
    assert ps[4] in opt.state
    train(opt, ps, 1, start=1)
    ps[0].requires_grad_(False)
    frozen = ps[0].detach().clone()
    for p in ps:
        p.grad = None if not p.requires_grad else torch.ones_like(p)
    opt.step()
    assert torch.equal(ps[0], frozen)
    ps[1].data = torch.randn(8, 3)
    ps[1].grad = torch.randn(8, 3)
    with pytest.warns(UserWarning, match="afresh"):
        opt.step()
    assert opt.state[ps[1]]["momentum_buffer"].shape == (8, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(opt, ps, 1, start=3)


def test_mixed_dtypes_and_adamw_groups_in_one_optimizer():
    ps = params() + params(dtype=torch.bfloat16) + params(dtype=torch.float64)
    bias = nn.Parameter(torch.randn(5))
    ref = nn.Parameter(bias.detach().clone())
    opt = optim.NorMuon(
        [{"params": ps}, {"params": [bias], "algorithm": "adamw", "lr": 0.01}], lr=0.02
    )
    adam = torch.optim.AdamW([ref], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    assert opt.param_groups[1]["betas"] == (0.9, 0.95)
    for i in range(3):
        set_grads([*ps, bias], i)
        ref.grad = bias.grad.clone()
        opt.step()
        adam.step()
    torch.testing.assert_close(bias, ref)
    assert float(opt.state[bias]["step"]) == 3
    assert optim.Muon([{"params": [bias], "algorithm": "adamw"}]).param_groups[0]["lr"] == 3e-4


def test_grad_scaler_skips_on_overflow():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    p = nn.Parameter(torch.randn(4, 4))
    opt = optim.Muon([p], lr=0.1)
    for bad in (False, True):
        before = p.detach().clone()
        scaler.scale((p * 2).sum()).backward()
        if bad:
            p.grad[0, 0] = math.inf
        scaler.step(opt)
        scaler.update()
        assert torch.equal(before, p) == bad
        opt.zero_grad()


def test_cautious_decay():
    p = nn.Parameter(torch.tensor([[1.0, -1.0], [2.0, 3.0]], dtype=torch.float64))
    ref = p.detach().clone()
    g = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    p.grad = g
    opt = optim.Muon([p], lr=0.1, weight_decay=0.5, cautious=True, ns_steps=0, momentum=0.0)
    opt.step()
    u = g / g.norm()
    shrunk = torch.where(u * ref >= 0, ref * (1 - 0.05), ref)
    torch.testing.assert_close(p.detach(), shrunk - 0.1 * u)


@pytest.mark.parametrize("name", MEMBERS)
def test_bad_hyper_parameters(name):
    cls = getattr(optim, name)
    for kw in (
        {"lr": -1.0},
        {"lr": math.nan},
        {"lr": torch.tensor([0.1, 0.2])},
        {"weight_decay": -0.1},
        {"non_finite": "maybe"},
    ):
        with pytest.raises(ValueError):
            cls(params(), **kw)
    if name != "Muon":
        with pytest.raises(TypeError, match="takes no argument"):
            cls(params(), nonsense=1)
    with pytest.raises(ValueError, match="empty"):
        cls([])
    defaults = cls.algorithm.defaults
    for key in ("betas", "momentum", "beta2", "eps", "dampening", "iterations", "ns_steps"):
        if key in defaults:
            bad = {
                "betas": ((1.0, 0.5), (0.9,), 0.9),
                "iterations": (0, 2.5),
                "ns_steps": (-1, 2.5),
            }
            for value in bad.get(key, (-1.0, math.nan)):
                with pytest.raises(ValueError, match=key):
                    cls(params(), **{key: value})


@pytest.mark.parametrize("name", MATRIX)
def test_bad_parameters_are_named(name):
    cls = getattr(optim, name)
    for bad, message in (
        (nn.Parameter(torch.randn(3)), "bias"),
        (nn.Parameter(torch.randn(2, 3, 4)), "bias"),
        (nn.Parameter(torch.randn(3, 3, dtype=torch.complex64)), "bias is complex"),
        (nn.Parameter(torch.randn(3, 3).to(torch.float8_e4m3fn)), "bias has dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            cls([("weight", nn.Parameter(torch.randn(3, 3))), ("bias", bad)])


def test_numbers_that_became_nan_change_nothing():
    for key, value in (
        ("lr", math.nan),
        ("weight_decay", math.inf),
        ("momentum", torch.tensor(math.nan)),
    ):
        ps = params()
        opt = build("Muon", ps)
        set_grads(ps, 0)
        before = [p.detach().clone() for p in ps]
        opt.param_groups[0][key] = value
        with pytest.raises(ValueError, match=f"{key} of group 0"):
            opt.step()
        assert_same(before, ps)


def test_a_state_dict_of_another_member_says_so():
    saved, opt = build("Muon", params()).state_dict(), build("NorMuon", params())
    with pytest.warns(UserWarning, match="group 0 was saved by 'muon'") as said:
        opt.load_state_dict(saved)
    assert said[0].filename == __file__


def test_bad_gradients_change_nothing():
    ps = params()
    opt = build("Muon", ps)
    set_grads(ps, 0)
    before = [p.detach().clone() for p in ps]
    ps[-1].grad = torch.randn(1, 7).to_sparse()
    with pytest.raises(RuntimeError, match=r"parameter 4 of group 0.*sparse"):
        opt.step()
    assert_same(before, ps)
    assert float(opt.state[ps[0]]["momentum_buffer"].abs().sum()) == 0
    with pytest.raises(ValueError, match="unknown algorithm"):
        optim.Muon([{"params": params(), "algorithm": "magic"}])


def test_empty_parameters():
    ps = [nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.randn(3, 4))]
    for name in MEMBERS:
        opt = build(name, ps)
        for p in ps:
            p.grad = torch.ones_like(p)
        opt.step()
    assert torch.isfinite(ps[1]).all()


def test_bf16_momentum_without_nesterov_is_not_normalized():
    p = nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
    opt = optim.Muon([p], nesterov=False, momentum=0.5)
    p.grad = torch.full((4, 4), 8.0, dtype=torch.bfloat16)
    opt.step()
    assert float(opt.state[p]["momentum_buffer"][0, 0]) == 4.0


def test_step_counter_survives_bf16_loading():
    p = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    opt = optim.AdamW([p])
    opt.state[p]["step"].fill_(1001)
    other = optim.AdamW([nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))])
    other.load_state_dict(opt.state_dict())
    (state,) = other.state.values()
    assert float(state["step"]) == 1001


def test_a_member_in_ten_lines():
    """The example of the guide."""
    from dataclasses import dataclass

    from normfuse.optim.base import Algorithm, MatrixOptimizer
    from normfuse.optim.pipeline import Pipeline
    from normfuse.optim.stages import Momentum, Scale, Stage

    @dataclass(frozen=True)
    class Sign(Stage):
        def __call__(self, batch):
            return batch.with_(batch.update.sign())

    class Signum(MatrixOptimizer):
        algorithm = Algorithm(
            "signum",
            lambda group: Pipeline((Momentum(), Sign(), Scale("none", 0.2)), ("momentum",)),
            {"lr": 1e-3, "weight_decay": 0.0, "momentum": 0.9},
        )

        def __init__(self, params, lr=1e-3):
            super().__init__(params, {"lr": lr})

    p = nn.Parameter(torch.zeros(3, 3))
    p.grad = torch.randn(3, 3)
    Signum([p], lr=1.0).step()
    torch.testing.assert_close(p.detach(), -0.2 * p.grad.sign())
