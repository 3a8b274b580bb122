"""Kernels under the interpreter: products."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

from run_interpreted import PRODUCTS, run


def test_under_interpreter(tmp_path):
    run(PRODUCTS, tmp_path)
