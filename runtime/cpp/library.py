"""Builds ``symmetric.cpp`` with the compiler at hand, once per machine, and loads it.

Without a compiler, or where the processor is not one it was written for, there is none: ``normfuse
doctor`` says why, and what would have used it multiplies with PyTorch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch

from ..autotune_cache import directory

_SOURCE = Path(__file__).with_name("symmetric.cpp")
#: What PyTorch says of the processor (``ATEN_CPU_CAPABILITY`` overrides it): the compiler's flags.
_TARGETS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"),
}
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fopenmp",
    "-shared",
    "-fPIC",
)
_SECONDS = 120

_lock = threading.Lock()


class Absent(Exception):
    """Why there is no library here."""


def load() -> ctypes.CDLL | None:
    """The library; ``None`` where it cannot be had. The first call on a machine compiles it."""
    return _load()[0]


def why_absent() -> str:
    """Why :func:`load` gives nothing; empty if it gives the library."""
    return _load()[1]


def _load() -> tuple[ctypes.CDLL | None, str]:
    with _lock:
        return _load_once(os.environ.get("CXX") or "g++", torch.backends.cpu.get_cpu_capability())


@functools.lru_cache(maxsize=8)
def _load_once(compiler: str, capability: str) -> tuple[ctypes.CDLL | None, str]:
    try:
        return _open(compiler, capability), ""
    except Absent as reason:
        return None, str(reason)


def _open(compiler: str, capability: str) -> ctypes.CDLL:
    if os.name != "posix":
        raise Absent(f"not built on {os.name}")
    flags = _TARGETS.get(capability)
    if flags is None:
        raise Absent(
            f"PyTorch reports the processor as {capability}; written for {', '.join(_TARGETS)}"
        )
    command = (compiler, *_FLAGS, *flags)
    source = _SOURCE.read_bytes()
    key = hashlib.sha256(source + "\0".join(command).encode()).hexdigest()[:16]
    file = directory() / f"symmetric-{key}.so"
    if file.exists():
        with contextlib.suppress(OSError):  # damaged: built again
            return ctypes.CDLL(str(file))
    _build(command, file)
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise Absent(f"{file} cannot be loaded: {error}") from error


def _build(command: tuple[str, ...], file: Path) -> None:
    """Compile to ``file``; another process may do the same at the same time."""
    if shutil.which(command[0]) is None:
        raise Absent(f"no compiler {command[0]}")
    try:
        version = _run((command[0], "--version"))
        if "clang" in version.lower():
            # its OpenMP runtime beside PyTorch's would be a second set of threads
            raise Absent(f"{command[0]} is clang; GCC is needed")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            built = Path(folder) / file.name
            _run((*command, str(_SOURCE), "-o", str(built)))
            os.replace(built, file)
    except OSError as error:
        raise Absent(f"cannot write {file}: {error}") from error
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", "") or str(error)).strip()
        raise Absent(f"{command[0]} failed: {said[-500:]}") from error


def _run(command: tuple[str, ...]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
    return done.stdout
