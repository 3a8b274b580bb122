"""Warnings name whoever called us (through our own code: test_backend, test_rewrite, test_trace)."""

import functools
import inspect

import pytest
from normfuse.passes.errors import NormfuseWarning
from normfuse.passes.warn import warn
from torch.utils import _pytree as pytree


def test_frames_of_pytorch_are_passed_over():
    through_pytorch = functools.partial(warn, category=NormfuseWarning)
    with pytest.warns(NormfuseWarning, match="said") as caught:
        line = inspect.currentframe().f_lineno + 1
        pytree.tree_map(through_pytorch, ["said"])
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line)]
