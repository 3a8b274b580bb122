"""The GPU benchmarks, as far as they go without one: what they compare agrees, floors add up."""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

import gpu
import gpu_models
import gpu_timing
import interpreter  # noqa: F401
import kernels
import newton_schulz
import pytest
import torch
from normfuse.runtime import autotune_cache
from normfuse.runtime.triton_ops import gated

CPU, BF16 = torch.device("cpu"), torch.bfloat16


def small_cases():
    torch.manual_seed(0)
    yield from kernels.norm_cases(5, 40, CPU, BF16, 132)
    yield from kernels.product_cases(3, 32, 48, CPU, BF16, 132)
    for _, case in newton_schulz.product_cases(2, 20, 32, CPU, BF16, 132):
        yield case


@pytest.mark.parametrize("case", small_cases(), ids=lambda c: c.name)
def test_what_is_timed_is_right(case):
    args = case.make()
    good = case.eager(*(t.double() for t in args))
    ours, eager = case.ours(*args), case.eager(*args)
    assert gpu_timing.is_right(gpu_timing.worst(ours, good), gpu_timing.worst(eager, good), BF16)
    for a, b in zip(
        *((y,) if isinstance(y, torch.Tensor) else y for y in (ours, eager)), strict=True
    ):
        assert a.dtype == b.dtype and a.shape == b.shape


@pytest.mark.parametrize("case", small_cases(), ids=lambda c: c.name)
def test_floors_count_every_tensor_once(case):
    args = case.make()
    out = case.ours(*args)
    tensors = [*args, *((out,) if isinstance(out, torch.Tensor) else out)]
    total = sum(t.nbytes for t in tensors)
    small = sum(t.nbytes for t in tensors if t.numel() <= 40 * 16)
    if "backward" in case.name:
        # x is read by both directions and y is written: beside what comes in and goes out
        total += 2 * 5 * 40 * 2
    assert total - small * 1.5 <= case.moved <= total + small


def test_wrong_results_are_wrong():
    case = next(small_cases())
    args = case.make()
    good = case.eager(*(t.double() for t in args))
    eager = gpu_timing.worst(case.eager(*args), good)
    assert not gpu_timing.is_right(gpu_timing.worst(case.ours(*args) * 1.02, good), eager, BF16)
    broken = case.ours(*args)
    broken[0, 0] = float("nan")
    assert gpu_timing.worst(broken, good) == math.inf


def test_buffers_are_larger_than_the_cache():
    cache = 50 << 20
    for nbytes in (1 << 20, 30 << 20, 49 << 20, 400 << 20):
        n = gpu_timing.copies(nbytes, cache)
        assert n == 64 or (n - 1) * nbytes >= cache or n == 2
    assert gpu_timing.copies(1, cache) == 64


def test_floor_is_the_slower_of_the_two():
    floors = gpu_timing.Floors(bandwidth=1e12, flops=1e15)
    assert floors.seconds(2e12, 1e15) == 2.0
    assert floors.seconds(1e12, 3e15) == 3.0


def rows():
    times = {"ours": 1e-5, "max-autotune": 2e-5, "eager": 3e-5}
    yield {"name": "rms_norm 4×8", "seconds": times, "floor": 8e-6}
    yield {"name": "rms_norm 9×8", "seconds": {**times, "ours": 4e-5}, "floor": 8e-6}
    yield {
        "name": "bad 4×8",
        "seconds": {},
        "floor": 1.0,
        "wrong": True,
        "error": 1,
        "eager_error": 0,
    }


def test_table():
    lines = gpu_timing.table(list(rows())).splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert "liger" not in lines[0]
    assert "| 10.0 | 20.0 | 30.0 | 2.00 | 8.0 | 80% |" in lines[2]
    assert "**wrong**" in lines[4]


def test_targets():
    def row(name, ours, floor=1e-6, **peers):
        seconds = {"ours": ours, **{k.replace("_", "-"): v for k, v in peers.items()}}
        return {"name": name, "seconds": seconds, "floor": floor}

    found = kernels.targets(
        [
            row("rms_norm 4096×8", 2e-6, floor=1.9e-6),
            row("row_rstd 9000×8", 2e-6, floor=1.8e-6),
            row("rms_norm 64×8", 2e-6),
            row("rms_norm, forward and backward 4096×8", 2e-6),
            row("rms_norm + linear 64×8×8", 1.0, max_autotune=1.2),
            row("rms_norm + gated pair 8×8×8", 1.0, max_autotune=1.0),
            row("layer_norm + linear 2048×8×8", 1.0, max_autotune=0.98),
            row("rms_norm + linear 256×8×8", 1.0, max_autotune=0.1),
            row("rms_norm + linear 8192×8×8", 1.0),
            row("gated_rms_norm 8×8 rank 16", 1.0, max_autotune=3.0),
        ]
    )
    norms, few, many, gates = found.values()
    assert norms["lowest"] == pytest.approx(0.9) and norms["mean"] > 0.9
    assert few["lowest"] == 1.0 and not few["met"]
    assert many["lowest"] == pytest.approx(0.98) and many["met"] and gates["met"]
    assert kernels.targets([row("rms_norm 4096×8", 1.0)]).keys() == {next(iter(kernels.TARGETS))}


