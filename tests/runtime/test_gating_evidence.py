"""docs/gating.md: its table is the stored result, and its sentences are what that result shows."""

import importlib.util
import json
import statistics
from pathlib import Path

import pytest
import torch
from normfuse.runtime.calibration import SINK_MASS, SINK_RATIO

ROOT = Path(__file__).resolve().parent.parent.parent
RESULT = json.loads((ROOT / "benchmarks/results/gated_rescaling-cpu.json").read_text("utf-8"))
PAGE = " ".join((ROOT / "docs/gating.md").read_text("utf-8").split())


def script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figures(regime, model, key):
    return [s["rows"][model][key] for s in RESULT["regimes"][regime]["seeds"].values()]


@pytest.fixture(scope="module")
def example():
    return script(ROOT / "examples/gated_rescaling.py")


@pytest.mark.parametrize("regime", list(RESULT["regimes"]))
def test_the_result_is_of_the_experiment_as_it_stands(example, regime):
    assert RESULT["settings"] == example.SETTINGS
    assert list(RESULT["regimes"]) == list(example.REGIMES)
    assert RESULT["regimes"][regime]["changes"] == example.REGIMES[regime]
    assert [r["changes"] for r in RESULT["search"]] == example.SEARCH
    seeds = RESULT["regimes"][regime]["seeds"]
    assert len(seeds) >= 3
    losses = figures(regime, "plain", "loss")
    assert len(set(losses)) == len(losses)  # different seeds
    for s in seeds.values():
        late = [row for name, row in s["rows"].items() if name.endswith("added late")]
        assert len(late) == len(s["history"]) - 1
        for row in late:
            assert row["bit_identical_at_insertion"]
            assert row["loss_at_insertion"] == pytest.approx(s["rows"]["plain"]["loss"], abs=1e-6)
        for row in s["rows"].values():
            assert row["w4a4_lost"] == pytest.approx(row["w4a4"] - row["loss"])
        for history in s["history"].values():
            assert [p["step"] for p in s["history"]["plain"]] == [p["step"] for p in history]


def test_the_table_is_the_result():
    for regime in RESULT["regimes"]:
        for model in RESULT["regimes"][regime]["seeds"]["0"]["rows"]:
            loss, low = (figures(regime, model, k) for k in ("loss", "w4a4_lost"))
            cells = f"| {model} | {statistics.fmean(loss):.3f} ± {statistics.stdev(loss):.3f} |"
            assert cells in PAGE
            assert f"{statistics.fmean(low):+.3f} ± {statistics.stdev(low):.3f}" in PAGE


def test_the_sentences_hold():
    def mean(*where):
        return statistics.fmean(figures(*where))

    assert "reach a slightly lower loss in the same number of steps" in PAGE
    assert mean("default", "gated", "loss") < mean("default", "plain", "loss")
    hidden = "On text, models of this size with plain hidden layers grow no residual sink"
    assert hidden in PAGE and not any("glu" in r["changes"] for r in RESULT["search"])
    grown = [r["stream_max_to_median"] for r in RESULT["search"]]
    grown += figures("default", "plain", "stream_max_to_median")
    assert max(grown) < SINK_RATIO
    assert "no attention sink either, behind a begin token or not" in PAGE
    assert {r["changes"].get("task", "text") for r in RESULT["search"]} == {"text", "begin"}
    looked = [r["first_key_mass"] for r in RESULT["search"]]
    assert max(looked + figures("default", "plain", "first_key_mass")) < SINK_MASS
    assert "lose a little *more* under W4A4 than the plain ones" in PAGE
    assert mean("default", "gated", "w4a4_lost") > mean("default", "plain", "w4a4_lost")
    assert "With a planted sink both kinds of model keep it" in PAGE
    for model in ("plain", "gated", "gates added late"):
        assert min(figures("planted sink", model, "stream_max_to_median")) > SINK_RATIO
    assert "a spread over seeds wider than the difference between gated and plain" in PAGE
    pairs = zip(
        figures("planted sink", "gated", "w4a4_lost"),
        figures("planted sink", "plain", "w4a4_lost"),
        strict=True,
    )
    differences = [g - p for g, p in pairs]
    assert statistics.stdev(differences) > abs(statistics.fmean(differences))
    assert (
        "Absorbing the constant channel helps where it is constant, which is at few norms" in PAGE
    )
    plain, absorbed = (
        figures("planted sink", m, "w4a4_lost") for m in ("plain", "outliers absorbed")
    )
    assert all(a < p for a, p in zip(absorbed, plain, strict=True))
    for s in RESULT["regimes"]["planted sink"]["seeds"].values():
        row = s["rows"]["outliers absorbed"]
        assert 0 < row["norms_absorbed"] < row["norms"] / 2
    assert "+2 points of quality and 1.2 points lost under W4A4 at billions of parameters" in PAGE


