"""Newton–Schulz products on GPUs by our Triton kernels, and where these and our C++ on CPUs are used.

A kernel computes half of a symmetric product and adds ``b·A`` or ``a·X`` where it stores; batched
library products compute all of it and copy the addend first. Which is faster is predicted from the
device's data sheet, unless ``benchmarks/newton_schulz.py --tune`` has measured it there.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from ..runtime import autotune_cache, cpp, devices
from ..runtime.kernels import plans

ENV = "NORMFUSE_SYMMETRIC_KERNELS"
POLICIES = ("auto", "always", "never")

#: Shorter sides from which ``auto`` considers kernels.
KERNELS_FROM = 256
#: Shorter sides from which our C++ multiplies faster than a library does twice the FLOPs.
NATIVE_FROM = 64
#: What a symmetric kernel is assumed to reach of the device's peak, by tile; a library product 0.95.
_EFFICIENCY = {128: 0.7, 64: 0.45}
_LIBRARY = 0.95
#: How much faster it must be promised to be.
_MARGIN = 1.03

_chosen: ContextVar[str | None] = ContextVar("symmetric kernels", default=None)


def policy() -> str:
    """``auto``, ``always`` or ``never``: what :func:`kernels` or the environment says."""
    found = _chosen.get() or os.environ.get(ENV) or "auto"
    if found not in POLICIES:
        raise ValueError(f"{ENV} must be one of {', '.join(POLICIES)}, not {found!r}")
    return found


@contextlib.contextmanager
def kernels(choice: str) -> Iterator[None]:
    """Within it, symmetric products on GPUs go through our kernels ``"always"``, ``"never"``, or
    (``"auto"``) where they are predicted or were measured to be faster."""
    if choice not in POLICIES:
        raise ValueError(f"kernels must be one of {', '.join(POLICIES)}, not {choice!r}")
    token = _chosen.set(choice)
    try:
        yield
    finally:
        _chosen.reset(token)


@lru_cache(maxsize=1)
def _ops() -> Any:
    """The kernels as operators; None without triton."""
    try:
        from ..runtime.triton_ops import symmetric
    except ImportError:
        return None
    return symmetric


@dataclass(frozen=True)
class KernelProducts:
    """Products of a batch, by our kernels where the flags say so.

    They make new tensors, so that a compiler sees a functional graph: ``out`` is not used.
    ``share`` is what a symmetric product costs of a library's whole one.
    """

    by_gram: bool
    by_symmetric: bool
    by_apply: bool
    share: float = 1.0

    @staticmethod
    def room(name: str, shape: Sequence[int], like: Tensor) -> None:
        return None

    def gram(self, x: Tensor, tall: bool, out: Tensor | None) -> Tensor:
        x = x.mT if tall else x
        if self.by_gram:
            return _ops().symmetric_product(x, x, None, 1.0, 0.0)
        return torch.bmm(x, x.mT)

    def symmetric(
        self, s: Tensor, t: Tensor, base: Tensor, beta: float, alpha: float, out: Tensor | None
    ) -> Tensor:
        if self.by_symmetric:
            return _ops().symmetric_product(s, t, base, alpha, beta)
        return torch.baddbmm(base, s, t, beta=beta, alpha=alpha)

    def apply(self, x: Tensor, b: Tensor, a: float, tall: bool, out: Tensor | None) -> Tensor:
        left, right = (x, b) if tall else (b, x)
        if a == 0.0:  # a plain product: nothing to spare
            return torch.bmm(left, right)
        if self.by_apply:
            # rows of b, where they are its columns bit for bit
            exact = self.by_gram and self.by_symmetric
            return _ops().add_product(left, (b if exact else b.mT) if tall else x.mT, x, 1.0, a)
        return torch.baddbmm(x, left, right, beta=a)

    @staticmethod
    def plus_identity(z: Tensor, a: float, out: Tensor | None) -> Tensor:
        eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        return torch.add(z, eye, alpha=a)


def choose(
    batch: int, rows: int, cols: int, dtype: torch.dtype, device: torch.device
) -> KernelProducts | None:
    """Which products of ``batch`` matrices go through kernels; None where none does."""
    wanted = policy()
    ops = None if wanted == "never" else _ops()
    if ops is None or not ops.runs(dtype, device) or min(batch, rows, cols) == 0:
        return None
    tf32 = ops.is_tf32(dtype)
    m, n = min(rows, cols), max(rows, cols)
    if wanted == "always":
        flags = (True, True, True)
    else:
        model = devices.find(device)
        if model is None or m < KERNELS_FROM:
            return None
        flags = tuple(
            _faster(kind, batch, m, n, dtype, device, model, tf32)
            for kind in ("gram", "symmetric", "apply")
        )
    if not any(flags):
        return None
    plan = plans.symmetric(batch, m, dtype.itemsize, devices.processors(device), tf32=tf32)
    whole = math.ceil(m / plan.block) ** 2
    slower = _LIBRARY / _efficiency(plan.block, dtype, tf32)
    share = min(1.0, plan.tiles(m) / whole * slower) if flags[0] and flags[1] else 1.0
    return KernelProducts(*flags, share)


def native(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of CPU matrices of this shape go through our C++ (built when first asked for)."""
    if policy() == "never" or device.type != "cpu" or min(rows, cols) < NATIVE_FROM:
        return False
    return cpp.runs(dtype, device)


