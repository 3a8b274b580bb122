"""Folding a near-zero gain says what it brings to light, once, and how to avoid it."""

import warnings

import normfuse
import pytest
import torch
from extend_models import Two, stirred
from normfuse import passes
from normfuse.passes import Context, NormfuseWarning, PassManager
from normfuse.passes.exposure import HIDING_GAIN, hidden_channels, weight_value
from normfuse.passes.presets import ROTATION_NOTE, resolve
from torch import nn


class Embedded(nn.Module):
    """Two pre-norm blocks behind an embedding with a large channel 2."""

    def __init__(self, d=16, hide=True):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(32, d), Two(d), nn.Linear(d, 8)
        stirred(self)
        with torch.no_grad():
            self.embed.weight[:, 2] = 50.0
            for norm in (self.body.a.norm, self.body.b.norm, self.body.norm):
                norm.weight.fill_(1.0)
            if hide:
                self.body.a.norm.weight[2] = 1e-3
                self.body.b.norm.weight[2] = 1e-2

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)))


def ids():
    return torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))


def fold(model, context=None, todo=("fold_affine",)):
    gm = passes.capture(model, (ids(),), dynamic=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        gm, report = PassManager(list(todo), context).run(gm)
    texts = [str(w.message) for w in seen if issubclass(w.category, NormfuseWarning)]
    return gm, report, texts


def test_one_warning_and_one_line_from_the_gains_alone():
    model = Embedded()
    gm, report, texts = fold(model)
    assert len(report.applied) == 3  # it is exact all the same
    torch.testing.assert_close(gm(ids()), model(ids()), rtol=1e-4, atol=1e-4)
    (text,) = texts
    assert [n for n in report.notes if n == text]
    assert "2 norms" in text and "body.a.norm, channels 2, 0.001× the median" in text
    for advice in ("insert_gated_norm before fold_affine", "keep=", "absorb_outliers after"):
        assert advice in text


def test_silent_where_nothing_is_hidden_or_folded():
    assert fold(Embedded(hide=False))[2] == []
    assert fold(Embedded(), todo=["remove_mean"])[2] == []
    # a norm without gain, with a single channel, with an all-zero gain
    gm = passes.capture(Two(16), (torch.randn(2, 3, 16),), dynamic=False)
    assert hidden_channels(gm, "a.norm", None) is None
    assert fold(Embedded(), Context(disabled=frozenset({"fold_affine"})))[2] == []


def test_the_recommended_orders_are_silent_and_keep_it_hidden():
    for todo in (
        [passes.InsertGatedNorm(sites=["body.a.norm", "body.b.norm"]), "fold_affine"],
        [passes.FoldAffine(keep=["body.a.norm", "body.[b].norm"])],
        [passes.FoldAffine(keep="body.?.norm")],
    ):
        gm, report, texts = fold(Embedded(), todo=todo)
        assert texts == [], todo
        assert ("body.norm", "fold_affine") in report.applied
        stats = normfuse.calibrate(gm, [ids()], progress=False)
        assert all(e.stats.abs_max[2] < 1 for e in stats.of_kind("linear")[:2])
    refused = [r for _, p, r in report.refused if p == "fold_affine"]
    assert len(refused) == 2 and all("on request" in r for r in refused)
    # in the other order the gate comes too late
    gate = passes.InsertGatedNorm(sites=["body.a.norm"])
    assert fold(Embedded(), todo=["fold_affine", gate])[2] != []
    # another set of kept sites is another pass
    assert passes.FoldAffine(keep="a").uuid() != passes.FoldAffine(keep="b").uuid()


def test_with_a_calibration_what_was_measured_decides():
    model = Embedded()
    with torch.no_grad():
        model.body.norm.weight[7] = 1e-3  # small, but nothing large behind it
    stats = normfuse.calibrate(model, [ids()], progress=False)
    assert {h[0] for h in stats.hidden()} == {"body.a.norm", "body.b.norm"}
    (text,) = fold(model, Context(calibration=stats))[2]
    assert "2 norms" in text and "large channels 2" in text
    assert "3 norms" in fold(model)[2][0]


def test_effective_gain_of_one_plus_w():
    class Gemma(nn.Module):
        def __init__(self, d=16):
            super().__init__()
            self.weight, self.up = nn.Parameter(torch.zeros(d)), nn.Linear(d, d)

        def forward(self, x):
            h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            return x + self.up(h * (1 + self.weight))

    model, x = Gemma(), torch.randn(2, 3, 16)
    gm = passes.capture(model, (x,), dynamic=False)
    (norm,) = passes.ir.norm_nodes(gm)
    gain = passes.ir.NormArgs(norm).gain
    # zeros of w are gains of one
    assert torch.equal(weight_value(gm, gain).flatten(), torch.ones(16))
    assert hidden_channels(gm, "", gain) is None
    with torch.no_grad():
        model.weight[4] = -1 + HIDING_GAIN / 2
    gm = passes.capture(model, (x,), dynamic=False)
    (norm,) = passes.ir.norm_nodes(gm)
    assert hidden_channels(gm, "", passes.ir.NormArgs(norm).gain).channels == (4,)


def test_values_are_not_read_where_no_guard_protects_them():
    gm = passes.capture(Embedded(), (ids(),), dynamic=False)
    norm = passes.ir.norm_nodes(gm)[0]
    gain = passes.ir.NormArgs(norm).gain
    assert weight_value(gm, gain) is not None
    assert weight_value(gm, norm) is None  # an activation
    lifted, _ = passes.weights.lift(gm)
    norm = passes.ir.norm_nodes(lifted)[0]
    assert weight_value(lifted, passes.ir.NormArgs(norm).gain) is None


def test_rotation_ready_states_the_trade_off():
    model = Embedded()
    with pytest.warns(NormfuseWarning, match="near-zero gains"):
        _, report = normfuse.rewrite(model, (ids(),), passes="rotation_ready")
    assert report.notes.count(ROTATION_NOTE) == 1
    with pytest.warns(NormfuseWarning):
        _, exact = normfuse.rewrite(model, (ids(),), passes="exact", policy="always")
    assert ROTATION_NOTE not in exact.notes
    # nothing to fold, nothing given up
    bare = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    _, report = normfuse.rewrite(bare, (torch.randn(2, 8),), passes="rotation_ready")
    assert ROTATION_NOTE not in report.notes
    assert [p.name for p in resolve("rotation_ready") if p.note] == ["fold_affine"]
