"""Graphs in, graphs out: the norm vocabulary, capture, analysis, rewrites and proofs."""

from __future__ import annotations

import importlib
from typing import Any

from . import ops as ops
from .capture import capture as capture
from .errors import CaptureError, NormfuseError, Refuse, SpecError, VerificationError
from .manager import Context, Pass, PassManager, PassResult, register
from .report import Report, Site

__all__ = [
    "CaptureError",
    "Context",
    "NormfuseError",
    "Pass",
    "PassManager",
    "PassResult",
    "Refuse",
    "Report",
    "Site",
    "SpecError",
    "VerificationError",
    "capture",
    "ops",
    "register",
    "registry",
]


def registry() -> dict[str, type[Pass]]:
    """All known passes by name; each class carries its ``promise``."""
    from . import exact  # noqa: F401  (registers them)
    from .manager import registry as known

    return known()


def __getattr__(name: str) -> Any:
    # pass classes (`passes.FoldAffine`) are resolved on first use
    exact = importlib.import_module(".exact", __name__)
    if name in exact.__all__:
        return getattr(exact, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
