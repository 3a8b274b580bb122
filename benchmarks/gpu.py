"""Everything there is to check and measure on a GPU, in one command.

    python benchmarks/gpu.py [--quick]

Runs the kernels' checks and timings (tuning plans first), then whole models and optimizer
steps, each in its own process.
Results go to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from gpu_timing import require_gpu

HERE = Path(__file__).parent


#: Optimizer steps with our kernels and without, compiled and not, beside the installed peers.
OPTIMIZERS = [
    "--device",
    "cuda",
    "--dtype",
    "float16",
    "--compiled",
    "--out",
    str(HERE / "results"),
]


def commands(quick: bool) -> list[list[str]]:
    more = ["--quick"] if quick else []
    return [
        [sys.executable, str(HERE / "kernels.py"), "--tune", *more],
        [sys.executable, str(HERE / "newton_schulz.py"), "--tune", *more],
        [sys.executable, str(HERE / "gpu_models.py"), *more],
        [sys.executable, str(HERE / "optim_step.py"), *OPTIMIZERS, *more],
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Check and measure everything on this GPU.")
    parser.add_argument("--quick", action="store_true", help="minutes instead of hours")
    options = parser.parse_args(argv)
    require_gpu()
    codes = [subprocess.run(command).returncode for command in commands(options.quick)]
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
