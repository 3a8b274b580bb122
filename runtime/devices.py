"""What devices can do, and what that says about a site: Inductor's own fusion or one of our kernels.

The table holds vendors' data sheets, not measurements. ``efficiency`` numbers are assumptions, made
so that an unmeasured kernel is declined where being wrong would cost time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .kernels import plans


@dataclass(frozen=True)
class Device:
    """Peak numbers of one GPU.

    Attributes:
        bandwidth: bytes per second to memory.
        flops: dense bfloat16 tensor FLOPs per second.
        flops32: float32 FLOPs per second without tensor cores.
        processors: streaming multiprocessors or compute units.
        cache: bytes of last-level cache.
        launch: seconds a dependent kernel costs at least, in a CUDA graph.
    """

    name: str
    bandwidth: float
    flops: float
    flops32: float
    processors: int
    cache: int
    launch: float = 2e-6


TABLE = (
    Device("A100", 2.04e12, 312e12, 19.5e12, 108, 40 << 20),
    Device("H200", 4.8e12, 989e12, 67e12, 132, 50 << 20),
    Device("H100", 3.35e12, 989e12, 67e12, 132, 50 << 20),
    Device("B200", 8.0e12, 2250e12, 75e12, 148, 126 << 20),
    Device("MI300", 5.3e12, 1307e12, 163e12, 304, 256 << 20),
)

#: What a Triton product is assumed to reach of a vendor library's speed where FLOPs bound it.
_PRODUCT_EFFICIENCY = 0.7
#: What is assumed of bandwidth where bytes bound it (both sides).
_STREAM_EFFICIENCY = 0.85
#: A kernel must promise at least this factor to replace what Inductor does by itself.
_MARGIN = 1.03

_DEFAULT_PROCESSORS = 132


@functools.cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def processors(device: torch.device) -> int:
    """Number of multiprocessors; that of the table's default when the device is not there."""
    if device.type == "cuda" and torch.cuda.is_available():
        index = device.index if device.index is not None else torch.cuda.current_device()
        return _properties(index).multi_processor_count
    return _DEFAULT_PROCESSORS


def unsupported(device: torch.device) -> str | None:
    """Why no kernel can run on a device that is here; ``None`` if they can."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    index = device.index if device.index is not None else torch.cuda.current_device()
    found = _properties(index)
    if found.major >= 8:
        return None
    return f"{found.name} has compute capability {found.major}.{found.minor}, they need 8.0"


@functools.cache
def descriptors(device: torch.device) -> bool:
    """Whether kernels can load tiles by tensor descriptors: the hardware, and this triton."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return False
    if not hasattr(tl, "make_tensor_descriptor") or not hasattr(triton, "set_allocator"):
        return False
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _properties(index).major >= 9


def find(device: torch.device | str) -> Device | None:
    """The table's row for a device, ``None`` for one we know nothing about."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    index = device.index if device.index is not None else torch.cuda.current_device()
    return by_name(_properties(index).name)


def by_name(name: str) -> Device | None:
    return next((d for d in TABLE if d.name in name), None)


@dataclass(frozen=True)
class Decision:
    """Whether a site gets a kernel, and why."""

    use: bool
    reason: str
    kernel_seconds: float = 0.0
    inductor_seconds: float = 0.0


def _decide(device: Device, ours: float, theirs: float, what: str) -> Decision:
    use = ours * _MARGIN <= theirs
    verdict = "predicted faster" if use else "not predicted faster"
    return Decision(
        use,
        f"{what} {verdict} on {device.name}: {ours * 1e6:.1f} µs against {theirs * 1e6:.1f} µs",
        ours,
        theirs,
    )


@dataclass(frozen=True)
class Layer:
    """A linear layer of ``n`` results: ``dual`` takes two weights, ``epilogue`` means an activation."""

    n: int
    dual: bool = False
    epilogue: bool = False


def norm_linear(
    device: Device,
    m: int,
    k: int,
    itemsize: int,
    layers: Sequence[Layer],
    x_itemsize: int | None = None,
    *,
    deferred: bool = False,
) -> Decision:
    """One-product norm + linear for all readers of a norm, against what Inductor does.

    ``itemsize`` is that of the weights, ``x_itemsize`` that of the rows where it is another: Inductor
    then writes the rows once more in any case, ours reads the wider (or narrower) ones.

    That is a norm (or, ``deferred``, a row statistic), library products, and a kernel behind each
    that has something left to do: a row scale, an activation. Inductor's own templates, under
    max-autotune, can spare the latter, so it counts half: the pessimistic side for us.
    """
    peak = device.flops if itemsize == 2 else device.flops32
    stream = device.bandwidth * _STREAM_EFFICIENCY
    ours = 0.0
    x_itemsize = x_itemsize or itemsize
    written = 0 if deferred and x_itemsize == itemsize else itemsize
    theirs = device.launch + m * k * (x_itemsize + written) / stream
    for layer in layers:
        wide = layer.n * (2 if layer.dual else 1)
        flops = 2.0 * m * wide * k
        weights = wide * k * itemsize
        read, our_read = m * k * itemsize + weights, m * k * x_itemsize + weights
        moved = our_read + m * layer.n * itemsize
        ours += max(moved / stream, flops / (peak * _PRODUCT_EFFICIENCY))
        plan = plans.gemm(m, layer.n, k, itemsize, device.processors, dual=layer.dual)
        ours += device.launch * (2 if plan.splits > 1 else 1)
        theirs += max((read + m * wide * itemsize) / stream, flops / (peak * 0.95)) + device.launch
        if deferred or layer.epilogue:
            theirs += 0.5 * (m * (wide + layer.n) * itemsize / stream + device.launch)
    return _decide(device, ours, theirs, "norm and linear in one product")


def gated(device: Device, rows: int, d: int, rank: int, itemsize: int) -> Decision:
    """Fused gated norm against a norm, two thin products and two pointwise kernels."""
    stream = device.bandwidth * _STREAM_EFFICIENCY
    row = rows * d * itemsize
    weights = 2 * d * rank * itemsize
    flops = 4.0 * rows * d * rank / ((device.flops if itemsize == 2 else device.flops32) * 0.25)
    # programs of 16 rows: few of them leave most of the device idle
    busy = min(rows / 16, device.processors) / device.processors
    ours = max((2 * row + weights) / (stream * max(busy, 1e-3)), flops) + device.launch
    theirs = (2 * row + row + row + 3 * row + weights) / stream + 5 * device.launch
    return _decide(device, ours, theirs, "gated norm in one kernel")
