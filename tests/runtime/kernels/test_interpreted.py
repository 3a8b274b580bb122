"""Runs the ``check_*`` files, each in a process with Triton's interpreter switched on.

Whether a kernel is interpreted is decided when triton and the kernel are imported, so it cannot be
switched in a process that has already imported either.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", sorted(p.name for p in HERE.glob("check_*.py")))
def test_under_interpreter(name, tmp_path):
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "NORMFUSE_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"),
            *("-o", "addopts=-q --import-mode=importlib", str(HERE / name)),
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
