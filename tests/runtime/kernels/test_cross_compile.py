"""Kernels compiled for GPUs that are not here, judged by the machine code."""

import dataclasses
import functools
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
from normfuse.runtime.kernels import resources

TABLE = Path(__file__).parents[3] / "benchmarks" / "results" / "kernel_resources.md"

#: Set to compile every kernel for every target (many minutes).
FULL = os.environ.get("NORMFUSE_FULL_CROSS_COMPILE") == "1"

#: Always on: the flagship on every target, one of each other family on two.
SAMPLE = [
    ("norm_linear_kernel", "large 128", "sm_80"),
    ("norm_linear_kernel", "large 128", "sm_90"),
    ("norm_linear_kernel", "large 128", "sm_100"),
    ("norm_linear_kernel", "large 128", "gfx942"),
    ("norm_linear_persistent", "large 128", "sm_90"),
    ("norm_linear_persistent", "large LayerNorm", "sm_90"),
    ("norm_linear_persistent", "large GLU 64", "sm_100"),
    ("norm_fwd_tile", "tile 4096", "sm_90"),
    ("norm_fwd_tile", "tile 4096", "gfx942"),
    ("norm_bwd_tile", "tile 4096", "sm_80"),
    ("gated_fwd", "rank 16", "sm_90"),
    ("gated_bwd_rows", "rank 16", "sm_100"),
    ("gated_bwd_columns", "rank 64", "gfx942"),
    ("batched_product", "bA + cA² 128", "sm_80"),
    ("batched_product", "bA + cA² 128", "sm_90"),
    ("batched_product", "Gram of columns 64", "sm_100"),
    ("batched_product", "aX + BX 128", "gfx942"),
]


@functools.cache
def all_cases(dtype):
    return list(resources.cases(dtype))


@functools.cache
def compile_and_read(name, regime, dtype, target):
    case = next(c for c in all_cases(dtype) if (c.name, c.regime) == (name, regime))
    compiled = resources.build(case, target)
    return compiled, resources.read(compiled, target)


def judge(case, target):
    compiled, r = compile_and_read(case.name, case.regime, case.dtype, target)
    assert r.spills == 0
    assert r.instructions > 50
    assert r.shared <= {"sm_80": 163, "gfx942": 64}.get(target, 227) * 1024
    if case.is_product and case.dtype == "bf16" and case.name != "norm_linear_finish":
        assert r.tensor_core > 0
    return compiled, r


@pytest.mark.parametrize("name, regime, target", SAMPLE)
def test_sample(name, regime, target):
    case = next(c for c in all_cases("bf16") if c.name == name and c.regime.startswith(regime))
    compiled, r = judge(case, target)
    assert r.spills == 0
    if target == "sm_90" and (name.startswith("norm_linear") or name == "batched_product"):
        assert "wgmma.mma_async" in compiled.asm["ptx"]
    # bulk copies by tensor descriptor
    assert ("UTMALDG" in r.mix) == (name == "norm_linear_persistent")


def test_numbers_passed_in_float64_are_not_computed_with():
    """Inductor passes them so."""
    case = next(c for c in all_cases("bf16") if c.regime.startswith("bA + cA² 128"))
    ptx = resources.build(case, "sm_90", reals="fp64").asm["ptx"]
    assert "cvt.rn.f32.f64" in ptx
    assert not re.search(r"(mul|fma|add)(\.rn)?\.f64", ptx)


def committed():
    """The table's rows by kernel, regime, dtype and target."""
    out = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if cells[0].startswith("`"):
            out[cells[0].strip("`"), cells[1], cells[2], cells[3]] = cells[4:]
    return out


