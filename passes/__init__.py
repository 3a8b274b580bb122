"""Graphs in, graphs out: the norm vocabulary, capture, analysis, rewrites and proofs."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from . import ops as ops
from .capture import capture as capture
from .contract import Context, Pass, PassResult, register
from .errors import (
    CaptureError,
    NormfuseError,
    NormfuseWarning,
    Refuse,
    SpecError,
    VerificationError,
)
from .manager import PassManager, registry
from .report import Report, Site

__all__ = [
    "CaptureError",
    "Context",
    "NormfuseError",
    "NormfuseWarning",
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


def __getattr__(name: str) -> Any:
    # pass classes (`passes.FoldAffine`) and modules (`passes.residual`) are resolved on first use
    for promise in ("exact", "extend", "alter"):
        folder = importlib.import_module(f".{promise}", __name__)
        if name in getattr(folder, "__all__", ()):
            return getattr(folder, name)
    if importlib.util.find_spec(f".{name}", __name__) is not None:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
