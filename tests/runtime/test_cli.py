"""The command line as a user types it, and what stands behind it."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from normfuse import NormfuseError, Report
from normfuse.passes.manager import registry
from normfuse.runtime import instantiate, measure
from normfuse.runtime.cli import app
from normfuse.runtime.doctor import examine
from torch import nn
from typer.testing import CliRunner

MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 20)
        self.drop = nn.Dropout(0.5)

    def forward(self, ids, scale=None):
        x = self.drop(self.embed(ids))
        return self.head(self.norm(x if scale is None else x * scale))


def bare():
    torch.manual_seed(0)
    return Net()


def with_args():
    return bare(), (torch.arange(6).reshape(2, 3),)


def with_kwargs():
    return bare(), (torch.arange(6).reshape(2, 3),), {"scale": torch.ones(8)}


def not_a_model():
    return 3


ready = bare()
number = 3
"""


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "cli_net.py"
    path.write_text(textwrap.dedent(MODEL), encoding="utf-8")
    return path


def run(*words, code=0):
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


# -- explain --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with_args", "with_kwargs"])
def test_explain_takes_inputs_from_the_factory(model_file, name):
    text = run("explain", f"{model_file}:{name}").stdout
    assert "1 site (1 layer_norm)" in text
    assert "cli_net.py:" in text


@pytest.mark.parametrize("name", ["bare", "ready"])
def test_explain_takes_inputs_from_the_command_line(model_file, name):
    text = run("explain", f"{model_file}:{name}", "-i", "2x3:int64", "-i", "scale=8:float32").stdout
    assert "inference on cpu" in text


def test_explain_json_is_a_report(model_file):
    out = run("explain", f"{model_file}:with_args", "--json", "--verify").stdout
    report = Report.from_dict(json.loads(out))
    assert [s.key for s in report.sites] == ["norm"]
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-12


def test_explain_writes_a_page_and_draws_streams(model_file, tmp_path):
    page = tmp_path / "out.html"
    text = run("explain", f"{model_file}:with_args", "--html", page, "--streams").stdout
    assert f"wrote {page}" in text.replace("\n", "")
    assert "<svg" in page.read_text(encoding="utf-8")
    assert "embed (embedding)" in text


def test_explain_training_and_dtype_and_pass_selection(model_file):
    text = run("explain", f"{model_file}:with_args", "--training", "--dtype", "bfloat16").stdout
    assert "training on cpu" in text
    assert "bfloat16" in text
    out = run("explain", f"{model_file}:with_args", "--passes", "canonical", "--json").stdout
    assert json.loads(out)["passes"] == []
    names = ["fold_affine", "remove_mean"]
    out = run("explain", f"{model_file}:with_args", "--passes", ",".join(names), "--json").stdout
    assert [p["name"] for p in json.loads(out)["passes"]] == names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explain"], "name either a target"),
        (["explain", "nowhere"], "module:factory"),
        (["explain", "no_such_module_here:f"], "there is no module"),
        (["explain", "no_such_file.py:f"], "there is no file"),
        (["explain", "FILE:missing"], "has no 'missing'"),
        (["explain", "FILE:number"], "is a int, not a module"),
        (["explain", "FILE:not_a_model"], "gave a int"),
        (["explain", "FILE:bare"], "no example inputs"),
        (["explain", "FILE:bare", "-i", "2x3"], "cannot read input"),
        (["explain", "FILE:bare", "-i", "2x3:int65"], "unknown dtype"),
        (["explain", "FILE:with_args", "--dtype", "int64"], "not a floating-point dtype"),
        (["explain", "FILE:with_args", "--passes", "nonsense"], "no preset or pass"),
        (["bench", "FILE:bare"], "no example inputs"),
    ],
)
def test_mistakes_are_one_line(model_file, words, message):
    result = run(*[w.replace("FILE", str(model_file)) for w in words], code=2)
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


# -- models and inputs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "shape", "dtype"),
    [
        ("2x3:int64", None, (2, 3), torch.int64),
        ("7:long", None, (7,), torch.int64),
        (":float32", None, (), torch.float32),
        ("mask=1x4:bool", "mask", (1, 4), torch.bool),
        ("x=2x0x3:bfloat16", "x", (2, 0, 3), torch.bfloat16),
    ],
)
def test_input_syntax(text, name, shape, dtype):
    keyword, value = instantiate.parse_input(text, 5)
    assert (keyword, value.shape, value.dtype) == (name, shape, dtype)


