"""docs/gating.md: its table is the stored result, and its sentences are what that result shows."""

import importlib.util
import json
import statistics
from pathlib import Path

import pytest
from normfuse.runtime.calibration import SINK_RATIO

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


@pytest.mark.parametrize("regime", ["default", "planted sink"])
def test_the_result_is_of_the_experiment_as_it_stands(regime):
    example = script(ROOT / "examples/gated_rescaling.py")
    assert RESULT["settings"] == example.SETTINGS
    assert RESULT["regimes"][regime]["changes"] == example.REGIMES[regime]
    assert [r["changes"] for r in RESULT["search"]] == example.SEARCH
    seeds = RESULT["regimes"][regime]["seeds"]
    assert len(seeds) >= 3
    losses = figures(regime, "plain", "loss")
    assert len(set(losses)) == len(losses)  # different seeds
    for s in seeds.values():
        late = s["rows"]["gates added late"]
        assert late["bit_identical_at_insertion"]
        assert late["loss_at_insertion"] == pytest.approx(s["rows"]["plain"]["loss"], abs=1e-6)
        for row in s["rows"].values():
            assert row["w4a4_lost"] == pytest.approx(row["w4a4"] - row["loss"])
        assert [p["step"] for p in s["history"]["plain"]] == sorted(
            p["step"] for p in s["history"]["gated"]
        )


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
    assert "grow no residual sink by themselves" in PAGE
    grown = [r["stream_max_to_median"] for r in RESULT["search"]]
    grown += figures("default", "plain", "stream_max_to_median")
    assert max(grown) < SINK_RATIO
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
