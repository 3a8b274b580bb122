"""Builds a ``.cpp`` of this folder with the compiler at hand, once per machine, and loads it.

Without a compiler, or where the processor is not one it was written for, there is none: ``normfuse
doctor`` says why, and what would have used it computes with PyTorch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch

from ..autotune_cache import ENV, directory

#: Sources, each a library of its own, by the name of its file.
NAMES = ("gate", "symmetric")
_FOLDER = Path(__file__).parent
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


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # another thread may have held it
    os.register_at_fork(after_in_child=_new_lock)


class Absent(Exception):
    """Why there is no library here."""


def load(name: str) -> ctypes.CDLL | None:
    """The library; ``None`` where it cannot be had. The first call on a machine compiles it."""
    return _load(name)[0]


def why_absent(name: str) -> str:
    """Why :func:`load` gives nothing; empty if it gives the library."""
    return _load(name)[1]


def _load(name: str) -> tuple[ctypes.CDLL | None, str]:
    compiler, capability = os.environ.get("CXX") or "g++", torch.backends.cpu.get_cpu_capability()
    with _lock:
        return _load_once(name, compiler, capability)


@functools.lru_cache(maxsize=8)
def _load_once(name: str, compiler: str, capability: str) -> tuple[ctypes.CDLL | None, str]:
    try:
        return _open(name, compiler, capability), ""
    except Absent as reason:
        return None, str(reason)
    except (OSError, RuntimeError, ValueError) as error:  # a folder that is not there, or not ours
        return None, f"{type(error).__name__}: {error}; ${ENV} may name another folder"


def _open(name: str, compiler: str, capability: str) -> ctypes.CDLL:
    if os.name != "posix":
        raise Absent(f"not built on {os.name}")
    flags = _TARGETS.get(capability)
    if flags is None:
        raise Absent(
            f"PyTorch reports the processor as {capability}; written for {', '.join(_TARGETS)}"
        )
    program = tuple(shlex.split(compiler))
    command = (*program, *_FLAGS, *flags)
    source = _FOLDER / f"{name}.cpp"
    text = b"".join(file.read_bytes() for file in (source, *sorted(_FOLDER.glob("*.h"))))
    key = hashlib.sha256(text + "\0".join(command).encode()).hexdigest()[:16]
    folder = directory().resolve()
    for file in folder.glob(f"{name}-{key}-*.so"):
        # a file cut short is mapped all the same, and kills the process when it is read
        if file.stem.endswith(f"-{file.stat().st_size}"):
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(file))
    return ctypes.CDLL(str(_build(program, (*command, str(source)), folder, f"{name}-{key}")))


def _build(program: tuple[str, ...], command: tuple[str, ...], folder: Path, stem: str) -> Path:
    """Compile into ``folder``; another process may do the same at the same time."""
    if not program or shutil.which(program[0]) is None:
        raise Absent(f"no compiler {program[0] if program else ''}")
    try:
        if "clang" in _run((*program, "--version")).lower():
            # its OpenMP runtime beside PyTorch's would be a second set of threads
            raise Absent(f"{program[0]} is clang; GCC is needed")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            built = Path(place) / "built.so"
            _run((*command, "-o", str(built)))
            with built.open("rb") as file:
                os.fsync(file.fileno())
            # its size is in its name: see above
            kept = folder / f"{stem}-{built.stat().st_size}.so"
            os.replace(built, kept)
            return kept
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", "") or str(error)).strip()
        raise Absent(f"{program[0]} failed: {said[-500:]}") from error


def _run(command: tuple[str, ...]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=True, timeout=_SECONDS
    )
    return done.stdout