def test_integer_inputs_stay_within_the_smallest_embedding():
    model = nn.ModuleList([nn.Embedding(100, 4), nn.Embedding(3, 4)])
    args, kwargs = instantiate.parse_inputs(["50x50:int64", "n=False", "s=1.5"], model)
    assert args[0].max() == 2
    assert kwargs == {"n": False, "s": 1.5}
    (wide,), _ = instantiate.parse_inputs(["50x50:int64<90"], model)
    assert 2 < wide.max() < 90


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "vit", "convnext", "resnet"])
def test_transformers_architectures_run(name):
    pytest.importorskip("transformers")
    model, args, kwargs = instantiate.from_transformers(name)
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    with torch.no_grad():
        assert model(*args, **kwargs) is not None


def test_unknown_architecture_suggests():
    pytest.importorskip("transformers")
    with pytest.raises(NormfuseError, match=r"did you mean .*llama"):
        instantiate.from_transformers("lama")


# -- doctor ---------------------------------------------------------------------------------------


def test_doctor_lists_passes_and_versions():
    text = run("doctor").stdout
    assert torch.__version__ in text
    assert "registered by entry point" in text
    for name in registry():
        assert name in text


def test_doctor_sees_the_switches(monkeypatch):
    monkeypatch.setenv("NORMFUSE_DISABLE", "fold_affine")
    diagnosis = examine()
    assert {p["name"]: p["on"] for p in diagnosis.passes}["fold_affine"] is False
    assert diagnosis.healthy
    monkeypatch.setenv("NORMFUSE_DISABLE", "fold_afine")
    monkeypatch.setenv("NORMFUSE_FUEL", "many")
    result = run("doctor", "--json", code=1)
    found = {f["what"]: f for f in json.loads(result.stdout)["findings"]}
    assert found["NORMFUSE_DISABLE"]["ok"] is False
    assert "fold_afine" in found["NORMFUSE_DISABLE"]["advice"]
    assert found["NORMFUSE_FUEL"]["ok"] is False


def test_doctor_reports_a_missing_compiler(monkeypatch):
    from torch._inductor import cpp_builder

    def missing():
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    diagnosis = examine()
    assert not diagnosis.healthy
    assert any("install g++" in f.advice for f in diagnosis.findings if f.ok is False)


def test_doctor_trial_runs_the_backend():
    diagnosis = examine(try_it=True)
    trial = diagnosis.findings[-1]
    assert trial.what == "trial compilation"
    assert trial.ok, trial.state


# -- measuring ------------------------------------------------------------------------------------


def test_paired_ratio_brackets_its_value():
    ratio = measure.paired_ratio([2.0, 2.2, 1.8, 2.0, 9.0], [1.0, 1.1, 0.9, 1.0, 1.0])
    assert ratio.value == pytest.approx(2.0)
    assert ratio.low <= ratio.value <= ratio.high
    same = measure.paired_ratio([1.0] * 9, [1.0] * 9)
    assert (same.low, same.value, same.high) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="equal"):
        measure.paired_ratio([1.0], [])


def test_interleaving_calls_all_variants_equally_often():
    calls = {"a": 0, "b": 0}

    def variant(name):
        def f():
            calls[name] += 1

        return f

    times = measure.interleaved({n: variant(n) for n in calls}, rounds=4, sample_seconds=1e-4)
    assert calls["a"] == calls["b"] > 4
    assert [len(t) for t in times.values()] == [4, 4]
    assert all(x > 0 for t in times.values() for x in t)


def test_interleaving_sees_a_real_difference():
    x = torch.randn(200, 200)
    times = measure.interleaved(
        {"one": lambda: x @ x, "four": lambda: x @ x @ x @ x @ x}, rounds=9, sample_seconds=0.002
    )
    assert measure.paired_ratio(times["four"], times["one"]).low > 1.5


@pytest.mark.parametrize("training", [False, True])
def test_bench(model_file, training):
    words = ["bench", f"{model_file}:with_args", "--rounds", "3", "--json"]
    result = json.loads(run(*words, *(["--training"] if training else [])).stdout)
    assert set(result["variants"]) == {"eager", "inductor", "normfuse"}
    assert result["sites"] == 1
    assert result["over_inductor"]["normfuse"]["value"] > 0
    assert result["environment"]["torch"] == torch.__version__


def test_help_is_quick_to_load():
    code = (
        "import sys, normfuse.runtime.cli\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
