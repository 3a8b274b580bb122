"""Extensions of norms: the identity at insertion, the formula afterwards, refusals, tied modules."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from extend_models import Block, Hidden, Two, capture_, run_pass, stirred
from hypothesis import given, settings
from hypothesis import strategies as st
from normfuse import NormfuseError, passes
from normfuse.passes import Context, PassManager, ir, ops
from torch import nn

NORMS = ["InsertGatedNorm", "InsertPreAffine", "SeeDNorm", "AdaRMSNorm"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def equal(a, b):
    assert a.dtype == b.dtype
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_at_insertion_is_bit_exact(name, dtype):
    model = stirred(Two(16)).to(dtype)
    x = torch.randn(3, 5, 16).to(dtype) * 4
    gm = capture_(model, x)
    before = gm(x)
    report = run_pass(gm, name)
    assert len(report.applied) == 3 and not report.refused
    equal(gm(x), before)
    assert before.isfinite().all()


@given(
    width=st.sampled_from([1, 2, 7, 32, 96]),
    dtype=st.sampled_from(DTYPES),
    affine=st.sampled_from(["none", "gain", "bias", "wide gain"]),
    zero_gain=st.booleans(),
    scale=st.sampled_from([0.0, 1e-4, 1.0, 100.0]),
    casts=st.sampled_from(["plain", "stat", "hf", "native"]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_ops_are_the_plain_norm_at_their_identity(
    width, dtype, affine, zero_gain, scale, casts, seed
):
    """Every op, cast order and kind of affine: bit for bit the plain norm."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, 3, width, generator=g) * scale).to(dtype)
    kinds = {
        "plain": {},
        "stat": {"stat_dtype": torch.float32},
        "hf": {"stat_dtype": torch.float32, "norm_dtype": dtype},
        "native": {"stat_dtype": torch.float32, "norm_dtype": torch.float32, "out_dtype": dtype},
    }[casts]
    if dtype == torch.float64:
        kinds = {}
    own = torch.float32 if affine == "wide gain" else dtype
    gain = bias = None
    if affine != "none":
        gain = torch.randn(width, generator=g).to(own)
        if zero_gain:
            gain[0] = 0
    if affine == "bias":
        bias = torch.randn(width, generator=g).to(own)
    plain = ops.rms_norm(x, [-1], gain, bias, 1e-6, **kinds)
    down = (torch.randn(5, width, generator=g) / width**0.5).to(own)
    up = torch.zeros(width, 5, dtype=own)
    equal(ops.gated_rms_norm(x, [-1], gain, bias, down, up, 1e-6, **kinds), plain)
    equal(ops.self_gate(plain, down, up), plain)
    one, zero = torch.ones(width, dtype=own), torch.zeros(width, dtype=own)
    heads = 1 if width % 2 else 2
    equal(ops.seed_norm(x, [-1], gain, bias, one, zero, 1e-6, heads=heads, **kinds), plain)
    equal(ops.ada_rms_norm(x, [-1], gain, bias, zero, one, 1e-6, **kinds), plain)


