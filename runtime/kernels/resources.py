"""What a compiled kernel costs: registers, spills, shared memory, tensor-core instructions.

Cross-compiles every kernel for a target without needing that device and reads the numbers from the
artifact (``cuobjdump`` and ``nvdisasm`` come inside the triton package; AMD code carries them in its
text). ``python -m normfuse.runtime.kernels.resources`` prints the table.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import gated, linear, norms, persistent, plans, symmetric

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
_ROUND = {"bf16": 1, "fp16": 2, "fp32": 0}

#: Arguments that stay plain 32-bit numbers; every other argument that is not a constexpr is a pointer.
_NUMBERS = frozenset(
    [
        "rows",
        "cols",
        "rank",
        "x_stride",
        "r_stride",
        "h_stride",
        "dy_stride",
        "ds_stride",
        "do_stride",
        "span",
        "rows_per_program",
        "M",
        "N",
        "K",
        "w_stride",
    ]
)
#: Arguments that stay plain float32 numbers.
_REALS = frozenset(["alpha", "beta"])
_FLOAT32 = frozenset(
    [
        "stats",
        "partials",
        "partial",
        "sums",
        "scale",
        "colsum",
        "colsum2",
        "t_out",
        "t_in",
        "dt_out",
        "dt_in",
    ]
)


@dataclass(frozen=True)
class Case:
    """One kernel in one regime: its compile-time arguments and launch options."""

    kernel: Any
    regime: str
    dtype: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    is_product: bool = False
    x_dtype: str = ""  # of the rows, where it is another
    targets: tuple[str, ...] = tuple(TARGETS)

    @property
    def name(self) -> str:
        return self.kernel.__name__


@dataclass(frozen=True)
class Resources:
    """Per thread registers and spilled bytes; per program shared memory bytes.

    ``mix`` counts the matrix instructions in the code by name, and bulk loads by tensor descriptors
    (``UTMALDG``); ``instructions`` all of them.
    """

    registers: int
    spills: int
    shared: int
    mix: dict[str, int]
    instructions: int

    @property
    def tensor_core(self) -> int:
        return sum(n for op, n in self.mix.items() if op != "UTMALDG")


def cases(dtype: str) -> Iterator[Case]:
    """The configurations that ``plans`` chooses for typical sizes, on 132 processors."""
    p: Any  # a plan of whichever kernel comes next
    size, rounding = DTYPES[dtype], _ROUND[dtype]
    casts = {"NORM_DT": rounding, "GAIN_DT": rounding, "BIAS_DT": rounding}
    for cols in (128, 1024, 4096, 16384):
        p = plans.norm_forward(4096, cols, 132)
        flags = {"KIND": 2, "HAS_RESIDUAL": True, "HAS_GAIN": True, "HAS_BIAS": True}
        yield Case(
            norms.norm_fwd_tile,
            f"tile {cols}",
            dtype,
            {"EPS": 1e-5, **flags, "WRITE_Y": True, "SUM_DT": rounding, **casts,
             "BLOCK_R": p.block_r, "BLOCK_C": p.block_c},
            p.num_warps,
        )  # fmt: skip
    p = plans.norm_forward(1, 65536, 132)
    yield Case(
        norms.norm_partials,
        "split",
        dtype,
        {"KIND": 2, "HAS_RESIDUAL": True, "SUM_DT": rounding, "SPLITS": p.splits,
         "BLOCK_C": p.block_c},
        p.num_warps,
    )  # fmt: skip
    yield Case(
        norms.norm_apply,
        "split",
        dtype,
        {"EPS": 1e-5, "KIND": 2, "HAS_GAIN": True, "HAS_BIAS": True, "WRITE_Y": True, **casts,
         "SPLITS": p.splits, "BLOCK_S": plans.next_power_of_2(p.splits), "BLOCK_C": p.block_c},
        p.num_warps,
    )  # fmt: skip
    for cols in (128, 1024, 4096, 8192):
        p = plans.norm_backward(4096, cols, 132)
        yield Case(
            norms.norm_bwd_tile,
            f"tile {cols}",
            dtype,
            {"KIND": 2, "HAS_DSTREAM": True, "HAS_GAIN": True, "HAS_BIAS": True,
             "NORM_DT": rounding, "BLOCK_R": p.block_r, "BLOCK_C": p.block_c},
            p.num_warps,
        )  # fmt: skip
    p = plans.norm_backward(4096, 32768, 132)
    yield Case(
        norms.norm_bwd_loop,
        "loop",
        dtype,
        {"KIND": 2, "HAS_DSTREAM": True, "HAS_GAIN": True, "BLOCK_C": p.block_c},
        p.num_warps,
    )
    yield Case(
        norms.norm_bwd_columns,
        "loop",
        dtype,
        {"KIND": 2, "HAS_GAIN": True, "HAS_BIAS": True, "NORM_DT": rounding,
         "BLOCK_R": p.block_r, "BLOCK_C": 128},
        4,
    )  # fmt: skip
    for regime, m, dual, statistic, rows in (
        ("decode", 8, False, 1, ""),
        ("decode", 64, False, 1, ""),
        ("decode LayerNorm", 64, False, 2, ""),
        ("decode GLU", 8, True, 1, ""),
        ("decode GLU LayerNorm", 64, True, 2, ""),
        ("medium", 256, False, 1, ""),
        ("medium LayerNorm", 256, False, 2, ""),
        ("large", 4096, False, 1, ""),
        ("large LayerNorm", 4096, False, 2, ""),
        ("large scaled", 4096, False, 0, ""),
        ("large GLU", 4096, True, 1, ""),
        ("large GLU LayerNorm", 4096, True, 2, ""),
        ("decode, float32 rows", 8, False, 1, "fp32"),
        ("decode LayerNorm, float32 rows", 64, False, 2, "fp32"),
        ("decode GLU LayerNorm, float32 rows", 64, True, 2, "fp32"),
        ("medium LayerNorm, float32 rows", 256, False, 2, "fp32"),
        ("large LayerNorm, float32 rows", 4096, False, 2, "fp32"),
        ("large GLU LayerNorm, float32 rows", 4096, True, 2, "fp32"),
    ):
        if rows and dtype != "bf16":
            continue
        p = plans.gemm(m, 4096, 4096, size, 132, dual=dual, mixed=bool(rows))
        yield Case(
            linear.norm_linear_kernel,
            f"{regime} {p.block_m}×{p.block_n}×{p.block_k}",
            dtype,
            {"EPS": 1e-5, "LIMIT": 64.0, "STATS": statistic, "HAS_BIAS": True, "DUAL": dual,
             "ACT": 2 if dual else 0, "EVEN_K": True, "PRECISION": "ieee", "GROUP": p.group,
             "BLOCK_M": p.block_m, "BLOCK_N": p.block_n, "BLOCK_K": p.block_k, "w_stride_k": 1},
            p.num_warps,
            p.num_stages,
            True,
            rows,
        )  # fmt: skip
    for regime, dual, statistic, rows in (
        ("large", False, 1, ""),
        ("large LayerNorm", False, 2, ""),
        ("large scaled", False, 0, ""),
        ("large GLU", True, 1, ""),
        ("large, float32 rows", False, 1, "fp32"),
        ("large GLU, float32 rows", True, 1, "fp32"),
    ):
        if size > 2 or (rows and dtype != "bf16"):
            continue  # see triton_ops/linear.py
        p = plans.gemm(4096, 4096, 4096, size, 132, dual=dual, mixed=bool(rows))
        yield Case(
            persistent.norm_linear_persistent,
            f"{regime} {p.block_m}×{p.block_n}×{p.block_k}",
            dtype,
            {"EPS": 1e-5, "LIMIT": 64.0, "STATS": statistic, "HAS_BIAS": True, "DUAL": dual,
             "ACT": 2 if dual else 0, "EVEN_K": True, "TRANSPOSED": False, "PRECISION": "ieee",
             "GROUP": p.group, "BLOCK_M": p.block_m, "BLOCK_N": p.block_n, "BLOCK_K": p.block_k,
             "w_stride_k": 1},
            p.num_warps,
            p.num_stages,
            True,
            rows,
            ("sm_90", "sm_100"),
        )  # fmt: skip
    p = plans.gemm(8, 1024, 8192, size, 132)
    yield Case(
        linear.norm_linear_split,
        f"decode split {p.block_m}×{p.block_n}×{p.block_k}",
        dtype,
        {"STATS": 1, "DUAL": False, "EVEN_K": True, "PRECISION": "ieee", "BLOCK_M": p.block_m,
         "BLOCK_N": p.block_n, "BLOCK_K": p.block_k, "w_stride_k": 1},
        p.num_warps,
        p.num_stages,
        True,
    )  # fmt: skip
    yield Case(
        linear.norm_linear_finish,
        "decode split",
        dtype,
        {"EPS": 1e-5, "LIMIT": 64.0, "STATS": 2, "HAS_BIAS": True, "DUAL": False, "ACT": 0,
         "SPLITS": p.splits, "BLOCK_N": 256, "BLOCK_K": 32, "w_stride_k": 1},
        4,
    )  # fmt: skip
    for rank in (16, 64):
        for kernel, more in (
            (gated.gated_fwd, {"EPS": 1e-6, "OUT_DT": rounding}),
            (gated.gated_bwd_rows, {}),
            (gated.gated_bwd_columns, {}),
        ):
            back = kernel is not gated.gated_fwd
            p = plans.gated(4096, 4096, rank, size, 132, backward=back)
            yield Case(
                kernel,
                f"rank {rank}",
                dtype,
                {"GATE": 2.0, "HAS_GAIN": True, "HAS_BIAS": True, **casts, "PRECISION": "ieee",
                 "BLOCK_R": p.block_r, "BLOCK_C": p.block_c, "BLOCK_K": p.block_k, **more},
                p.num_warps,
                p.num_stages,
                True,
            )  # fmt: skip
    yield from batched_products(dtype)
    if dtype == "fp32":
        yield from batched_products(dtype, tf32=True)


def batched_products(dtype: str, tf32: bool = False) -> Iterator[Case]:
    """Newton–Schulz products, large and small: by rows, by columns, with and without an addend."""
    size, precision = DTYPES[dtype], "tf32" if tf32 else "ieee"
    suffix = " TF32" if tf32 else ""
    by_rows, by_columns = {"x_stride_k": 1, "w_stride_k": 1}, {"x_stride": 1, "w_stride": 1}
    p: Any
    for side in (1024, 256):
        p = plans.symmetric(64, side, size, 132, tf32=tf32)
        for regime, base, strides in (
            ("Gram", False, by_rows),
            ("Gram of columns", False, by_columns),
            ("bA + cA²", True, {**by_rows, "base_stride_n": 1}),
        ):
            yield Case(
                symmetric.batched_product,
                f"{regime} {p.block}×{p.block}×{p.block_k}{suffix}",
                dtype,
                {"SYMMETRIC": True, "HAS_BASE": base, "WIDE": False, "EVEN_K": True,
                 "PRECISION": precision, "GROUP": p.group, "BLOCK_M": p.block, "BLOCK_N": p.block,
                 "BLOCK_K": p.block_k, **strides},
                p.num_warps,
                p.num_stages,
                True,
            )  # fmt: skip
        p = plans.addend(side, 4096, size, tf32=tf32)
        yield Case(
            symmetric.batched_product,
            f"aX + BX {p.block_m}×{p.block_n}×{p.block_k}{suffix}",
            dtype,
            {"SYMMETRIC": False, "HAS_BASE": True, "WIDE": False, "EVEN_K": True,
             "PRECISION": precision, "GROUP": p.group, "BLOCK_M": p.block_m, "BLOCK_N": p.block_n,
             "BLOCK_K": p.block_k, "x_stride_k": 1, "w_stride": 1, "base_stride_n": 1},
            p.num_warps,
            p.num_stages,
            True,
        )  # fmt: skip
        if size > 2 and not tf32:
            return  # one plan for every side


def build(case: Case, target: str, reals: str = "fp32") -> Any:
    """The compiled kernel for a target, by cross-compilation; ``reals``: how numbers are passed."""
    present = {k: v for k, v in case.constants.items()}
    signature, constants = {}, {}
    for i, name in enumerate(case.kernel.arg_names):
        if name in present:
            signature[name] = "constexpr"
            constants[(i,)] = present[name]
        elif name in _NUMBERS or "stride" in name:
            signature[name] = "i32"
        elif name in _REALS:
            signature[name] = reals
        elif name in _FLOAT32 or (name in ("dgain", "dbias", "ddown", "dup")):
            signature[name] = "*fp32"
        elif name == "x" and case.x_dtype:
            signature[name] = f"*{case.x_dtype}"
        else:
            signature[name] = f"*{case.dtype}"
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(case.kernel.arg_names)
        if name not in present and name not in ("rows", "rows_per_program", "rank", "M", *_REALS)
    }
    source = ASTSource(case.kernel, signature, constants, divisible)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if target.startswith("gfx"):
        options["num_stages"] = min(case.num_stages, 2)
        options["num_warps"] = max(min(case.num_warps, 8), 1)
    return triton.compile(source, target=TARGETS[target], options=options)


def _tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _count(pattern: str, code: str) -> dict[str, int]:
    return dict(sorted(Counter(re.findall(pattern, code, re.M)).items()))


def read(compiled: Any, target: str) -> Resources:
    """Read the artifact (not the compiler's own bookkeeping)."""
    shared = compiled.metadata.shared
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]

        def number(key: str) -> int:
            found = re.search(rf"\.{key}:\s*(\d+)", text)
            return int(found[1]) if found else 0

        return Resources(
            number("vgpr_count"),
            number("vgpr_spill_count") * 4 + number("private_segment_fixed_size"),
            shared,
            _count(r"^\s*v_(mfma)", text),
            len(re.findall(r"^\s+[vs]_\w+", text, re.M)),
        )
    handle, file = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(compiled.asm["cubin"])
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file], capture_output=True, text=True, check=True
        )
        numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
        code = subprocess.run(
            [_tool("nvdisasm"), "-c", file], capture_output=True, text=True, check=True
        ).stdout
    finally:
        os.unlink(file)
    return Resources(
        int(numbers["REG"]),
        int(numbers["STACK"]) + int(numbers["LOCAL"]),
        shared,
        _count(r"\b(HMMA|HGMMA|QGMMA|IMMA|UTC\w*MMA|UTMALDG)\b", code),
        len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", code, re.M)),
    )


