"""Warnings that name the line that called us, however deep in our code or PyTorch's they arise."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parent.parent
#: Generated code, PyTorch, and this package without its tests and examples.
_INSIDE = (
    "<",
    str(Path(torch.__file__).parent),
    contextlib.__file__,
    *(str(_ROOT / room) for room in ("__init__.py", "passes", "runtime", "optim")),
)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """``warnings.warn`` at the innermost frame that is neither ours nor PyTorch's."""
    frame, level = sys._getframe(1), 2
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1  # type: ignore[assignment]
    warnings.warn(message, category, stacklevel=2 if frame is None else level)
