"""Kernels under the interpreter: everything but products."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

from run_interpreted import others, run


def test_under_interpreter(tmp_path):
    run(others(), tmp_path)
