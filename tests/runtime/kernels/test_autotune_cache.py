"""Tuned plans on disk: looked up, damaged, shared between processes."""

import json
import subprocess
import sys

import pytest
import torch
from normfuse.runtime import autotune_cache as cache
from normfuse.runtime.kernels import plans

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.ENV, str(tmp_path))
    monkeypatch.setattr(cache, "_loaded", {})
    return tmp_path


def test_store_and_load():
    assert cache.load(CPU) == {}
    file = cache.store(CPU, {"a": {"block_r": 2}})
    assert file is not None and file.exists()
    cache._loaded.clear()
    assert cache.load(CPU) == {"a": {"block_r": 2}}
    assert cache.describe()["plans"] == 1
    assert cache.clear() == 1 and cache.load(CPU) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"plans": 3}', '{"plans": {"a": 1}}', "\x00\xff"])
def test_damaged_files_are_survived(text):
    file = cache.path(CPU)
    file.write_bytes(text.encode("latin-1"))
    assert cache.load(CPU) == {}
    assert cache.store(CPU, {"b": {"x": 1}}) == file
    assert json.loads(file.read_text())["plans"] == {"b": {"x": 1}}


def test_unwritable_folder(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv(cache.ENV, str(blocked / "below"))
    assert cache.store(CPU, {"c": {"x": 1}}) is None
    assert cache.load(CPU) == {"c": {"x": 1}}


def test_concurrent_writers_lose_nothing(folder):
    code = (
        "import sys, torch\n"
        "from normfuse.runtime import autotune_cache as c\n"
        "for i in range(10): c.store(torch.device('cpu'), {f'{sys.argv[1]}-{i}': {'x': i}})\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(n)]) for n in range(2)]
    assert [p.wait(timeout=120) for p in running] == [0, 0]
    assert len(cache.load(CPU)) == 20
    assert not list(folder.glob("*.tmp"))


PLAN = plans.norm_forward(4096, 1024, 132)


@pytest.mark.parametrize(
    "entry",
    [
        {"block_r": 3},
        {"block_r": "2"},
        {"unknown": 1},
        {"num_warps": 0},
        {"block_c": PLAN.block_c * 2, "block_r": 1},
        {"regime": "split", "block_c": PLAN.block_c},
        {"splits": True, "block_c": PLAN.block_c},
    ],
)
def test_entries_that_cannot_run_are_ignored(entry):
    assert cache.valid(PLAN, entry) == PLAN


def test_a_good_entry_is_used():
    entry = {**PLAN.to_dict(), "num_warps": 8, "seconds": 1e-6}
    assert cache.valid(PLAN, entry).num_warps == 8


def test_tuning_is_bounded_and_keeps_the_best():
    sizes, tried = (4096, 1024, 132), []

    def seconds():
        entry = cache.load(CPU)[cache.key("norm_forward", torch.float32, sizes, {})]
        tried.append(entry)
        if entry["num_warps"] == PLAN.num_warps * 2:
            raise RuntimeError("does not compile")
        return abs(entry["block_r"] - 4) + entry["num_warps"] / 100

    best = cache.tune("norm_forward", PLAN, CPU, torch.float32, sizes, {}, seconds)
    assert len(tried) <= cache.MAX_CONFIGS and tried[0]["block_r"] == PLAN.block_r
    assert best.block_r == 4
    stored = cache.load(CPU)[cache.key("norm_forward", torch.float32, sizes, {})]
    assert stored["block_r"] == 4 and stored["seconds"] > 0


def test_candidates_can_all_run():
    others = (plans.norm_backward(4096, 1024, 132), plans.gemm(8, 4096, 4096, 2, 132))
    square = [plans.symmetric(64, side, 2, 132) for side in (64, 1024)]
    exact = plans.symmetric(64, 1024, 4, 132)
    for plan in (PLAN, *others, *square, exact, plans.addend(768, 3072, 2)):
        found = cache.candidates(plan)
        assert 1 < len(found) <= cache.MAX_CONFIGS and found[0] == plan
        for c in found:
            assert cache.valid(plan, c.to_dict()) == c


def test_descriptors_are_a_candidate_only_where_they_exist():
    large, few = plans.gemm(4096, 4096, 4096, 2, 132), plans.gemm(8, 4096, 4096, 2, 132)
    for plan in (large, plans.gemm(4096, 4096, 4096, 2, 132, dual=True)):
        found = cache.candidates(plan, descriptors=True)
        assert len(found) <= cache.MAX_CONFIGS and found[0] == plan
        assert sum(c.descriptors for c in found) == 2
        for c in found:
            assert cache.valid(plan, c.to_dict()) == c
    for plan, there in ((large, False), (few, True), (PLAN, True)):
        assert not any(getattr(c, "descriptors", 0) for c in cache.candidates(plan, there))
    assert cache.valid(large, {"descriptors": 1}) == large
    assert not large.descriptors and not cache.valid(large, {"num_warps": 4}).descriptors


def test_fingerprint_follows_the_plans():
    before = cache.fingerprint(CPU)
    cache.store(CPU, {"z": {"block_r": 1}})
    assert cache.fingerprint(CPU) != before


def test_verdicts():
    assert cache.verdict(CPU, "norm", torch.float32, (100, 64)) is None
    cache.record_verdict(CPU, "norm", torch.float32, (100, 64), 1.0, 2.0)
    assert cache.verdict(CPU, "norm", torch.float32, (128, 64))["faster"] is True
    assert cache.verdict(CPU, "norm", torch.float32, (129, 64)) is None
