"""AbsorbOutliers: against norms whose channels are overwritten by hand; what it measures; refusals."""

import copy
import pickle

import normfuse
import pytest
import torch
from extend_models import stirred
from hypothesis import given, settings
from hypothesis import strategies as st
from normfuse import NormfuseError, passes
from normfuse.passes import Context, PassManager, ir
from normfuse.passes.verify import flat_double
from normfuse.runtime.quantize_sim import quantize_linears
from torch import nn


class Sinky(nn.Module):
    """Two pre-norm blocks on a stream with a huge, nearly constant channel."""

    def __init__(self, d=16, norm=nn.RMSNorm, bias=True, readers=1, sinks=(3,), size=60.0):
        super().__init__()
        self.embed = nn.Embedding(32, d)
        self.norms = nn.ModuleList(norm(d) for _ in range(2))
        self.ups = nn.ModuleList(
            nn.ModuleList(nn.Linear(d, d, bias=bias) for _ in range(readers)) for _ in range(2)
        )
        stirred(self)
        with torch.no_grad():
            for n in self.norms:
                if getattr(n, "weight", None) is not None:
                    n.weight.add_(1 - n.weight.mean())
            for i, sink in enumerate(sinks):
                self.embed.weight[:, sink] = size * (-1) ** i

    def forward(self, ids):
        x = self.embed(ids)
        for norm, ups in zip(self.norms, self.ups, strict=True):
            h = norm(x)
            for up in ups:
                x = x + up(h).tanh()
        return x


def data(n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 32, (2, 8), generator=g) for _ in range(n)]


def rms(d):
    return nn.RMSNorm(d, eps=1e-6)


def bare(d):
    return nn.RMSNorm(d, eps=1e-6, elementwise_affine=False)


def absorb(model, batches, verify=False, **options):
    stats = normfuse.calibrate(model, batches, progress=False)
    gm = passes.capture(model, (batches[0],), dynamic=False)
    gm.meta["example_inputs"] = [batches[0]]
    p = passes.AbsorbOutliers(stats, **options)
    gm, report = PassManager([p], verify=verify).run(gm)
    return gm, report, stats


def overwritten(model, batches, channels):
    """The model with its norms' results at ``channels`` replaced by their means over ``batches``."""
    seen = [[] for _ in model.norms]
    hooks = [
        n.register_forward_hook(lambda m, i, y, s=s: s.append(y.detach().reshape(-1, y.shape[-1])))
        for n, s in zip(model.norms, seen, strict=True)
    ]
    for b in batches:
        model(b)
    for h in hooks:
        h.remove()
    model = copy.deepcopy(model)

    def put(mean):
        def hook(module, inputs, y):
            y = y.clone()
            y[..., channels] = mean
            return y

        return hook

    for n, s in zip(model.norms, seen, strict=True):
        n.register_forward_hook(put(torch.cat(s)[:, channels].mean(0)))
    return model


