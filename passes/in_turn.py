"""Threads trace in turn, with Dynamo's compilations too.

Tracing changes PyTorch for the whole process: ``torch.export`` patches ``nn.Module``, and the stack of
pre-dispatch modes is one for all threads, so that symbolic sizes of one would meet the tracer of another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._dynamo.convert_frame import compile_lock

P = ParamSpec("P")
R = TypeVar("R")


def in_turn(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, in one thread at a time (which may call others of its kind)."""

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with compile_lock:
            return function(*args, **kwargs)

    return alone
