"""Passes that change the function, on request."""

from __future__ import annotations

from .absorb_outliers import AbsorbOutliers

__all__ = ["AbsorbOutliers"]