class Reference:
    """The papers' formulas with the graph's own parameters, in float64."""

    @staticmethod
    def rms(x, g):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * g

    @classmethod
    def gated(cls, x, g, p):
        y = cls.rms(x, g)
        return y * 2 * torch.sigmoid(F.silu(y @ p["gate_down"].T) @ p["gate_up"].T)

    @classmethod
    def pre(cls, x, g, p):
        return cls.rms(x * p["pre_affine"], g)

    @classmethod
    def seed(cls, x, g, p, heads=4):
        split = (x * p["seed_beta"]).unflatten(-1, (heads, -1)).sum(-1, keepdim=True).tanh()
        s = split.expand(*split.shape[:-1], x.shape[-1] // heads).flatten(-2)
        return cls.rms(x, 1) * (s * p["seed_alpha"] + g)

    @classmethod
    def ada(cls, x, g, p):
        m = (x * p["ada_alpha"] + p["ada_beta"]).square().mean(-1, keepdim=True)
        return cls.rms(x, g) * ((m + 1e-6) / (1 + 1e-6)).sqrt()


@pytest.mark.parametrize(
    "name, options, formula",
    [
        ("InsertGatedNorm", {"rank": 3}, Reference.gated),
        ("InsertPreAffine", {}, Reference.pre),
        ("SeeDNorm", {"heads": 4}, Reference.seed),
        ("AdaRMSNorm", {}, Reference.ada),
    ],
)
def test_trained_values_and_gradients_follow_the_formula(name, options, formula):
    torch.manual_seed(0)
    model = stirred(Block(8)).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    gm = capture_(model, x)
    run_pass(gm, name, context=Context(training=True), **options)
    new = gm.meta["new_parameters"]
    assert all(n.startswith("norm.") for n in new)
    with torch.no_grad():
        for p in new.values():
            p.add_(torch.randn_like(p) * 0.3)
    local = {n.removeprefix("norm."): p for n, p in new.items()}
    expected = x + model.linear(formula(x, model.norm.weight, local))
    actual = gm(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    inputs = [x, model.norm.weight, model.linear.weight, *new.values()]
    weight = torch.randn_like(expected)
    for a, e in zip(
        torch.autograd.grad((actual * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        assert e.abs().sum() > 0
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_sizes_stay_symbolic():
    for name in NORMS:
        model = stirred(Two(8))
        gm = capture_(model, torch.randn(2, 3, 8), dynamic=True)
        run_pass(gm, name)
        x = torch.randn(4, 7, 8)
        torch.testing.assert_close(gm(x), model(x))


@pytest.mark.parametrize("name", NORMS)
def test_extended_graphs_can_be_captured_again(name):
    """``torch.compile`` and ``rewrite`` of an extended model see its norms, under some key."""
    x = torch.randn(2, 3, 8)
    gm = capture_(stirred(Two(8)), x)
    run_pass(gm, name)
    again = capture_(gm, x)
    sites = [n.meta["site"] for n in ir.norm_nodes(again)]
    assert len(sites) == len(set(sites)) == 3
    assert torch.equal(again(x), gm(x))
    report = run_pass(again, name)
    assert not report.applied and len(report.refused) == 3


def test_first_gradients_are_alive():
    """At insertion at least one parameter of each extension has a gradient."""
    alive = {
        "InsertGatedNorm": "gate_up",
        "InsertPreAffine": "pre_affine",
        "SeeDNorm": "seed_beta",
        "AdaRMSNorm": "ada_beta",
    }
    for name, which in alive.items():
        model = stirred(Two(8))
        x = torch.randn(2, 3, 8)
        gm = capture_(model, x)
        run_pass(gm, name)
        gm(x).square().sum().backward()
        for n, p in gm.meta["new_parameters"].items():
            if n.endswith(which):
                assert p.grad is not None and p.grad.abs().sum() > 0, n


@pytest.mark.parametrize("name", NORMS)
def test_second_run_changes_nothing(name):
    gm = capture_(stirred(Two(8)), torch.randn(2, 3, 8))
    run_pass(gm, name)
    code, names = gm.code, list(gm.meta["new_parameters"])
    report = run_pass(gm, name)
    assert not report.applied and len(report.refused) == 3
    assert all("already" in reason for _, _, reason in report.refused)
    assert gm.code == code and list(gm.meta["new_parameters"]) == names


def test_rescalings_exclude_each_other_but_not_the_pre_affine():
    gm = capture_(stirred(Two(8)), torch.randn(2, 3, 8))
    run_pass(gm, "InsertGatedNorm")
    report = run_pass(gm, "SeeDNorm")
    assert not report.applied and "gated already" in report.refused[0][2]
    for order in (("InsertPreAffine", "SeeDNorm"), ("AdaRMSNorm", "InsertPreAffine")):
        x = torch.randn(2, 3, 8)
        gm = capture_(stirred(Two(8)), x)
        before = gm(x)
        assert [len(run_pass(gm, name).applied) for name in order] == [3, 3]
        equal(gm(x), before)


def test_layer_norms_are_gated_and_otherwise_refused():
    x = torch.randn(2, 3, 8)
    model = stirred(Two(8, nn.LayerNorm))
    gm = capture_(model, x)
    before = gm(x)
    for name in ("SeeDNorm", "AdaRMSNorm"):
        report = run_pass(gm, name)
        assert not report.applied and "run remove_mean first" in report.refused[0][2]
    assert len(run_pass(gm, "InsertGatedNorm").applied) == 3
    equal(gm(x), before)
    assert sum(ir.is_call(n, torch.ops.normfuse.self_gate) for n in gm.graph.nodes) == 3
    report = run_pass(gm, "InsertGatedNorm")
    assert not report.applied and "gated already" in report.refused[0][2]
    with torch.no_grad():
        for p in gm.meta["new_parameters"].values():
            p.normal_()
    p = gm.meta["new_parameters"]
    h = x
    for b in ("a", "b"):
        block = getattr(model, b)
        y = block.norm(h)
        gate = F.silu(y @ p[f"{b}.norm.gate_down"].T) @ p[f"{b}.norm.gate_up"].T
        h = h + block.linear(y * 2 * gate.sigmoid())
    y = model.norm(h)
    gate = F.silu(y @ p["norm.gate_down"].T) @ p["norm.gate_up"].T
    torch.testing.assert_close(gm(x), y * 2 * gate.sigmoid(), rtol=1e-4, atol=1e-5)


def test_norms_with_a_bounded_statistic_are_gated_and_otherwise_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return x + self.linear(F.normalize(x, dim=-1) * 8**0.5)

    x = torch.randn(3, 8)
    x[0] = 0
    gm = capture_(Model(), x)
    before = gm(x)
    for name in ("SeeDNorm", "AdaRMSNorm"):
        report = run_pass(gm, name)
        assert not report.applied and "insert_gated_norm" in report.refused[0][2]
    assert run_pass(gm, "InsertGatedNorm").applied
    equal(gm(x), before)


def test_fused_residual_norms():
    x = torch.randn(2, 3, 8)
    gm = capture_(stirred(Two(8)), x)
    before = gm(x)
    PassManager(["fuse_residual_norm"]).run(gm)
    if not any(ir.is_call(n, torch.ops.normfuse.add_rms_norm) for n in gm.graph.nodes):
        pytest.fail("the residual norms were not fused, the test tests nothing")
    for name in ("InsertPreAffine", "SeeDNorm"):
        probe = capture_(stirred(Two(8)), x)
        PassManager(["fuse_residual_norm"]).run(probe)
        report = run_pass(probe, name)
        assert any("run before fuse_residual_norm" in r for _, _, r in report.refused)
    assert len(run_pass(gm, "InsertGatedNorm").applied) == 3
    torch.testing.assert_close(gm(x), before, rtol=0, atol=0)


class TiedNorm(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(d), nn.Linear(d, d)

    def forward(self, x):
        for _ in range(3):
            x = x + self.linear(self.norm(x))
        return x


@pytest.mark.parametrize("name", NORMS)
def test_a_module_called_three_times_has_one_parameter_set(name):
    x = torch.randn(2, 8)
    gm = capture_(stirred(TiedNorm()), x)
    before = gm(x)
    report = run_pass(gm, name)
    assert len(report.applied) == 3
    assert len(gm.meta["new_parameters"]) == (1 if name == "InsertPreAffine" else 2)
    leaves = [n.target for n in gm.graph.find_nodes(op="get_attr")]
    assert len(leaves) == len(set(leaves))
    equal(gm(x), before)


class PlainGains(nn.Module):
    """Two written-out norms whose gains live in one module: two parameter sets."""

    def __init__(self, d=8):
        super().__init__()
        self.g1, self.g2 = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))
        self.linear = nn.Linear(d, d)

    def forward(self, x):
        def norm(h, g):
            return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * g

        x = x + self.linear(norm(x, self.g1))
        return x + self.linear(norm(x, self.g2))


def test_two_gains_in_one_module_do_not_share():
    gm = capture_(stirred(PlainGains()), torch.randn(2, 8))
    run_pass(gm, "InsertPreAffine")
    assert set(gm.meta["new_parameters"]) == {"g1_pre_affine", "g2_pre_affine"}


def test_sites():
    x = torch.randn(2, 3, 8)

    def applied(**options):
        gm = capture_(stirred(Two(8)), x)
        return [key for key, _ in run_pass(gm, "InsertGatedNorm", **options).applied]

    assert applied() == ["a.norm", "b.norm", "norm"]
    assert applied(sites=["b.norm"]) == ["b.norm"]
    assert applied(sites="?.norm") == ["a.norm", "b.norm"]
    assert applied(sites=lambda key, node: key == "norm") == ["norm"]
    assert applied(sites=[]) == []


def test_norms_beside_the_stream_must_be_named():
    x = torch.randn(2, 3, 8)
    gm = capture_(stirred(Hidden(8)), x)
    report = run_pass(gm, "InsertGatedNorm")
    assert [k for k, _ in report.applied] == ["norm"]
    assert report.refused[0][0] == "inner"
    assert "name it in sites=" in report.refused[0][2]
    gm = capture_(stirred(Hidden(8)), x)
    assert len(run_pass(gm, "InsertGatedNorm", sites=["inner", "norm"]).applied) == 2


def test_existing_parameters_are_taken_over():
    """Another capture of an extended model finds its trained gates instead of making new ones."""
    x = torch.randn(2, 3, 8)
    model = stirred(Block(8))
    gm = capture_(model, x)
    run_pass(gm, "InsertGatedNorm", rank=2)
    for name, p in gm.meta["new_parameters"].items():
        with torch.no_grad():
            p.normal_()
        model.norm.register_parameter(name.removeprefix("norm."), p)
    again = capture_(model, x)
    again.meta["example_inputs"] = [x]
    _, report = PassManager([passes.InsertGatedNorm(rank=2)], verify=True).run(again)
    assert len(report.applied) == 1 and not report.failed_verification
    assert again.meta["new_parameters"]["norm.gate_up"] is model.norm.gate_up
    torch.testing.assert_close(again(x), gm(x))
    assert not torch.allclose(again(x), model(x))
    report = run_pass(capture_(model, x), "InsertGatedNorm", rank=3)
    assert "already has an attribute 'norm.gate_down'" in report.refused[0][2]


def test_refusals():
    class TwoDims(nn.Module):
        def forward(self, x):
            return x + F.rms_norm(x, (3, 8))

    class Channels(nn.Module):
        def forward(self, x):
            return x + x * torch.rsqrt(x.pow(2).mean(-3, keepdim=True) + 1e-6)

    x = torch.randn(2, 4, 3, 8)
    for model in (TwoDims(), Channels()):
        for name in ("InsertGatedNorm", "SeeDNorm", "AdaRMSNorm"):
            report = run_pass(capture_(model, x), name, sites=["*"])
            assert "act on the last dim" in report.refused[0][2]
        gm = capture_(model, x)
        assert run_pass(gm, "InsertPreAffine", sites=["*"]).applied
        equal(gm(x), model(x))
    report = run_pass(capture_(Two(8), torch.randn(2, 8)), "SeeDNorm", heads=3)
    assert "3 heads do not divide the width 8" in report.refused[0][2]
    gm = capture_(Two(8), torch.randn(2, 8))
    report = run_pass(gm, "InsertGatedNorm", context=Context(options={"dynamo": {"on": True}}))
    assert "nowhere to keep" in report.refused[0][2] and not gm.meta["new_parameters"]
    for bad in (
        lambda: passes.InsertGatedNorm(rank=0),
        lambda: passes.SeeDNorm(heads=0),
        lambda: passes.AdaRMSNorm(ada_eps=0),
        lambda: passes.InsertGatedNorm(sites=[1]),
    ):
        with pytest.raises(NormfuseError):
            bad()


def test_frozen_models_get_trainable_gates():
    model = stirred(Two(8)).requires_grad_(False)
    x = torch.randn(2, 8)
    gm = capture_(model, x)
    run_pass(gm, "InsertGatedNorm")
    gm(x).sum().backward()
    trainable = {n for n, p in gm.named_parameters() if p.requires_grad}
    assert trainable == set(gm.meta["new_parameters"])
    assert gm.meta["new_parameters"]["a.norm.gate_up"].grad.abs().sum() > 0


def test_parameters_are_the_models_kind():
    """Dtype of the gain; the same values for the same name and seed; saved and loaded."""
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    make = lambda **o: (lambda gm: (run_pass(gm, "InsertGatedNorm", **o), gm)[1])(  # noqa: E731
        capture_(stirred(Two(8)).to(torch.bfloat16), x)
    )
    one, two, other = make(), make(), make(seed=1)
    assert all(p.dtype == torch.bfloat16 for p in one.meta["new_parameters"].values())
    down = "a.norm.gate_down"
    equal(one.get_parameter(down), two.get_parameter(down))
    assert not torch.equal(one.get_parameter(down), other.get_parameter(down))
    assert not torch.equal(one.get_parameter(down), one.get_parameter("b.norm.gate_down"))
    assert one.get_parameter(down).abs().max() <= 8**-0.5
    other.load_state_dict(one.state_dict())
    equal(one.get_parameter(down), other.get_parameter(down))


def test_autocast():
    model = stirred(Two(8))
    x = torch.randn(2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        gm = capture_(model, x)
        plain = model(x)
    for name in NORMS:
        with torch.autocast("cpu", torch.bfloat16):
            gm = capture_(model, x)
        before = gm(x)
        run_pass(gm, name)
        equal(gm(x), before)
        torch.testing.assert_close(gm(x), plain, rtol=2e-2, atol=2e-2)


def test_uuid_and_pickle():
    p = passes.InsertGatedNorm(["a", "b"], rank=4)
    q = pickle.loads(pickle.dumps(p))
    assert q.uuid() == p.uuid() and q.options == p.options
    assert p.uuid() != passes.InsertGatedNorm(["a"], rank=4).uuid()

    def chosen(key, node):
        return True

    f = passes.InsertGatedNorm(chosen)
    assert "0x" not in f.uuid() and f.uuid() == passes.InsertGatedNorm(chosen).uuid()
    assert f.uuid() != passes.InsertGatedNorm(lambda key, node: False).uuid()


def test_verified_insertion():
    x = torch.randn(2, 3, 8)
    for name in NORMS:
        gm = capture_(stirred(Two(8)), x)
        gm.meta["example_inputs"] = [x]
        _, report = PassManager([getattr(passes, name)()], verify=True).run(gm)
        assert len(report.applied) == 3 and not report.failed_verification


def test_exact_passes_around_a_gate():
    """Folding refuses the gated norms and stays correct; gates after folding too."""
    x = torch.randn(2, 3, 8)
    model = stirred(Two(8))
    for order in (
        [passes.InsertGatedNorm(), "fold_affine"],
        ["fold_affine", passes.InsertGatedNorm()],
    ):
        gm = capture_(model, x)
        PassManager(order).run(gm)
        torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-5)


def kept_for_backward(module, x):
    """Bytes that a compiled forward keeps, without parameters and inputs."""
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), x)}
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager_decomp_partition")
    compiled(x)
    sizes = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        compiled(x)
    return sum(sizes.values())


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_a_compiled_gate_keeps_one_value_per_entry(norm):
    """The normalized value; the gate's logits are made again from ``rank`` numbers a token."""
    x = torch.randn(4, 32, 64)
    kept = []
    for todo in (None, "InsertGatedNorm"):
        gm = capture_(Two(64, norm), x)
        if todo:
            run_pass(gm, todo, rank=2)
        kept.append(kept_for_backward(gm, x))
    gates = 3
    small = gates * 4 * 32 * 4 * 8  # a few numbers a token
    assert 0 < kept[1] - kept[0] <= gates * x.nbytes + small
