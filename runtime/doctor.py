"""What is installed, and what normfuse will use of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Finding:
    """One line of the examination.

    Attributes:
        what: subject.
        state: what was found.
        ok: ``True``, ``False`` (a problem) or ``None`` (optional and absent).
        advice: what it means, or what to do.
    """

    what: str
    state: str
    ok: bool | None = True
    advice: str = ""


@dataclass
class Diagnosis:
    """Everything ``normfuse doctor`` prints."""

    findings: list[Finding] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return all(f.ok is not False for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        from dataclasses import asdict

        return {**asdict(self), "healthy": self.healthy}


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine(try_it: bool = False) -> Diagnosis:
    """Look around; with ``try_it``, compile and run a small model through the backend."""
    import torch

    from . import autotune_cache

    d = Diagnosis()
    add = d.findings.append
    add(Finding("normfuse", version("normfuse") or "not installed (running from a folder)"))
    add(Finding("python", platform.python_version()))
    plans = autotune_cache.describe()
    state = f"{plans['plans']} plans in {plans['files']} files"
    add(Finding("tuned kernels", state, True if plans["plans"] else None, plans["directory"]))
    d.findings.extend(_failed_kernels())
    add(_torch())
    triton = version("triton")
    cuda = torch.cuda.is_available()
    if triton and cuda:
        add(Finding("triton", triton, True, "GPU kernels available"))
    elif triton:
        add(Finding("triton", triton, True, "not used without a GPU"))
    else:
        add(Finding("triton", "absent", None if not cuda else False, "only GPU kernels need it"))
    transformers = version("transformers")
    add(
        Finding(
            "transformers",
            transformers or "absent",
            True if transformers else None,
            "" if transformers else "only needed for its models: pip install 'normfuse[models]'",
        )
    )
    add(_inductor())
    add(_compiler())
    d.findings.extend(_cpp())
    add(_device())
    add(_backend())
    d.findings.extend(_switches())
    d.passes = _passes()
    if try_it:
        add(_trial())
    return d


def _failed_kernels() -> list[Finding]:
    """What could not be compiled or launched, in whichever process."""
    import torch

    from . import autotune_cache, kernel_failures

    found = kernel_failures.known()
    if not found:
        return [Finding("failed kernels", "none on record")]
    out = [
        Finding(
            "failed kernels",
            f"{len(found)} on record",
            None,
            "their formulas run instead; `normfuse doctor --clear` forgets them",
        )
    ]
    now = autotune_cache.header(torch.device("cpu"))
    for entry in found:
        older = any(entry[k] != now[k] for k in ("triton", "kernels"))
        where = f"{entry['device']}, triton {entry['triton']}"
        times = "once" if entry["times"] == "1" else f"{entry['times']} times"
        seen = f"{times}, last {entry['last']}{', by another version' if older else ''}"
        out.append(
            Finding(
                f"  {entry['kernel']}",
                entry["reason"],
                None,
                "; ".join(t for t in (where, entry["configuration"], seen) if t),
            )
        )
    return out


def _torch() -> Finding:
    import torch

    numbers = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
    tested = (2, 11) <= numbers <= (2, 13)
    return Finding("torch", torch.__version__, tested, "" if tested else "tested with 2.11 to 2.13")


def _cpp() -> list[Finding]:
    import torch

    from .cpp import library

    capability = torch.backends.cpu.get_cpu_capability()
    out = []
    for name, what in (("symmetric", "symmetric products on CPUs"), ("gate", "gates on CPUs")):
        if reason := library.why_absent(name):
            out.append(Finding(what, "PyTorch's", None, reason))
        else:
            out.append(Finding(what, f"C++ for {capability}"))
    return out


def _inductor() -> Finding:
    try:
        import torch._inductor.compile_fx
        import torch._inductor.config  # noqa: F401
    except Exception as error:
        return Finding("Inductor", f"{type(error).__name__}: {error}", False)
    caches = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return Finding("Inductor", "found", True, f"caches in {caches}" if caches else "")


def _compiler() -> Finding:
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        return Finding("C++ compiler", str(get_cpp_compiler()))
    except Exception as error:
        text = str(error).strip().splitlines()
        return Finding(
            "C++ compiler",
            text[0] if text else type(error).__name__,
            False,
            "Inductor needs one for CPU code: install g++ or clang",
        )


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        major, minor = torch.cuda.get_device_capability()
        return Finding("device", ", ".join(names), True, f"compute capability {major}.{minor}")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return Finding("device", "xpu", None, "norms are left to Inductor's own kernels")
    from .measure import _cpu_name

    return Finding("device", f"cpu: {_cpu_name()}", True, f"{torch.get_num_threads()} threads")


def _backend() -> Finding:
    import torch._dynamo

    points = importlib.metadata.entry_points(group="torch_dynamo_backends")
    ours = [p for p in points if p.name == "normfuse"]
    listed = "normfuse" in torch._dynamo.list_backends(exclude_tags=())
    if ours and listed:
        return Finding('backend="normfuse"', "registered by entry point", True, ours[0].value)
    return Finding(
        'backend="normfuse"',
        "not registered",
        False,
        "install the package (pip install .): torch.compile finds backends by entry point",
    )


def _switches() -> list[Finding]:
    from ..passes.contract import FUEL_ENV
    from ..passes.manager import DISABLE_ENV, disabled_by_environment, registry

    out = []
    unknown = sorted(disabled_by_environment() - set(registry()))
    value = os.environ.get(DISABLE_ENV)
    advice = f"no such pass: {', '.join(unknown)}" if unknown else "passes to switch off"
    out.append(Finding(DISABLE_ENV, value or "not set", not unknown, advice))
    fuel = os.environ.get(FUEL_ENV)
    legal = fuel is None or fuel.isdigit() or not fuel
    advice = "number of site rewrites allowed" if legal else "must be a whole number"
    out.append(Finding(FUEL_ENV, fuel or "not set", legal, advice))
    return out


def _passes() -> list[dict[str, Any]]:
    from ..passes.manager import disabled_by_environment, registry
    from ..passes.presets import PRESETS

    off = disabled_by_environment()
    return [
        {
            "name": name,
            "promise": cls.promise,
            "presets": [p for p, names in PRESETS.items() if name in names],
            "on": name not in off,
            "what": ((cls.__doc__ or "").strip().splitlines() or [""])[0],
        }
        for name, cls in registry().items()
    ]


def _trial() -> Finding:
    """Compile a norm and a linear through the backend and compare with eager."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)).eval()
    x = torch.randn(3, 16)
    try:
        with torch.no_grad():
            fast = torch.compile(model, backend="normfuse", options={"strict": True})
            error = (fast(x) - model(x)).abs().max().item()
    except Exception as failure:
        text = f"{type(failure).__name__}: {failure}".splitlines()[0]
        return Finding("trial compilation", text, False)
    return Finding("trial compilation", f"max |difference| {error:.1e}", error < 1e-4)