def test_every_target_has_rows():
    names = [c.name for c in kernels.norm_cases(4096, 40, CPU, BF16, 132)]
    names += [c.name for m in (8, 2048) for c in kernels.product_cases(m, 32, 48, CPU, BF16, 132)]
    found = {kernels.kind_and_rows(name) for name in names}
    for kinds, (low, high), _, _ in kernels.TARGETS.values():
        assert all(any(k == kind and low <= m <= high for k, m in found) for kind in kinds)


TINY = [
    gpu_models.Spec("gpt", 32, 2, 4, 4, 128, 50),
    gpu_models.Spec("llama", 32, 2, 4, 2, 40, 50, rms=True),
    gpu_models.Spec("vit", 32, 2, 4, 4, 128, 0, causal=False, patch=12),
]


@pytest.mark.parametrize("spec", TINY, ids=lambda s: s.name)
def test_models(spec):
    model = spec.build()
    x = spec.inputs(7, "cpu", torch.float32)
    assert model(x).shape == (1, 7, spec.vocabulary or 1000)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert spec.product_weights() == weights
    model = model.to(BF16)
    x = spec.inputs(7, "cpu", BF16)
    (truth,) = gpu_models.reference(spec, model, x, training=False)
    assert gpu_timing.worst(model(x), truth) < 0.1
    parameters = list(model.parameters())
    found = gpu_models._compared(gpu_models.step(model, parameters, x))
    truth = gpu_models.reference(spec, model, x, training=True)
    assert found[1].shape == truth[1].shape
    assert torch.nn.functional.cosine_similarity(found[1].double(), truth[1].double(), 0) > 0.95


def test_sizes_are_what_the_names_say():
    millions = {s.name: s.product_weights() / 1e6 for s in gpu_models.SPECS}
    assert 340 < millions["GPT-2-medium-like"] < 370
    assert 1200 < millions["Llama-1B-like"] < 1300
    assert 295 < millions["ViT-L-like"] < 310


def test_model_floors():
    floors, spec = gpu_timing.Floors(3e12, 6e14), gpu_models.SPECS[1]
    few, many = (gpu_models.floor(spec, t, floors, False) for t in (1, 2048))
    assert few == pytest.approx(spec.product_weights() * 2 / 3e12) and many > few
    assert gpu_models.floor(spec, 2048, floors, True) == pytest.approx(3 * many)


def test_summary():
    def row(name, ratio):
        return {"name": name, "seconds": {"ours": 1.0, "max-autotune": ratio}}

    found = gpu_models.summary(
        [row("a, inference, 1 tokens", 2.0), row("a, inference, 64 tokens", 0.5),
         row("a, inference, 2048 tokens", 0.4), row("a, training step, 2048 tokens", 3.0)]
    )  # fmt: skip
    assert found["mean_few_tokens"] == pytest.approx(1.0) and found["lowest"] == 0.4


def test_whole_orthogonalizations_agree():
    x, peers = newton_schulz.whole(2, 20, 32, CPU, torch.float16)
    truth = newton_schulz.plain_loop(x.double(), torch.float64)
    errors = {k: gpu_timing.worst(f(x), truth) for k, f in peers.items()}
    assert all(gpu_timing.is_right(e, errors["eager"], torch.float16) for e in errors.values())
    assert errors["eager"] > 0


def test_plans_that_are_tuned_are_those_that_are_looked_up(monkeypatch):
    """A benchmark's name, sizes and options of a plan are the op's own."""
    from normfuse.runtime.triton_ops import symmetric

    looked_up = []
    plain = symmetric.tuned

    def spy(name, heuristic, x, *sizes, **options):
        looked_up.append((name, sizes, options))
        return plain(name, heuristic, x, *sizes, **options)

    monkeypatch.setattr(symmetric, "tuned", spy)
    for _, case in newton_schulz.product_cases(2, 20, 32, CPU, BF16, 132):
        args = case.make()
        looked_up.clear()
        case.ours(*args)
        assert looked_up == [case.tune]