@given(
    norm=st.sampled_from([rms, bare, nn.LayerNorm]),
    d=st.sampled_from([8, 16, 33]),
    bias=st.booleans(),
    readers=st.integers(1, 3),
    sinks=st.sampled_from([(3,), (0, 7)]),
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_is_the_model_with_its_channels_overwritten(norm, d, bias, readers, sinks):
    model = Sinky(d, norm, bias, readers, sinks).double()
    batches = data()
    gm, report, _ = absorb(model, batches, ratio=2.0)
    assert report.applied == [(f"norms.{i}", "absorb_outliers") for i in range(2)], report.refused
    want = overwritten(model, batches, list(sinks))(batches[1])
    torch.testing.assert_close(gm(batches[1]), want, rtol=1e-12, atol=1e-12)
    # and it is an approximation, not the same function
    error = (gm(batches[1]) - model(batches[1])).abs().max()
    assert 0 < error < 0.05


def test_the_readers_see_no_outlier_and_low_precision_gains():
    # the first norm adds a varying remainder; 4-bit activations of the plain model lose it
    model, batches = Sinky(32, rms), data()
    gm, report, stats = absorb(model, batches)
    assert len(report.applied) == 2
    after = normfuse.calibrate(gm, batches, progress=False)
    for entry in after.of_kind("linear"):
        assert float(entry.stats.abs_max[3]) == 0
        before = stats[entry.key].stats
        assert before.max_to_median > 5 * entry.stats.max_to_median
        others = torch.arange(32) != 3
        torch.testing.assert_close(
            entry.stats.mean[others], before.mean[others], rtol=0.05, atol=0.05
        )
    plain = passes.capture(model, (batches[0],), dynamic=False)
    with torch.no_grad():
        truth = model(batches[2])
        lost = [
            float((quantize_linears(g, 8, 4)(batches[2]) - truth).square().mean())
            for g in (plain, gm)
        ]
    assert lost[1] < 0.1 * lost[0]


def test_report_states_tolerance_and_measured_error():
    model, batches = Sinky(), data()
    gm, report, stats = absorb(model, batches, verify=True, tolerance=0.04)
    notes = [n for n in report.notes if n.startswith("absorb_outliers: norms.0, channel 3 ")]
    assert len(notes) == 1 and "tolerance 0.04" in notes[0] and "48 rows" in notes[0]
    s = stats.entries["linear:ups.0.0"].stats
    deviation = float(torch.maximum(s.high - s.mean, s.mean - s.low)[3] / s.mean[3].abs())
    assert f"within {deviation:.2g} of their mean" in notes[0]
    change = float((s.variance[3] / (s.variance + s.mean**2).sum()).sqrt())
    assert f"change by {change:.2g} relative" in notes[0]
    (measured,) = [n for n in report.notes if "changes the result by" in n]
    truth = copy.deepcopy(model).double()(batches[0])
    (now,) = flat_double(gm, [batches[0]])
    error = (now - truth).abs().max() / truth.abs().max()
    assert f"by {float(error):.1e} relative" in measured


def test_exactly_constant_channels_change_nothing():
    """A LayerNorm with gain 0 at a channel hands its bias there to every reader."""
    model = Sinky(16, nn.LayerNorm, sinks=()).double()
    with torch.no_grad():
        for n in model.norms:
            n.weight[5], n.bias[5] = 0.0, 40.0
    batches = data()
    gm, report, _ = absorb(model, batches, tolerance=0.0)
    assert len(report.applied) == 2
    torch.testing.assert_close(gm(batches[0]), model(batches[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_models(dtype):
    model, batches = Sinky().to(dtype), data()
    gm, report, _ = absorb(model, batches)
    assert len(report.applied) == 2
    out = gm(batches[0])
    assert out.dtype == dtype
    truth = copy.deepcopy(model).double()(batches[0])
    bound = 0.01 if dtype == torch.float32 else 0.1
    assert (out - truth).abs().max() < bound * truth.abs().max()


def test_gradients_reach_the_model_and_rewrite_keeps_its_state():
    model, batches = Sinky(), data()
    stats = normfuse.calibrate(model, batches, progress=False)
    p = passes.AbsorbOutliers(stats)
    new, report = normfuse.rewrite(model, (batches[0],), passes=[p], verify=True)
    assert len(report.applied) == 2 and report.max_relative_error == 0.0
    assert any("changes the function" in n for n in report.notes)
    assert set(new.state_dict()) == set(model.state_dict())
    new(batches[0]).square().sum().backward()
    assert all(q.grad is not None for q in new.norms.parameters())
    assert float(new.norms[0].weight.grad[3]) == 0  # the absorbed channel is constant now
    again = pickle.loads(pickle.dumps(new))
    torch.testing.assert_close(again(batches[1]), new(batches[1]))


def refusals(model, batches, manager=None, context=None, stats=None, **options):
    stats = stats or normfuse.calibrate(model, batches, progress=False)
    gm = passes.capture(model, (batches[0],), dynamic=False)
    before = gm.code
    todo = [*(manager or []), passes.AbsorbOutliers(stats, **options)]
    gm, report = PassManager(todo, context).run(gm)
    assert not [a for a in report.applied if a[1] == "absorb_outliers"]
    if not manager:
        assert gm.code == before
    return " | ".join(r for _, p, r in report.refused if p == "absorb_outliers")


class Raw(Sinky):
    def forward(self, ids):
        x = self.embed(ids)
        h = self.norms[0](x)
        return x + self.ups[0][0](h), h.sum()


def test_refusals():
    model, batches = Sinky(), data()
    assert "vary over tokens" in refusals(model, batches, tolerance=1e-9)
    assert "no channel of its result is 100× the median" in refusals(model, batches, ratio=100.0)
    assert "is not a linear layer of these features" in refusals(Raw(), batches)
    stats = normfuse.calibrate(model, batches, progress=False)
    assert "gain has changed since" in refusals(Sinky(24), batches, stats=stats)
    assert "no figures of this reader's input" in refusals(Sinky(readers=2), batches, stats=stats)
    assert "gain has changed since" in refusals(
        Sinky(size=50.0).apply(lambda m: isinstance(m, nn.RMSNorm) and m.weight.data.mul_(2)),
        batches,
        stats=stats,
    )
    assert "has no gain" in refusals(model, batches, ["fold_affine"], stats=stats)
    assert "dynamic rescaling" in refusals(
        model, batches, [passes.InsertGatedNorm(sites=["*"])], stats=stats
    )
    backend = Context(options={"dynamo": {"backend": True}})
    assert "backend never changes a function" in refusals(model, batches, context=backend)
    broken = Sinky()
    with torch.no_grad():
        broken.embed.weight[:, 4] = float("nan")
    assert "are not finite" in refusals(broken, batches)
    single = [b[:1, :1] for b in batches[:1]]
    assert "fewer than two" in refusals(model, single)


def test_bad_arguments():
    with pytest.raises(NormfuseError, match="needs a calibration"):
        passes.AbsorbOutliers()
    with pytest.raises(NormfuseError, match="needs a calibration"):
        PassManager(["absorb_outliers"])
    stats = normfuse.calibrate(Sinky(), data(), progress=False)
    for options in ({"tolerance": -0.1}, {"tolerance": 1.0}, {"ratio": 0.0}):
        with pytest.raises(NormfuseError, match=next(iter(options))):
            passes.AbsorbOutliers(stats, **options)


def test_idempotent_and_uuid():
    model, batches = Sinky(), data()
    gm, _, stats = absorb(model, batches)
    code = gm.code
    p = passes.AbsorbOutliers(stats)
    gm, report = PassManager([p]).run(gm)
    assert gm.code == code and not report.applied
    assert all("absorbed already" in r for _, _, r in report.refused)
    assert p.uuid() == passes.AbsorbOutliers(stats).uuid()
    other = normfuse.calibrate(model, data(seed=1), progress=False)
    assert p.uuid() != passes.AbsorbOutliers(other).uuid()
    assert p.uuid() != passes.AbsorbOutliers(stats, tolerance=0.1).uuid()


def test_order_with_folding():
    """Folding after would bring the channel back; folding before hands over a raw sink to absorb."""
    model, batches = Sinky().double(), data()
    gm, _, _ = absorb(model, batches)
    gm, report = PassManager(["fold_affine"]).run(gm)
    assert all("absorb_outliers" in r for _, _, r in report.refused) and len(report.refused) == 2

    with torch.no_grad():
        for n in model.norms:
            n.weight[3] = 1e-3  # hidden from the readers until it is folded
    gm = passes.capture(model, (batches[0],), dynamic=False)
    with pytest.warns(normfuse.passes.NormfuseWarning, match="channels 3"):
        PassManager(["fold_affine"]).run(gm)
    exposed = normfuse.calibrate(gm, batches, progress=False)
    assert all(e.stats.max_to_median > 5 for e in exposed.of_kind("linear"))
    gm, report = PassManager([passes.AbsorbOutliers(exposed)]).run(gm)
    assert len(report.applied) == 2, report.refused
    hidden = normfuse.calibrate(gm, batches, progress=False)
    assert all(float(e.stats.abs_max[3]) == 0 for e in hidden.of_kind("linear"))
    torch.testing.assert_close(gm(batches[0]), model(batches[0]), rtol=1e-4, atol=1e-4)


def test_shared_weights_and_modules_called_twice():
    """One linear module read behind two norms: each call gets a bias of its own."""

    class Shared(Sinky):
        def forward(self, ids):
            x = self.embed(ids)
            for norm in self.norms:
                x = x + self.ups[0][0](norm(x)).tanh()
            return x

    model, batches = Shared(16, rms).double(), data()
    gm, report, _ = absorb(model, batches)
    assert len(report.applied) == 2
    want = overwritten(model, batches, [3])(batches[1])
    torch.testing.assert_close(gm(batches[1]), want, rtol=1e-12, atol=1e-12)
    assert sum(ir.is_call(n, torch.ops.aten.linear) for n in gm.graph.nodes) == 2
