"""Kernels compiled for GPUs that are not here, judged by the machine code."""

import functools
import os

import pytest

pytest.importorskip("triton")

from normfuse.runtime.kernels import resources

#: Set to compile every kernel for every target (many minutes).
FULL = os.environ.get("NORMFUSE_FULL_CROSS_COMPILE") == "1"

#: Always on: the flagship on every target, one of each other family on two.
SAMPLE = [
    ("norm_linear_kernel", "large 128", "sm_80"),
    ("norm_linear_kernel", "large 128", "sm_90"),
    ("norm_linear_kernel", "large 128", "sm_100"),
    ("norm_linear_kernel", "large 128", "gfx942"),
    ("norm_fwd_tile", "tile 4096", "sm_90"),
    ("norm_fwd_tile", "tile 4096", "gfx942"),
    ("norm_bwd_tile", "tile 4096", "sm_80"),
    ("gated_fwd", "rank 16", "sm_90"),
]


@functools.cache
def all_cases(dtype):
    return list(resources.cases(dtype))


def judge(case, target):
    compiled = resources.build(case, target)
    r = resources.read(compiled, target)
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
    if target == "sm_90" and name == "norm_linear_kernel":
        assert "wgmma.mma_async" in compiled.asm["ptx"]


@pytest.mark.skipif(not FULL, reason="set NORMFUSE_FULL_CROSS_COMPILE=1")
@pytest.mark.parametrize("target", resources.TARGETS)
@pytest.mark.parametrize("dtype", resources.DTYPES)
def test_everything_compiles(dtype, target):
    for case in all_cases(dtype):
        judge(case, target)