@pytest.fixture
def no_gpu_needed(monkeypatch, tmp_path):
    """Everything the scripts ask a GPU for, answered: they run from end to end."""
    monkeypatch.setattr(autotune_cache, "_loaded", {})
    monkeypatch.setenv(autotune_cache.ENV, str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_timing, "RESULTS", tmp_path)
    about = {"device": "none", "torch": "", "triton": "", "date": ""}
    monkeypatch.setattr(gpu_timing, "environment", lambda: about)
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)

    def seconds(calls, repeats=1):
        for call in calls:
            call()
        return 1e-5 / len(calls)

    for script in (kernels, gpu_models):
        monkeypatch.setattr(script, "require_gpu", lambda: CPU)
        monkeypatch.setattr(script, "measure_floors", lambda dtype: gpu_timing.Floors(1e12, 1e14))
        monkeypatch.setattr(script, "graph_seconds", seconds)
    monkeypatch.setattr(kernels, "l2_bytes", lambda: 1000)
    monkeypatch.setattr(kernels, "shapes", lambda quick: ([(3, 40)], [(3, 32, 48)]))
    monkeypatch.setattr(gpu_models, "SPECS", TINY)
    monkeypatch.setattr(gpu_models, "TOKENS", (1, 8))
    monkeypatch.setattr(gpu_models, "TRAINING_TOKENS", 8)

    def written(kind):
        text = (tmp_path / f"{kind}-none.md").read_text()
        return json.loads((tmp_path / f"{kind}-none.json").read_text()), text

    return written


def test_kernels_from_end_to_end(no_gpu_needed):
    kernels.main(["--tune"])
    result, text = no_gpu_needed("kernels")
    assert len(result["rows"]) == 12 and text.count("\n| ") == 14
    assert all({"ours", "eager", "max-autotune"} <= set(r["seconds"]) for r in result["rows"])
    kept = [k for k in autotune_cache.load(CPU) if k.startswith("verdict")]
    assert {k.split("kernel=")[1] for k in kept} == {
        *("norm", "add_norm", "row_rstd", "gated_norm", "norm_linear", "norm_linear pair")
    }
    assert len(autotune_cache.load(CPU)) > len(kept)
    assert all(not t["met"] for t in result["targets"].values())


def test_a_kernel_that_fails_is_named_and_the_others_go_on(no_gpu_needed, monkeypatch):
    class Broken:
        __name__ = "gated_fwd"

        def __getitem__(self, grid):
            raise RuntimeError("no such instruction")

    monkeypatch.setattr(gated.kernels, "gated_fwd", Broken())
    with pytest.raises(SystemExit, match="wrong or failed"):
        kernels.main([])
    result, text = no_gpu_needed("kernels")
    bad = [r for r in result["rows"] if "failed" in r]
    assert len(bad) == 2 and all("no such instruction" in r["failed"]["ours"] for r in bad)
    assert text.count("**failed**") == 2 and len(result["rows"]) == 12


def test_models_from_end_to_end(no_gpu_needed):
    gpu_models.main([])
    result, _ = no_gpu_needed("models")
    assert len(result["rows"]) == 9 and not gpu_timing.problems(result["rows"])
    contestants = {"eager", "max-autotune", "without kernels", "ours"}
    assert all(set(r["seconds"]) == contestants for r in result["rows"])
    assert result["summary"]["lowest"] == pytest.approx(1.0)


def test_errors_of_large_results_are_taken_piece_by_piece(monkeypatch):
    monkeypatch.setattr(gpu_timing, "_PIECE", 7)
    truth = torch.randn(5, 6)
    y = truth.clone()
    y[3, 2] += 0.25
    wanted = 0.25 / truth.abs().max().item()
    assert gpu_timing.error(y, truth) == pytest.approx(wanted, rel=1e-5)
    y[4, 5] = float("nan")
    assert gpu_timing.error(y, truth) == math.inf


def test_one_command_runs_all():
    for command in gpu.commands(quick=True):
        assert Path(command[1]).is_file() and "--quick" in command


@pytest.mark.parametrize(
    "script", [kernels, newton_schulz, gpu_models, gpu], ids=lambda m: m.__name__
)
def test_without_a_gpu(script, capsys):
    with pytest.raises(SystemExit, match="no GPU here"):
        script.main(["--quick"])
    with pytest.raises(SystemExit):
        script.main(["--help"])
    assert "--quick" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script.main(["--unknown"])
