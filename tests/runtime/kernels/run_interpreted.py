"""Runs ``check_*`` files in a process with Triton's interpreter switched on.

Whether a kernel is interpreted is decided when triton and the kernel are imported, so it cannot be
switched in a process that has already imported either. One process for several files: starting one
takes longer than many of them.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
#: The slower half; each half is a test file of its own, so that two workers share them.
PRODUCTS = ["check_descriptors.py", "check_linear.py", "check_symmetric.py"]


def others() -> list[str]:
    return sorted(p.name for p in HERE.glob("check_*.py") if p.name not in PRODUCTS)


def run(names: list[str], cache: Path) -> None:
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "NORMFUSE_CACHE_DIR": str(cache),
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
            *("-o", "addopts=-q --import-mode=importlib", *names),
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