def test_the_sentences_about_the_grown_residual_sink_hold():
    def grown(model, key):
        return figures("grown residual sink", model, key)

    assert "it grows in every seed, to 34 times the median channel or more" in PAGE
    assert min(grown("plain", "stream_max_to_median")) > 34 > SINK_RATIO
    assert min(grown("plain", "sinks")) > 0
    assert "W4A4 then costs 0.18 bits a byte or more" in PAGE
    assert round(min(grown("plain", "w4a4_lost")), 2) == 0.18
    assert "With gates behind the norms from the start none grows in any seed" in PAGE
    assert max(grown("gated", "stream_max_to_median")) < SINK_RATIO
    assert max(grown("gated", "sinks")) == 0
    assert "a quarter of that or less" in PAGE
    pairs = zip(grown("gated", "w4a4_lost"), grown("plain", "w4a4_lost"), strict=True)
    assert all(g < p / 4 for g, p in pairs)
    assert "the gated models' loss at full precision is higher in every seed" in PAGE
    pairs = zip(grown("gated", "loss"), grown("plain", "loss"), strict=True)
    assert all(g > p for g, p in pairs)
    assert "under W4A4 the two end level within the spread" in PAGE
    pairs = zip(grown("gated", "w4a4"), grown("plain", "w4a4"), strict=True)
    differences = [g - p for g, p in pairs]
    assert statistics.stdev(differences) > abs(statistics.fmean(differences))
    assert "Gates added late leave the sink where it is" in PAGE
    assert min(grown("gates added late", "stream_max_to_median")) > SINK_RATIO
    assert "no channel is constant enough to be absorbed" in PAGE
    assert max(grown("outliers absorbed", "norms_absorbed")) == 0


def test_the_sentences_about_the_grown_sink_hold():
    def grown(model, key):
        return figures("grown sink", model, key)

    assert "do grow an attention sink, in every seed" in PAGE
    assert min(grown("plain", "first_key_mass")) > SINK_MASS
    assert "that key's value vector shrinks" in PAGE
    assert max(grown("plain", "first_value")) < 0.25
    assert "No residual sink comes with it" in PAGE
    assert "the first token's vector is less than half again as long as the others'" in PAGE
    for model in ("plain", "gated", "gated attention"):
        assert max(grown(model, "sinks")) == 0
        assert max(grown(model, "first_norm")) < 1.5
    assert "Gated norms leave the attention sink as it is" in PAGE
    plain = grown("plain", "first_key_mass")
    for model in ("gated", "gates added late", "attention gates added late"):
        assert grown(model, "first_key_mass") == pytest.approx(plain, rel=0.1)
    assert "about halves the first-key mass and keeps most of the first value vector" in PAGE
    attention = grown("gated attention", "first_key_mass")
    assert 0.4 < statistics.fmean(attention) / statistics.fmean(plain) < 0.6
    assert min(grown("gated attention", "first_value")) > 0.5
    assert "does not bring every seed below the 30 %" in PAGE
    assert max(attention) > SINK_MASS == 0.3
    assert "grows back a little towards the end of the training" in PAGE
    seeds = RESULT["regimes"]["grown sink"]["seeds"].values()
    quarters = [[p["first_key_mass"] for p in s["history"]["gated attention"]] for s in seeds]
    assert statistics.fmean(q[-1] for q in quarters) > statistics.fmean(q[1] for q in quarters)
    assert "Gated norms lose less under W4A4 in every seed and reach a lower loss" in PAGE
    for key in ("w4a4_lost", "loss"):
        pairs = zip(grown("gated", key), grown("plain", key), strict=True)
        assert all(g < p for g, p in pairs)
    assert "what gated attention changes there is within the spread" in PAGE
    for key in ("w4a4_lost", "loss"):
        pairs = zip(grown("gated attention", key), grown("plain", key), strict=True)
        differences = [g - p for g, p in pairs]
        assert statistics.stdev(differences) > abs(statistics.fmean(differences))


