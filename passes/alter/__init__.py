"""Passes that change the function, on request."""

from __future__ import annotations

__all__: list[str] = []