def test_the_table_is_complete_and_nothing_in_it_spills():
    rows = committed()
    wanted = {
        (case.name, case.regime, dtype, target)
        for dtype in resources.DTYPES
        for case in all_cases(dtype)
        for target in case.targets
    }
    assert set(rows) == wanted, "run python -m normfuse.runtime.kernels.resources"
    assert [key for key, cells in rows.items() if cells[2] != "0"] == []
    products = {c.name for c in all_cases("bf16") if c.is_product}
    for (name, regime, dtype, target), cells in rows.items():
        if name in products and dtype != "fp32":
            assert ("mfma" if target == "gfx942" else "MMA") in cells[4], (name, target)
        elif "TF32" in regime and target != "gfx942":
            assert "MMA" in cells[4], (name, regime, target)
    assert "HGMMA" in rows["norm_linear_kernel", "large 128×128×64", "bf16", "sm_90"][4]
    persistent = [cells[4] for key, cells in rows.items() if key[0] == "norm_linear_persistent"]
    assert persistent and all("UTMALDG" in mix for mix in persistent)


@pytest.mark.parametrize("name, regime, target", SAMPLE)
def test_the_table_says_what_is_compiled(name, regime, target):
    text = TABLE.read_text(encoding="utf-8")
    if f"triton {triton.__version__} " not in text:
        pytest.skip("the table was made with another triton")
    case = next(c for c in all_cases("bf16") if c.name == name and c.regime.startswith(regime))
    _, r = judge(case, target)
    cells = committed()[case.name, case.regime, "bf16", target]
    found = [case.num_warps, r.registers, r.spills, r.shared]
    assert cells[:4] == [str(v) for v in found]
    assert int(cells[5]) == r.instructions
    assert sum(map(int, re.findall(r"\d+(?= [A-Za-z])", cells[4]))) == sum(r.mix.values())


@pytest.mark.parametrize("name", ["gated_fwd", "gated_bwd_rows", "gated_bwd_columns"])
@pytest.mark.parametrize("gain", [True, False])
def test_gated_norms_without_gain_or_bias(name, gain):
    """What is not there is not loaded: a flag that always counted as true would ask for it."""
    case = next(c for c in all_cases("bf16") if c.name == name)
    absent = {a: None for a in ("bias", "dbias") if a in case.kernel.arg_names}
    if not gain:
        absent |= {a: None for a in ("gain", "dgain") if a in case.kernel.arg_names}
    constants = {**case.constants, **absent, "HAS_GAIN": gain, "HAS_BIAS": False}
    compiled = resources.build(dataclasses.replace(case, constants=constants), "sm_90")
    assert resources.read(compiled, "sm_90").spills == 0


#: Of a product with row statistics taken inside, and of one with a given scale: what launches leave out.
ABSENT = {
    "rms": (1, ("w2", "colsum", "colsum2", "bias", "bias2", "scale")),
    "scaled": (0, ("w2", "colsum", "colsum2", "bias", "bias2", "stats", "sums")),
}


@pytest.mark.parametrize(
    "name, how",
    [
        ("norm_linear_kernel", "rms"),
        ("norm_linear_kernel", "scaled"),
        ("norm_linear_persistent", "rms"),
        ("norm_linear_split", "scaled"),
        ("norm_linear_finish", "rms"),
    ],
)
def test_products_without_what_they_do_not_read(name, how):
    case = next(c for c in all_cases("bf16") if c.name == name)
    statistic, absent = ABSENT[how]
    changed = {"STATS": statistic, "HAS_BIAS": False, **dict.fromkeys(absent)}
    known = {k: v for k, v in changed.items() if k in case.kernel.arg_names}
    case = dataclasses.replace(case, constants={**case.constants, **known})
    assert resources.read(resources.build(case, "sm_90"), "sm_90").spills == 0


@pytest.mark.skipif(not FULL, reason="set NORMFUSE_FULL_CROSS_COMPILE=1")
@pytest.mark.parametrize("target", resources.TARGETS)
@pytest.mark.parametrize("dtype", resources.DTYPES)
def test_everything_compiles(dtype, target):
    for case in all_cases(dtype):
        if target in case.targets:
            judge(case, target)
