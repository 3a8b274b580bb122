"""Calibration: figures against direct formulas, merging, storing, resuming, probes, bad input."""

import json
import math
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Transformer, ids, trained_like
from normfuse import NormfuseError, Report, passes
from normfuse.runtime.calibrate import Calibration, calibrate
from normfuse.runtime.statistics import TOP_K, Attention, Channels, LogHistogram
from torch import nn


def channels(x):
    stats = Channels(x.shape[1])
    stats.update(x)
    return stats


def same(a, b, rtol=1e-10):
    left, right = a.state(), b.state()
    assert left.keys() == right.keys()
    for key, value in left.items():
        # sums of signed numbers cancel: compare on the scale of what was summed
        scale = 1e-12 * max(1.0, float(value.abs().nan_to_num(posinf=0).max()))
        torch.testing.assert_close(right[key], value, rtol=rtol, atol=scale, msg=key)


def data(n=200, d=12, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    x[:, 3] = 500 + 0.01 * x[:, 3]  # a sink: huge and nearly constant
    x[:, 5] = x[:, 5] ** 3
    return x.to(dtype)


class TestChannels:
    def test_figures_are_the_textbook_ones(self):
        x = data()
        s = channels(x)
        centered = x - x.mean(0)
        variance = centered.square().mean(0)
        torch.testing.assert_close(s.mean, x.mean(0))
        torch.testing.assert_close(s.variance, variance)
        torch.testing.assert_close(s.rms, x.square().mean(0).sqrt())
        torch.testing.assert_close(s.abs_max, x.abs().amax(0))
        torch.testing.assert_close(s.kurtosis, centered.pow(4).mean(0) / variance**2)
        energy = x.square() / x.square().sum(-1, keepdim=True)
        torch.testing.assert_close(s.share, energy.mean(0))
        torch.testing.assert_close(s.share_max, energy.amax(0))
        torch.testing.assert_close(s.ratio, (x.abs() / x.norm(dim=-1, keepdim=True)).mean(0))
        torch.testing.assert_close(
            s.argmax_share, F.one_hot(x.abs().argmax(-1), 12).double().mean(0)
        )
        for k, total in zip(TOP_K, s.top_sum, strict=True):
            torch.testing.assert_close(
                total / len(x), energy.topk(min(k, 12)).values.sum(-1).mean()
            )
        f = s.figures()
        magnitude = x.abs().mean(0)
        assert f["max_to_median"] == pytest.approx(float(magnitude.max() / magnitude.median()))
        rows = x.abs().amax(-1) / x.abs().median(-1).values
        assert f["row_max_to_median"] == pytest.approx(float(rows.mean()))
        kurtosis = x.pow(4).mean(-1) / x.square().mean(-1) ** 2
        assert f["row_kurtosis"] == pytest.approx(float(kurtosis.mean()))
        rms = x.square().mean(-1).sqrt()
        assert f["row_rms_p50"] == pytest.approx(float(rms.quantile(0.5)), rel=0.05)
        peak = x.abs().amax(-1) / rms
        assert f["row_peak_p99"] == pytest.approx(float(peak.quantile(0.99)), rel=0.05)
        assert f["top_channel"] == 3

    def test_nearly_constant_channel_keeps_its_kurtosis(self):
        # raw moments would lose all digits: (500)⁴ against (0.01)⁴
        x = data(n=4000)
        whole = channels(x)
        parts = Channels(12)
        for piece in x.split(37):
            parts.update(piece)
        exact = (x - x.mean(0))[:, 3]
        expected = exact.pow(4).mean() / exact.square().mean() ** 2
        assert float(whole.kurtosis[3]) == pytest.approx(float(expected), rel=1e-6)
        assert float(parts.kurtosis[3]) == pytest.approx(float(expected), rel=1e-6)

    @given(st.lists(st.integers(0, 23), min_size=1, max_size=6), st.integers(0, 3))
    @settings(max_examples=25, deadline=None, derandomize=True)
    def test_any_split_merges_to_the_whole(self, sizes, seed):
        x = data(sum(sizes), seed=seed)
        x[::7, 2] = float("nan")
        x[::5] = 0
        total = Channels(12)
        for piece in x.split(sizes):
            total.merge(channels(piece))
        same(channels(x), total)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_low_precision_is_read_exactly(self, dtype):
        x = data(dtype=dtype)
        same(channels(x.double()), channels(x), rtol=0)

    def test_nonfinite_rows_are_counted_and_left_out(self):
        x = data()
        bad = x.clone()
        bad[4, 0], bad[9, 1], bad[9, 2] = float("nan"), float("inf"), -float("inf")
        keep = [i for i in range(len(x)) if i not in (4, 9)]
        s = channels(bad)
        assert int(s.nonfinite) == 2 and int(s.count) == len(keep)
        clean = channels(x[keep])
        clean.nonfinite += 2
        same(clean, s)

    def test_zero_rows_and_empty_input(self):
        s = channels(torch.zeros(5, 4))
        assert int(s.count) == 5 and int(s.zero) == 5
        assert s.share.tolist() == [0] * 4 and math.isnan(s.max_to_median)
        assert s.row_rms.quantile(0.5) == 0
        empty = channels(torch.zeros(0, 4))
        assert empty.figures() == {"rows": 0, "nonfinite": 0}

    def test_extreme_magnitudes(self):
        x = torch.tensor([[1e200, 1.0], [1e-200, 1e-201]], dtype=torch.float64)
        s = channels(x)
        assert float(s.share[0]) == pytest.approx((1 + 1 / 1.01) / 2)

    def test_wrong_width(self):
        with pytest.raises(NormfuseError, match="width 12"):
            Channels(12).update(torch.zeros(3, 4))
        with pytest.raises(NormfuseError, match="widths 3 and 4"):
            Channels(3).merge(Channels(4))


def test_histogram_quantiles():
    values = torch.logspace(-3, 3, 10001, dtype=torch.float64)
    h = LogHistogram()
    for piece in values.split(999):
        h.update(piece)
    for q in (0.01, 0.3, 0.5, 0.99):
        assert h.quantile(q) == pytest.approx(float(values.quantile(q)), rel=0.05)
    assert math.isnan(LogHistogram().quantile(0.5))


def reference_attention(q, k, v, mask, min_keys=64):
    """Mass on key 0 per head over queries that see enough keys, from the full matrix."""
    logits = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    logits = logits.masked_fill(~mask, -math.inf)
    p = logits.softmax(-1)
    enough = (mask.sum(-1) >= min(min_keys, max(mask.shape[-1] // 2, 1))).expand(p.shape[:-1])
    first = torch.where(enough, p[..., 0], 0).sum((0, 2)) / enough.sum((0, 2))
    return first, logits.masked_fill(~mask, 0).abs().amax((0, 2, 3))


class OneAttention(nn.Module):
    def __init__(self, how, heads=3, d=12, groups=1):
        super().__init__()
        self.how, self.heads, self.groups = how, heads, groups
        self.q, self.k, self.v = (
            nn.Linear(d, d),
            nn.Linear(d, d // groups),
            nn.Linear(d, d // groups),
        )

    def qkv(self, x):
        width = x.shape[-1] // self.heads
        return [f(x).unflatten(-1, (-1, width)).transpose(1, 2) for f in (self.q, self.k, self.v)]

    def forward(self, x):
        q, k, v = self.qkv(x)
        n = x.shape[1]
        keep = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        if self.how == "causal":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups > 1)
        elif self.how == "bool":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        elif self.how == "additive":
            low = torch.finfo(x.dtype).min
            bias = torch.zeros(n, n, dtype=x.dtype).masked_fill(~keep, low)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            logits = logits.masked_fill(~keep, float("-inf"))
            y = F.dropout(logits.softmax(-1), 0.1, self.training) @ v
        return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("how", ["causal", "bool", "additive", "written"])
@pytest.mark.parametrize("n", [20, 150])
def test_attention_statistics(how, n):
    torch.manual_seed(0)
    model = OneAttention(how).double()
    x = torch.randn(2, n, 12, dtype=torch.float64)
    x[:, 0] *= 6
    calibration = calibrate(model, [x], progress=False)
    (entry,) = calibration.of_kind("attention")
    q, k, v = model.qkv(x)
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    mass, logits = reference_attention(q, k, v, mask)
    assert entry.stats.heads == 3
    torch.testing.assert_close(entry.stats.first_mass, mass.detach())
    torch.testing.assert_close(entry.stats.logit_max, logits.detach())
    norms = v.norm(dim=-1)
    expected = (norms[:, :, 0].mean(0) / norms.mean((0, 2))).detach()
    torch.testing.assert_close(entry.stats.first_value_ratio, expected)


def test_grouped_query_attention():
    torch.manual_seed(0)
    model = OneAttention("causal", groups=3)
    x = torch.randn(2, 20, 12)
    (entry,) = calibrate(model, [x], progress=False).of_kind("attention")
    q, k, v = model.qkv(x)
    k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    mass, _ = reference_attention(q, k, v, torch.ones(20, 20, dtype=torch.bool).tril())
    torch.testing.assert_close(entry.stats.first_mass, mass.detach(), rtol=1e-5, atol=1e-6)


def test_left_padding_moves_the_first_key():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 30, 30)
    visible = torch.ones(30, 30, dtype=torch.bool).tril()
    visible[:, :4] = False
    stats, cut = Attention(2, 8), Attention(2, 8)
    stats.update_logits(x, visible[None, None], torch.tensor([4]))
    cut.update_logits(x[..., 4:, 4:], visible[None, None, 4:, 4:], torch.tensor([0]))
    torch.testing.assert_close(stats.first_mass, cut.first_mass)
    assert int(stats.queries[0]) == int(cut.queries[0]) == 30 - 4 - 7


# ---------------------------------------------------------------------------------------------


def with_sink(norm=nn.RMSNorm, **kwargs):
    torch.manual_seed(0)
    model = trained_like(Transformer(norm=norm, **kwargs))
    with torch.no_grad():
        model.embed.weight[:, 3] += 60
        for block in model.blocks:
            block.norm1.weight[3] = 0.004
    return model


def test_stream_statistics_equal_hooks():
    model = with_sink()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.RMSNorm):
            module.register_forward_pre_hook(
                lambda m, a, name=name: seen.setdefault(name, []).append(a[0].detach())
            )
    batches = [ids(2, 9, seed=1), ids(2, 9, seed=2)]
    with torch.no_grad():
        for b in batches:
            model(b)
    calibration = calibrate(trained_like(with_sink(), 0) and with_sink(), batches, progress=False)
    assert {e.name for e in calibration.of_kind("stream")} == set(seen)
    for name, values in seen.items():
        expected = channels(torch.cat([v.flatten(0, 1) for v in values]))
        stats = calibration[f"stream:{name}"].stats
        torch.testing.assert_close(stats.mean, expected.mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stats.share, expected.share, rtol=1e-4, atol=1e-6)
        assert int(stats.count) == 36


def test_linear_inputs_are_grouped_by_value():
    calibration = calibrate(with_sink(), [ids()], progress=False)
    readers = {tuple(e.readers) for e in calibration.of_kind("linear")}
    assert ("blocks.0.q", "blocks.0.k", "blocks.0.v") in readers
    assert ("blocks.1.down",) in readers and ("head",) in readers


def test_verdict_names_the_sink_and_the_gain_that_hides_it():
    calibration = calibrate(with_sink(), [ids(2, 9)], progress=False)
    (sink,) = calibration.sinks()
    assert (sink.channel, sink.first, sink.last) == (3, "blocks.0.norm1", "norm")
    assert sink.constant and sink.share > 0.9 and sink.gain == pytest.approx(0.004, rel=0.5)
    text = "\n".join(calibration.verdict())
    assert "dimension 3 carries 9" in text and "from blocks.0.norm1 to norm" in text
    assert {h[0] for h in calibration.hidden()} == {"blocks.0.norm1", "blocks.1.norm1"}
    assert "exposes the channel to activation quantization" in text
    assert calibration.sites() == [e.name for e in calibration.of_kind("stream")]


def test_quiet_model_has_no_sink():
    torch.manual_seed(0)
    calibration = calibrate(Transformer(norm=nn.RMSNorm), [ids(2, 9)], progress=False)
    assert calibration.sinks() == [] and calibration.sites() == []
    assert any("no residual sink" in line for line in calibration.verdict())


def test_halves_merge_to_the_whole_and_files_are_exact(tmp_path):
    model = with_sink()
    batches = [ids(2, 9, seed=i) for i in range(3)] + [ids(3, 7, seed=9)]
    whole = calibrate(model, batches, progress=False)
    halves = calibrate(model, batches[:2], progress=False) + calibrate(
        model, batches[2:], progress=False
    )
    assert halves.batches == whole.batches == 4 and whole.tokens == 75
    assert halves.entries.keys() == whole.entries.keys()
    for key, entry in whole.entries.items():
        same(entry.stats, halves[key].stats)
    for name in ("c.json", "c.safetensors"):
        whole.save(tmp_path / name)
        loaded = Calibration.load(tmp_path / name)
        assert loaded.to_dict() == whole.to_dict()
        for key, tensor in whole._tensors().items():
            assert torch.equal(loaded._tensors()[key].nan_to_num(), tensor.nan_to_num())
    json.dumps(whole.to_dict())


def test_interrupted_run_resumes(tmp_path):
    model = with_sink()
    batches = [ids(2, 9, seed=i) for i in range(5)]

    def failing():
        yield from batches[:3]
        raise KeyboardInterrupt

    path = tmp_path / "c.json"
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, failing(), progress=False, checkpoint=path, save_every=2)
    assert Calibration.load(path).batches == 2
    resumed = calibrate(model, batches, progress=False, checkpoint=path)
    whole = calibrate(model, batches, progress=False)
    assert resumed.batches == 5
    for key, entry in whole.entries.items():
        same(entry.stats, resumed[key].stats)


def test_a_checkpoint_that_cannot_serve_is_refused_before_the_work(tmp_path):
    model = with_sink()
    batches = [ids(2, 9, seed=i) for i in range(3)]

    def run(path, model=model, given=batches, **options):
        return calibrate(model, given, progress=False, checkpoint=path, **options)

    def never():
        raise AssertionError("a batch was asked for")
        yield

    with pytest.raises(NormfuseError, match="safetensors or"):
        run(tmp_path / "c.pt", given=never())
    with pytest.raises(NormfuseError, match="no folder"):
        run(tmp_path / "missing" / "c.json", given=never())
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(NormfuseError, match="not a normfuse calibration"):
        run(tmp_path / "broken.json", given=never())
    path = tmp_path / "c.json"
    with pytest.raises(NormfuseError, match="save_every"):
        run(path, given=never(), save_every=0)
    run(path)
    written = path.read_bytes()
    with pytest.raises(NormfuseError, match="holds 3 batches and only 1"):
        run(path, given=batches[:1])
    with pytest.raises(NormfuseError, match="min_keys=64, not 5"):
        run(path, given=never(), min_keys=5)
    more = batches + batches
    with pytest.raises(NormfuseError, match=r"another model.*has width 16 there and 8 here"):
        run(path, Transformer(d=8, norm=nn.RMSNorm).eval(), more)
    with pytest.raises(NormfuseError, match=r"another model.*only this model has .*blocks.2"):
        run(path, Transformer(layers=3, norm=nn.RMSNorm).eval(), more)
    assert path.read_bytes() == written


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Transformer(norm=nn.RMSNorm)

    def forward(self, *, ids, attention_mask):
        return self.inner(ids)["logits"] * attention_mask[..., None]


def test_mask_leaves_padding_out():
    torch.manual_seed(0)
    model = trained_like(Keyword())
    x = ids(2, 8)
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    batch = UserDict(attention_mask=mask, ids=x)
    calibration = calibrate(model, [batch], progress=False, mask="attention_mask")
    assert int(calibration["stream:inner.norm"].stats.count) == 13
    plain = calibrate(model, [batch], progress=False)
    assert int(plain["stream:inner.norm"].stats.count) == 16
    with pytest.raises(NormfuseError, match="no tensor input called 'mask'"):
        calibrate(model, [batch], progress=False, mask="mask")


class Twice(nn.Module):
    """One norm and one linear, each called twice."""

    def __init__(self, d=8):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(d), nn.Linear(d, d)

    def forward(self, x):
        x = x + self.linear(self.norm(x))
        return x + self.linear(self.norm(x))


def test_tied_modules_get_one_entry_per_call():
    calibration = calibrate(Twice(), [torch.randn(4, 8)], progress=False)
    assert [e.name for e in calibration.of_kind("stream")] == ["norm", "norm#1"]
    assert [e.name for e in calibration.of_kind("linear")] == ["linear", "linear#1"]


def test_captured_graphs_are_watched_as_they_are():
    model = with_sink().eval()
    gm = passes.capture(model, (ids(2, 9),), dynamic=False)
    direct = calibrate(model, [ids(2, 9)], progress=False)
    same(
        direct["stream:norm"].stats, calibrate(gm, [ids(2, 9)], progress=False)["stream:norm"].stats
    )
    passes.PassManager([passes.InsertGatedNorm()]).run(gm)
    gated = calibrate(gm, [ids(2, 9)], progress=False)
    same(direct["stream:norm"].stats, gated["stream:norm"].stats)
    assert {e.name for e in gated.of_kind("stream")} == {e.name for e in direct.of_kind("stream")}
    with pytest.raises(NormfuseError, match="does not fit the sizes"):
        calibrate(gm, [ids(2, 9), ids(3, 5)], progress=False)


def test_modes_are_restored_and_dropout_is_off():
    model = with_sink(dropout=0.5).train()
    model.blocks[0].eval()
    a = calibrate(model, [ids()], progress=False)
    b = calibrate(model, [ids()], progress=False)
    for key, entry in a.entries.items():
        same(entry.stats, b[key].stats, rtol=0)
    assert model.training and not model.blocks[0].training and model.blocks[1].training


def test_bfloat16_and_autocast():
    model = with_sink().to(torch.bfloat16)
    calibration = calibrate(model, [ids(2, 9)], progress=False)
    assert calibration.sinks()[0].channel == 3
    with torch.autocast("cpu", torch.bfloat16):
        cast = calibrate(with_sink(), [ids(2, 9)], progress=False)
    assert cast.sinks()[0].channel == 3


def test_nonfinite_activations_are_reported():
    model = with_sink()
    with torch.no_grad():
        model.embed.weight[5] = float("nan")
    x = ids(2, 9)
    x[0, 8] = 5
    calibration = calibrate(model, [x], progress=False)
    assert int(calibration["stream:blocks.0.norm1"].stats.nonfinite) >= 1
    assert math.isfinite(calibration["stream:norm"].figures()["rms"])
    assert any("non-finite activations" in line for line in calibration.verdict())


def test_convolutions_and_no_stream():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1))
    calibration = calibrate(model, [torch.randn(2, 3, 8, 8)], progress=False)
    first, second = calibration.of_kind("linear")
    assert first.stats.width == 3 and int(first.stats.count) == 2 * 64
    assert second.stats.width == 4
    assert any("no residual stream" in line for line in calibration.verdict())


