"""Failed kernels on record: kept, counted, damaged, shown and forgotten by ``normfuse doctor``."""

import json
import subprocess
import sys

import pytest
import torch
from normfuse.runtime import autotune_cache as cache
from normfuse.runtime import doctor, kernel_failures
from normfuse.runtime.cli import app
from typer.testing import CliRunner

CPU = torch.device("cpu")
REASON = "OutOfResources: out of resource: shared memory,\n Required: 300000, limit: 232448"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.ENV, str(tmp_path))
    monkeypatch.setattr(cache, "_loaded", {})
    return tmp_path


def fail(kernel="norm_fwd_tile", configuration="float32; BLOCK_C=64", reason=REASON):
    kernel_failures.record(CPU, kernel, configuration, reason)


def test_kept_counted_and_in_order():
    fail()
    fail("norm_linear_kernel")
    fail()
    first, second = kernel_failures.known()
    assert {first["kernel"], second["kernel"]} == {"norm_fwd_tile", "norm_linear_kernel"}
    again = next(e for e in (first, second) if e["kernel"] == "norm_fwd_tile")
    assert again["times"] == "2" and again["device"] == "cpu"
    assert again["reason"] == " ".join(REASON.split())
    assert again["triton"] == cache.header(CPU)["triton"]


def test_bounded(folder):
    for i in range(kernel_failures.MAX_ENTRIES + 5):
        fail(configuration=f"BLOCK_C={i}", reason="x" * 10_000)
    found = kernel_failures.known()
    assert len(found) == kernel_failures.MAX_ENTRIES
    assert not any(e["configuration"] == "BLOCK_C=0" for e in found)
    assert sum(f.stat().st_size for f in folder.glob("failures-*.json")) < 100_000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"failures": 3}',
        '{"failures": {"a": 1, "b": {}}}',
        '{"failures": {"a": {"kernel": [1], "times": "x", "last": null}}, "device": {}}',
        "[" * 100_000,
        "\x00\xff",
    ],
)
def test_damaged_files_are_survived(folder, text):
    cache.path(CPU, "failures").write_bytes(text.encode("latin-1"))
    (folder / "failures-other.json").write_bytes(text.encode("latin-1"))
    doctor.examine()
    fail()
    assert "norm_fwd_tile" in {e["kernel"] for e in kernel_failures.known()}
    json.loads(cache.path(CPU, "failures").read_text())
    text = CliRunner().invoke(app, ["doctor"]).stdout
    assert "norm_fwd_tile" in text


def test_a_failure_to_write_is_no_failure(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv(cache.ENV, str(blocked / "below"))
    fail()
    assert kernel_failures.known() == []
    monkeypatch.setattr(cache, "path", None)
    fail()


def test_doctor_shows_and_forgets():
    run = CliRunner()
    assert "none on record" in run.invoke(app, ["doctor"]).stdout
    fail()
    fail()
    result = run.invoke(app, ["doctor"])
    text = " ".join(result.stdout.split())
    for part in ("1 on record", "norm_fwd_tile", "shared memory", "BLOCK_C=64", "2 times"):
        assert part in text, part
    found = json.loads(run.invoke(app, ["doctor", "--json"]).stdout)["findings"]
    (shown,) = [f for f in found if f["what"].strip() == "norm_fwd_tile"]
    # the formula runs instead: worth knowing, not broken
    assert shown["ok"] is None and "another version" not in shown["advice"]
    assert "none on record" in run.invoke(app, ["doctor", "--clear"]).stdout
    assert kernel_failures.known() == []


def test_another_installation_is_another_file(monkeypatch):
    fail()
    monkeypatch.setattr(cache, "_triton_version", lambda: "1.0")
    fail()
    assert len(kernel_failures.known()) == 2
    advice = [f.advice for f in doctor.examine().findings if f.what.strip() == "norm_fwd_tile"]
    assert sorted("another version" in a for a in advice) == [False, True]


def test_concurrent_writers_lose_nothing():
    code = (
        "import sys, torch\n"
        "from normfuse.runtime import kernel_failures as f\n"
        "for i in range(10): f.record(torch.device('cpu'), 'k', f'{sys.argv[1]}-{i}', 'no')\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(n)]) for n in range(2)]
    assert [p.wait(timeout=120) for p in running] == [0, 0]
    assert len(kernel_failures.known()) == 20
