"""What the outside world is told about a compile: cache keys and structured trace artifacts."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


@functools.cache
def source_hash() -> str:
    """A hash of this package's sources, as they were when first asked for in this process."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for room in ("passes", "runtime"):
        for file in sorted((root / room).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def trace_artifact(name: str, payload: Callable[[], Any]) -> None:
    """Write an artifact to the structured trace (``TORCH_TRACE``), which ``tlparse`` renders.

    ``payload`` is called only if tracing is on; text is stored as it is, anything else as JSON.
    """
    from torch._logging import trace_structured

    def render() -> str:
        value = payload()
        return value if isinstance(value, str) else json.dumps(value, indent=1)

    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=render,
        expect_trace_id=False,
    )