def test_bad_input(tmp_path):
    model = with_sink()
    with pytest.raises(NormfuseError, match="no batches"):
        calibrate(model, [], progress=False)
    with pytest.raises(NormfuseError, match="iterable of batches"):
        calibrate(model, ids(), progress=False)
    with pytest.raises(NormfuseError, match="batch 1 has the structure"):
        calibrate(model, [ids(), {"ids": ids()}], progress=False)
    with pytest.raises(NormfuseError, match="nothing to calibrate"):
        calibrate(nn.ReLU(), [torch.randn(3)], progress=False)
    other = calibrate(Transformer(d=8, norm=nn.RMSNorm), [ids()], progress=False)
    with pytest.raises(NormfuseError, match="different models"):
        calibrate(model, [ids()], progress=False).merge(other)
    mine = calibrate(model, [ids()], progress=False)
    with pytest.raises(NormfuseError, match="min_keys=64 and 3"):
        mine.merge(calibrate(model, [ids()], progress=False, min_keys=3))
    assert mine.tokens == ids().numel()  # nothing was added
    with pytest.raises(NormfuseError, match="safetensors or"):
        other.save(tmp_path / "c.pt")


def test_report_page_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    calibration = calibrate(with_sink(), [ids(2, 80)], progress=False)
    text = str(calibration)
    assert "dimension 3 carries" in text and "blocks.1.norm2" in text
    page = calibration.to_html(tmp_path / "c.html")
    assert page.count("data:image/png") == 3 and "dimension 3 carries" in page
    report = Report()
    calibration.attach(report)
    assert report.streams[0]["svg"].startswith("<svg") and "dimension 3" in report.notes[0]
    from normfuse.runtime import calibration_plots

    files = calibration_plots.save_all(calibration, tmp_path / "plots")
    assert len(files) == 3 and all(f.stat().st_size > 2000 for f in files)
    assert calibration_plots.compare({"before": calibration, "after": calibration}) is not None
