"""Tuned plans on disk: looked up while a graph is traced, never measured there.

Measuring inside a compile or a CUDA-graph capture would synchronize and make results depend on the
moment, so tuning is a separate, explicit act (:func:`tune`, used by ``benchmarks/kernels.py``).
A missing, unreadable or foreign cache file means the heuristics of ``kernels/plans.py``.

One JSON file per device, triton version and kernel-source version; writers replace it atomically
under a lock file's advisory lock, so that concurrent processes neither lose entries nor see half a
file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import devices

ENV = "NORMFUSE_CACHE_DIR"
#: Configurations tried per kernel and shape, at most.
MAX_CONFIGS = 8

_lock = threading.Lock()
_loaded: dict[Path, dict[str, dict[str, Any]]] = {}


def directory() -> Path:
    """Where tuned plans live: ``$NORMFUSE_CACHE_DIR`` or the user's cache folder."""
    chosen = os.environ.get(ENV)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "normfuse"


@functools.cache
def _kernel_version() -> str:
    digest = hashlib.sha256()
    for file in sorted((Path(__file__).parent / "kernels").glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def device_key(device: torch.device) -> str:
    """A device's name, architecture and processor count."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    p = torch.cuda.get_device_properties(device)
    arch = getattr(p, "gcnArchName", "") or f"sm{p.major}{p.minor}"
    return f"{p.name}-{arch}-{p.multi_processor_count}"


def path(device: torch.device, what: str = "plans") -> Path:
    key = f"{device_key(device)}|triton {_triton_version()}|kernels {_kernel_version()}"
    return directory() / f"{what}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def header(device: torch.device) -> dict[str, str]:
    """What a file is about, for people: its name is a hash of this."""
    return {
        "device": device_key(device),
        "triton": _triton_version(),
        "kernels": _kernel_version(),
    }


def read_json(file: Path) -> dict[str, Any]:
    """A cache file; ``{}`` if it is missing, damaged or not one of ours."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return data if isinstance(data, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def entries_of(data: dict[str, Any], what: str) -> dict[str, dict[str, Any]]:
    """The entries of a kind in a file's contents, as far as they are whole."""
    found = data.get(what)
    found = found if isinstance(found, dict) else {}
    return {k: v for k, v in found.items() if isinstance(v, dict)}


def _read(file: Path) -> dict[str, dict[str, Any]]:
    return entries_of(read_json(file), "plans")


def load(device: torch.device) -> dict[str, dict[str, Any]]:
    """The tuned plans of a device, read once per process."""
    file = path(device)
    with _lock:
        if file not in _loaded:
            _loaded[file] = _read(file)
        return _loaded[file]


@contextlib.contextmanager
def _file_lock(file: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # no advisory locks here: the replace below is still atomic
        yield
        return
    with open(file.with_suffix(".lock"), "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)


def store(device: torch.device, entries: dict[str, dict[str, Any]]) -> Path | None:
    """Add entries; ``None`` if the folder cannot be written (the plans then last this process)."""
    file = path(device)
    with _lock:
        _loaded.setdefault(file, _read(file)).update(entries)
    return replace(file, lambda: {**header(device), "plans": {**_read(file), **entries}})


def replace(file: Path, contents: Callable[[], dict[str, Any]]) -> Path | None:
    """Write a file in one step, its contents made while other writers wait; ``None`` if that fails."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _file_lock(file):
            text = json.dumps(contents(), indent=1)
            handle, name = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as out:
                    out.write(text)
                os.replace(name, file)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
    except OSError:
        return None
    return file


def clear() -> int:
    """Forget and delete all tuned plans and recorded failures; returns the number of files removed."""
    removed = 0
    with _lock:
        _loaded.clear()
    for file in (*directory().glob("plans-*.json"), *directory().glob("failures-*.json")):
        with contextlib.suppress(OSError):
            file.unlink()
            removed += 1
    return removed


def describe() -> dict[str, Any]:
    """For ``normfuse doctor``: where the cache is and what it holds."""
    files = sorted(directory().glob("plans-*.json")) if directory().is_dir() else []
    return {
        "directory": str(directory()),
        "files": len(files),
        "plans": sum(len(_read(f)) for f in files),
    }


def _bucket(size: Any) -> str:
    """Sizes as cache keys: exact for a known size, rounded up to a power of two for row counts."""
    return str(size) if type(size) is int else "any"


def key(kernel: str, dtype: torch.dtype, sizes: tuple, options: dict[str, Any]) -> str:
    parts = [kernel, str(dtype).removeprefix("torch."), *map(_bucket, sizes)]
    return "|".join(parts + [f"{k}={v}" for k, v in sorted(options.items())])


def tuned(kernel: str, heuristic: Callable[..., Any], x: torch.Tensor, *sizes: Any, **options: Any):
    """The tuned plan for these sizes if there is one that still fits its class, else the heuristic's.

    Sizes may be symbolic: those have no tuned plan and add no guard.
    """
    plan = heuristic(*sizes, **options)
    if x.device.type != "cuda" or any(type(s) is not int for s in sizes):
        return plan
    entry = load(x.device).get(key(kernel, x.dtype, sizes, options))
    return plan if entry is None else valid(plan, entry)


def valid(plan: Any, entry: dict[str, Any]) -> Any:
    """``entry`` as a plan, or ``plan`` where the entry could not be run (a damaged or odd file)."""
    names = {f.name for f in dataclasses.fields(plan)}
    numbers = {k: v for k, v in entry.items() if k not in ("regime", "seconds")}
    if not set(numbers) <= names:
        return plan
    for name, value in numbers.items():
        if type(getattr(plan, name)) is bool:
            if type(value) is not bool:
                return plan
            continue
        if type(value) is not int or not 1 <= value <= 65536:
            return plan
        if name != "splits" and name.startswith(("block", "num_warps")) and value & (value - 1):
            return plan
    # another regime is another kernel with other needs; a tuned plan only changes sizes within one
    if entry.get("regime", getattr(plan, "regime", None)) != getattr(plan, "regime", None):
        return plan
    if getattr(plan, "regime", "") == "tile" and numbers.get("block_c") != plan.block_c:
        return plan
    if getattr(plan, "regime", "") == "split" and numbers.get("splits", 1) > 64:
        return plan
    return dataclasses.replace(plan, **numbers)


def candidates(plan: Any, descriptors: bool = False) -> list[Any]:
    """At most :data:`MAX_CONFIGS` plans near ``plan``, itself first.

    ``descriptors``: the device can load tiles by tensor descriptors, which many rows may gain from.
    """
    out = [plan]

    def add(**changes: Any) -> None:
        other = dataclasses.replace(plan, **changes)
        if other not in out and len(out) < MAX_CONFIGS:
            out.append(other)

    if descriptors and getattr(plan, "regime", "") == "large":
        add(descriptors=True)
        add(descriptors=True, num_stages=plan.num_stages + 1)
    warps = plan.num_warps
    for other in (warps * 2, warps // 2):
        if 1 <= other <= 16:
            add(num_warps=other)
    if hasattr(plan, "block"):  # square tiles
        add(num_stages=plan.num_stages + 1)
        add(block_k=max(plan.block_k // 2, 16), num_stages=plan.num_stages + 1)
        add(block_k=plan.block_k * 2, num_stages=max(plan.num_stages - 1, 1))
        other = 64 if plan.block == 128 else 128
        add(block=other, num_warps=other // 16)
        add(group=plan.group * 2)
    elif hasattr(plan, "num_stages"):
        add(num_stages=plan.num_stages + 1)
        add(block_n=plan.block_n * 2)
        if plan.block_n > 32:
            add(block_n=plan.block_n // 2)
        if plan.splits > 1:
            add(splits=plan.splits // 2)
            add(splits=plan.splits * 2)
    elif getattr(plan, "regime", "") == "tile":
        add(block_r=plan.block_r * 2)
        if plan.block_r > 1:
            add(block_r=plan.block_r // 2)
        if plan.splits > 1:
            add(splits=plan.splits * 2)
            add(splits=max(plan.splits // 2, 1))
    return out


def tune(
    kernel: str,
    plan: Any,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple,
    options: dict[str, Any],
    seconds: Callable[[], float],
) -> Any:
    """Measure the candidates and keep the best.

    Args:
        seconds: runs the op once the candidate is in force and returns its time; a candidate for which it
            raises is passed over (see ``triton_ops.required``: an op's formula must not win).
    """
    name = key(kernel, dtype, sizes, options)
    plans = load(device)
    before = plans.get(name)
    best, best_time = plan, float("inf")
    try:
        for candidate in candidates(plan, devices.descriptors(device)):
            plans[name] = dataclasses.asdict(candidate)
            try:
                t = seconds()
            except Exception:
                continue
            if t < best_time:
                best, best_time = candidate, t
    finally:
        if before is None:
            plans.pop(name, None)
        else:
            plans[name] = before
    if best_time < float("inf"):
        store(device, {name: {**dataclasses.asdict(best), "seconds": best_time}})
    return best


def fingerprint(device: torch.device) -> str:
    """A hash of the plans in force, for the keys of compile caches."""
    text = json.dumps(load(device), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _verdict_key(kernel: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> str:
    # rows in powers of two: one measurement speaks for row counts near it
    rows = 1 << max(sizes[0] - 1, 0).bit_length()
    return key("verdict", dtype, (rows, *sizes[1:]), {"kernel": kernel})


def verdict(
    device: torch.device, kernel: str, dtype: torch.dtype, sizes: tuple[int, ...]
) -> dict[str, Any] | None:
    """Whether a kernel was measured faster than Inductor's own code for these sizes, rows first."""
    entry = load(device).get(_verdict_key(kernel, dtype, sizes))
    return entry if entry is not None and isinstance(entry.get("faster"), bool) else None


def record_verdict(
    device: torch.device,
    kernel: str,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    ours: float,
    inductor: float,
) -> None:
    """Keep a measured comparison; ours counts as faster from 3 % on."""
    entry = {"faster": ours * 1.03 <= inductor, "ours": ours, "inductor": inductor}
    store(device, {_verdict_key(kernel, dtype, sizes): entry})