def test_backcopy_windows_follow_the_rule(example):
    """A begin token, only bigrams of the text elsewhere, and behind a trigger what preceded it."""
    text = torch.tensor(list(b"the sun is in if fish sit as silk sifts his fins " * 4))
    task = example.Backcopy(text)
    batches = list(task.windows(8, 24, 3, 60))
    assert len(batches) == 60 and task.vocabulary == 257
    again = list(task.windows(8, 24, 3, 60))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))
    known = set(zip(text[:-1].tolist(), text[1:].tolist(), strict=True))
    copied = 0
    for x, y in batches:
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert (x[:, 0] == example.BEGIN).all() and (y < 256).all()
        for row in torch.cat([x, y[:, -1:]], 1).tolist():
            for t in range(2, len(row)):
                if row[t - 1] in task.TRIGGERS and row[t - 2] != example.BEGIN:
                    assert row[t] == row[t - 2]
                    copied += 1
                else:
                    assert (row[t - 1], row[t]) in known
    assert copied > 100


def test_a_begin_token_shifts_the_text(example):
    text = torch.arange(200)
    (plain,) = example.Text(text).windows(4, 16, 5, 1)
    (begun,) = example.Text(text, begin=True).windows(4, 16, 5, 1)
    assert torch.equal(begun[1], plain[0])
    assert (begun[0][:, 0] == example.BEGIN).all()
    assert torch.equal(begun[0][:, 1:], plain[0][:, :-1])


def test_the_regime_runs(example):
    """Plain, both kinds of gates, and both added late, on a tiny model: every row and figure."""
    changes = example.REGIMES["grown sink"]
    settings = example.SETTINGS | changes | {"d": 16, "length": 16, "batch": 4}
    task = example.source(torch.tensor(list(b"the sun is in if fish sit " * 20)), settings)
    held = list(task.windows(4, 16, 1, 2))
    done = example.one_seed(0, settings, 8, 4, task, held)
    stored = RESULT["regimes"]["grown sink"]["seeds"]["0"]
    assert list(done["rows"]) == list(stored["rows"])
    assert done["history"].keys() == stored["history"].keys()
    for name, row in done["rows"].items():
        assert row.keys() == stored["rows"][name].keys()
        assert row.get("bit_identical_at_insertion", True)
        assert all(value == value for value in row.values())
    assert done["rows"]["gated attention"]["loss"] != done["rows"]["plain"]["loss"]
    assert done["rows"]["attention gates added late"]["first_key_mass"] == pytest.approx(
        done["rows"]["plain"]["first_key_mass"]
    )


def test_the_first_tokens_norm_is_its_norm_over_the_medians(example):
    torch.manual_seed(0)
    model = example.ByteLM({"d": 16, "depth": 1, "heads": 1, "length": 8}, 257)
    with torch.no_grad():
        model.embed.weight.fill_(1.0)
        model.embed.weight[example.BEGIN] = 9.0
        model.place.weight.zero_()
        model.blocks[0].out.weight.zero_()
        model.blocks[0].down.weight.zero_()
    ids = torch.randint(0, 256, (3, 8))
    ids[:, 0] = example.BEGIN
    assert example.first_norm(model, ids) == pytest.approx(9.0)
