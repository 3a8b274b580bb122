"""Passes that keep the function to rounding: same function, different graph."""

from __future__ import annotations

__all__: list[str] = []