def table(targets: tuple[str, ...], dtypes: tuple[str, ...]) -> Iterator[str]:
    """Markdown rows for every kernel × target × dtype × regime."""
    columns = [
        "kernel",
        "regime",
        "dtype",
        "target",
        "warps",
        "registers",
        "spilled",
        "shared",
        "matrix instructions",
        "all",
    ]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + " --- |" * len(columns)
    for dtype in dtypes:
        for case in cases(dtype):
            for target in targets:
                if target not in case.targets:
                    continue
                r = read(build(case, target), target)
                cells = [
                    f"`{case.name}`", case.regime, dtype, target, case.num_warps, r.registers,
                    r.spills, r.shared, ", ".join(f"{n} {op}" for op, n in r.mix.items()),
                    r.instructions,
                ]  # fmt: skip
                yield "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Print the page for the targets and dtypes named on the command line (all by default)."""
    targets = tuple(a for a in sys.argv[1:] if a in TARGETS) or tuple(TARGETS)
    dtypes = tuple(a for a in sys.argv[1:] if a in DTYPES) or tuple(DTYPES)
    print("# Resources of the kernels\n")
    print(
        f"Cross-compiled with triton {triton.__version__} and read from the artifacts: registers and "
        "spilled\nbytes per thread, shared bytes per program, instructions in the code. Nothing here "
        "was run on a GPU.\nfloat32 products are exact unless marked TF32: matrix instructions on gfx942 "
        "only.\n\n"
        "Generated by `python -m normfuse.runtime.kernels.resources`.\n"
    )
    for line in table(targets, dtypes):
        print(line, flush=True)


if __name__ == "__main__":
    main()
