"""Kernels that could not be compiled or launched on this machine, remembered for ``normfuse doctor``.

One JSON file beside the tuned plans for each device, triton version and version of the kernels, so
that an entry never speaks of another installation. Nothing is decided by it: every process tries
again.
"""

from __future__ import annotations

import contextlib
import datetime
from typing import Any

import torch

from . import autotune_cache as cache

#: Failures kept for one device and installation, and characters of a reason.
MAX_ENTRIES = 64
_LENGTH = 400


def record(device: torch.device, kernel: str, configuration: str, reason: str) -> None:
    """Keep a failure; the same kernel and configuration again only counts up. Never raises."""
    reason = " ".join(reason.split())[:_LENGTH]
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")

    def merged() -> dict[str, Any]:
        known = cache.entries_of(cache.read_json(file), "failures")
        key = f"{kernel}|{configuration}"
        before = known.pop(key, {}).get("times", 0)
        times = before + 1 if type(before) is int else 1
        known[key] = {
            "kernel": kernel,
            "configuration": configuration[:_LENGTH],
            "reason": reason,
            "times": times,
            "last": now,
        }
        latest = dict(list(known.items())[-MAX_ENTRIES:])
        return {**cache.header(device), "failures": latest}

    # a note about a failure must not become one
    with contextlib.suppress(Exception):
        file = cache.path(device, "failures")
        cache.replace(file, merged)


def known() -> list[dict[str, str]]:
    """Everything on record, the newest last: device, versions of triton and of the kernels, kernel,
    configuration, reason, times, last."""
    folder = cache.directory()
    out = []
    for file in sorted(folder.glob("failures-*.json")) if folder.is_dir() else []:
        data = cache.read_json(file)
        about = {k: str(data.get(k, "unknown")) for k in ("device", "triton", "kernels")}
        for entry in cache.entries_of(data, "failures").values():
            fields = ("kernel", "configuration", "reason", "times", "last")
            out.append({**about, **{k: str(entry.get(k, "unknown")) for k in fields}})
    return sorted(out, key=lambda e: e["last"])
