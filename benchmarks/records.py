"""What a benchmark keeps of an earlier run when it adds to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def earlier(path: Path, environment: dict[str, Any]) -> dict[str, Any]:
    """The record at ``path``; empty if there is none.

    Rows of different software or devices must not stand in one table: then the program ends.
    """
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    for key, value in environment.items():
        if key != "date" and found["environment"].get(key) != value:
            raise SystemExit(f"--add: {path} was measured with another {key}")
    return found
