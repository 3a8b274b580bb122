"""Module paths and source lines as a person would write them, from what Dynamo and export record."""

from __future__ import annotations

import contextlib
import os
import re

import torch

_INDEX = re.compile(r"""\[(?:'([^']*)'|"([^"]*)"|(\d+))\]""")
_CONTAINERS = frozenset({"_modules", "_parameters", "_buffers"})


def clean_path(path: str) -> str:
    """``L['self'].transformer.h[0]._modules['ln_1']`` → ``transformer.h.0.ln_1``."""
    dotted = _INDEX.sub(lambda m: "." + next(g for g in m.groups() if g is not None), path)
    parts = [p for p in dotted.split(".") if p]
    if parts and parts[0] in ("L", "G"):
        parts = parts[2:]
    return ".".join(p for p in parts if p not in _CONTAINERS)


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep
_OWN_DIR = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_OWN_ROOMS = tuple(_OWN_DIR + room + os.sep for room in ("passes", "runtime", "optim"))


def user_frame(trace: str) -> str:
    """``file:line`` of the innermost frame that is neither torch's nor ours.

    Files below the current directory are given relative to it; library files by their package path.
    """
    frames = _FRAME.findall(trace)
    for file, line, _ in reversed(frames):
        if not file.startswith((_TORCH_DIR, *_OWN_ROOMS, "<")):
            return f"{_short_file(file)}:{line}"
    return f"{_short_file(frames[-1][0])}:{frames[-1][1]}" if frames else ""


def _short_file(file: str) -> str:
    for marker in ("site-packages" + os.sep, "dist-packages" + os.sep):
        if marker in file:
            return file.split(marker, 1)[1]
    with contextlib.suppress(ValueError):
        relative = os.path.relpath(file)
        if not relative.startswith(".."):
            return relative
    return file
