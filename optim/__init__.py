"""Optimizers as lists of stages: one traced step, batched Newton–Schulz. Names resolve lazily."""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "orthogonalize": "polar",
    "coefficients": None,
    "diagnostics": None,
    "stages": None,
    "Muon": "muon",
    "NorMuon": "muon",
    "ROOT": "muon",
    "AuON": "muon",
    "HybridAuON": "muon",
    "MuonMuP": "muon",
    "SCALE": "normalized",
    "SinkGD": "normalized",
    "SWAN": "normalized",
    "AdamW": "adaptive",
    "AdamP": "adaptive",
    "SGDP": "adaptive",
    "Conda": "rotated",
    "ARO": "rotated",
    "MatrixOptimizer": "base",
    "param_groups": "groups",
    "CautiousWeightDecay": "wrappers",
    "NormalizeAndProject": "wrappers",
    "SafeStep": "wrappers",
    "scale_weight_decay": "wrappers",
    "compile": "trace",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name = _LAZY[name]
    module = importlib.import_module(f".{module_name or name}", __name__)
    value = module if module_name is None else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
