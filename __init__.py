"""normfuse: normalization as a compiler problem.

Public names are resolved lazily (PEP 562) so that ``import normfuse`` costs little more than
``import torch`` and never imports triton, matplotlib or transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "rewrite": ("normfuse.runtime.rewrite", "rewrite"),
    "explain": ("normfuse.runtime.rewrite", "explain"),
    "calibrate": ("normfuse.runtime.calibrate", "calibrate"),
    "Calibration": ("normfuse.runtime.calibration", "Calibration"),
    "bisect": ("normfuse.runtime.bisect", "bisect"),
    "refresh": ("normfuse.passes.weights", "refresh"),
    "reports": ("normfuse.runtime.backend", "reports"),
    "RewrittenModule": ("normfuse.runtime.rewrite", "RewrittenModule"),
    "Report": ("normfuse.passes.report", "Report"),
    "Site": ("normfuse.passes.report", "Site"),
    "CaptureError": ("normfuse.passes.errors", "CaptureError"),
    "NormfuseError": ("normfuse.passes.errors", "NormfuseError"),
    "VerificationError": ("normfuse.passes.errors", "VerificationError"),
    "passes": ("normfuse.passes", None),
    "runtime": ("normfuse.runtime", None),
    "optim": ("normfuse.optim", None),
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'normfuse' has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