def are_in(graph: fx.GraphModule) -> bool:
    """Whether a traced graph multiplies with our kernels."""
    return any("normfuse_kernels" in str(n.target) for n in graph.graph.nodes)


def verdict_name(kind: str, m: int, n: int) -> str:
    """What a measurement of a product of matrices ``m×n`` (``m <= n``) is kept under."""
    return f"newton-schulz {kind} {m}x{m if kind == 'symmetric' else n}"


def _efficiency(block: int, dtype: torch.dtype, tf32: bool) -> float:
    exact = dtype == torch.float32 and not tf32
    return 0.5 if exact else _EFFICIENCY[block]


def _faster(
    kind: str,
    batch: int,
    m: int,
    n: int,
    dtype: torch.dtype,
    device: torch.device,
    model: devices.Device,
    tf32: bool,
) -> bool:
    """Measured, if it was; else predicted, with every doubt against our kernel."""
    found = autotune_cache.verdict(device, verdict_name(kind, m, n), dtype, (batch, m))
    if found is not None:
        return bool(found["faster"])
    ours, library = predicted(kind, batch, m, n, dtype.itemsize, model, tf32)
    return ours * _MARGIN <= library


def predicted(
    kind: str, batch: int, m: int, n: int, itemsize: int, model: devices.Device, tf32: bool = False
) -> tuple[float, float]:
    """Seconds of our kernel and of a library product, by arithmetic on the device's data sheet.

    Ours runs in whole waves of tiles. A library product is taken to fill the device whatever its
    size; copying its addend (``baddbmm`` copies it into the result) counts half.
    """
    dtype = torch.float32 if itemsize > 2 else torch.bfloat16
    peak = model.flops if itemsize == 2 else model.flops / 2 if tf32 else model.flops32
    stream = 0.85 * model.bandwidth
    width, depth = (n, m) if kind == "apply" else (m, n if kind == "gram" else m)
    if kind == "apply":
        tiling = plans.addend(m, n, itemsize, tf32=tf32)
        tiles = batch * math.ceil(m / tiling.block_m) * math.ceil(n / tiling.block_n)
        block, area = min(tiling.block_m, tiling.block_n), tiling.block_m * tiling.block_n
    else:
        square = plans.symmetric(batch, m, itemsize, model.processors, tf32=tf32)
        tiles, block, area = batch * square.tiles(m), square.block, square.block**2
    rate = peak * _efficiency(block, dtype, tf32) / model.processors
    ours = math.ceil(tiles / model.processors) * 2.0 * area * depth / rate
    library = 2.0 * batch * m * width * depth / (peak * _LIBRARY)
    read = {"gram": m * n, "symmetric": m * m, "apply": m * m + m * n}[kind]
    moved = batch * itemsize * (read + m * width) / stream
    copied = 0.0
    if kind != "gram":
        copied = 0.5 * (2 * batch * itemsize * m * width / stream + model.launch)
    return max(ours, moved) + model.launch, max(library, moved) + model.launch + copied
