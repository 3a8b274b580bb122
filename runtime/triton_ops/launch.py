"""What every family of kernel ops shares: registering, launching, falling back, checking arguments.

A kernel that cannot be compiled or launched (too little shared memory, a device or triton version it
does not work on) must not stop a model: the op then computes its formula in plain torch, with one
warning, and that configuration is not tried again in this process.
"""

from __future__ import annotations

import contextlib
import functools
import math
import typing
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.library import triton_op, wrap_triton
from triton.runtime.jit import JITFunction

from ...passes.warn import warn
from .. import kernel_failures
from ..lower_checks import NAMESPACE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Statistics of a row, as the kernels number them (0: the scale is given).
KINDS = {"rms": 1, "layer": 2, "crms": 3}
ROUNDING = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

HIP_STAGES = 2

_failed: dict[tuple, str] = {}
_warned: set[str] = set()
# not a context variable: backward passes run in threads of their own
_required = False


class KernelFailed(RuntimeError):
    """A kernel could not be compiled or launched."""


def op(fallback: Callable) -> Callable[[Callable], Any]:
    """Register a function as an op of its own name, its schema read from its annotations.

    Args:
        fallback: plain torch with the same arguments and results, for where the kernel fails.
    """

    def register(fn: Callable) -> Any:
        fn.__annotations__ = typing.get_type_hints(fn)

        @functools.wraps(fn)
        def body(*args: Any, **kwargs: Any) -> Any:
            try:
                return fn(*args, **kwargs)
            except KernelFailed as failure:
                if _required:
                    raise
                _warn_once(fn.__name__, failure)
                return fallback(*args, **kwargs)

        return triton_op(f"{NAMESPACE}::{fn.__name__}", body, mutates_args={})

    return register


@contextlib.contextmanager
def required() -> Iterator[None]:
    """Within it a kernel that fails raises :class:`KernelFailed`, no formula takes its place and nothing
    is kept for ``normfuse doctor``: whoever times a kernel wants the kernel."""
    global _required
    before, _required = _required, True
    try:
        yield
    finally:
        _required = before


def _warn_once(name: str, failure: KernelFailed) -> None:
    if name in _warned:
        return
    _warned.add(name)
    warn(f"normfuse's kernel op {name} runs as plain PyTorch instead: {failure}")


def failures() -> list[str]:
    """What could not be compiled or launched in this process, with the reasons."""
    return sorted(_failed.values())


def launch(
    kernel: Any, grid: tuple, on: Tensor, *, workspace: bool = False, **arguments: Any
) -> None:
    """Launch on ``on``'s device; as a graph node while tracing, directly under the interpreter.

    ``workspace``: the kernel makes tensor descriptors, which live in memory of the device.

    Raises:
        KernelFailed: it could not be compiled or launched.
    """
    if torch.version.hip is not None and "num_stages" in arguments:
        # 64 KiB of shared memory hold no deeper pipeline
        arguments["num_stages"] = min(arguments["num_stages"], HIP_STAGES)
    compiled = isinstance(kernel, JITFunction)
    if not compiled and isinstance(on, torch._subclasses.FakeTensor):
        return  # the interpreter has nothing to compute on, and nobody asks for its graph node
    wrapped = wrap_triton(kernel) if compiled else kernel
    if type(on) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        wrapped[grid](**arguments)
        return
    # what is compiled depends on dtypes and on compile-time arguments; those are in capitals
    options = [(k, v) for k, v in arguments.items() if (k.isupper() and len(k) > 1) or "num_" in k]
    dtypes = [v.dtype for v in arguments.values() if isinstance(v, Tensor)]
    key = (kernel.__name__, on.device, *dtypes, *options)
    if key in _failed:
        raise KernelFailed(_failed[key])
    try:
        with _device_of(on):
            if workspace and compiled:
                _give_workspace(on.device)
            wrapped[grid](**arguments)
    except (torch.OutOfMemoryError, KernelFailed):
        raise
    except Exception as error:
        text = f"{kernel.__name__} on {on.device}: {type(error).__name__}: {error}"
        _failed[key] = text.splitlines()[0]
        types = ", ".join(dict.fromkeys(str(d).removeprefix("torch.") for d in dtypes))
        settings = ", ".join(f"{k}={v}" for k, v in options)
        if not _required:
            kernel_failures.record(on.device, kernel.__name__, f"{types}; {settings}", str(error))
        raise KernelFailed(_failed[key]) from error


def _give_workspace(device: torch.device) -> None:
    """Let PyTorch's allocator provide what kernels ask for, unless the user chose another one.

    Triton keeps the choice in a context variable, which other threads (backward) do not share: hence
    at every launch. Compiled graphs do the same by themselves.
    """
    from triton.runtime import _allocation

    chosen = getattr(_allocation, "_allocator", None)
    chosen = chosen.get() if hasattr(chosen, "get") else chosen
    if chosen is not None and not isinstance(chosen, _allocation.NullAllocator):
        return

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=device)

    triton.set_allocator(allocate)


def _device_of(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def flat(x: Tensor) -> Tensor:
    """``[rows, d]``, also where one of the two is zero."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def rows_of(x: Tensor) -> Tensor:
    """``[rows, d]`` with unit stride in d; a copy only where strides do not allow it."""
    rows = flat(x)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def empty(x: Tensor) -> bool:
    return guard_or_false(x.numel() == 0)


def none_like(x: Tensor) -> Tensor:
    """Stands for an output that was not asked for."""
    return x.new_empty((0,))


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def check(x: Tensor, *vectors: Tensor | None) -> None:
    """Raises ``ValueError`` for dtypes and shapes no kernel takes."""
    if x.dtype not in DTYPES:
        raise ValueError(f"kernels take float16, bfloat16 and float32, not {x.dtype}")
    for v in vectors:
        if v is None:
            continue
        if v.dim() != 1 or v.dtype not in DTYPES:
            raise ValueError(
                f"gain and bias must be floating-point vectors, got {v.dtype} {v.shape}"
            )


def check_kind(kind: str) -> int:
    if kind not in KINDS:
        raise ValueError(f"no statistic is called {kind!r}; known: {', '.join(KINDS)}")
    return KINDS[kind]


def cast_order(
    gain: Tensor | None,
    bias: Tensor | None,
    norm_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> tuple[dict[str, Any], torch.dtype]:
    """Rounding codes of the kernels and the result's dtype, by torch's type promotion."""
    at_norm = norm_dtype or torch.float32
    at_gain = at_norm if gain is None else torch.promote_types(at_norm, gain.dtype)
    at_bias = at_gain if bias is None else torch.promote_types(at_gain, bias.dtype)
    codes = {
        "NORM_DT": ROUNDING[at_norm],
        "GAIN_DT": ROUNDING[at_gain],
        "BIAS_DT": ROUNDING[at_bias],
    }
    return codes, out_dtype or at_bias


def precision(dtype: torch.dtype) -> str:
    """How products of this dtype are computed: as PyTorch's own setting says."""
    # not get_float32_matmul_precision(): that raises once this newer setting was written
    fast = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if fast else "ieee"
