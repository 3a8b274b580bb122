"""Kernels under Triton's interpreter: imported by the ``check_*`` files, which run in a process of
their own with ``TRITON_INTERPRET=1`` (see ``test_interpreted.py``)."""

import os

import numpy as np
import torch
import triton.language as tl
from normfuse.passes import ops
from normfuse.runtime import triton_ops
from normfuse.runtime.triton_ops import launch
from triton.runtime import interpreter

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_interpreted.py"

__all__ = ["DTYPES", "KINDS", "check", "error", "formula", "triton_ops"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = tuple(triton_ops.KINDS)


def formula(kind, x, gain=None, bias=None, eps=1e-5, **casts):
    """The vocabulary's formula of a kind of norm."""
    if kind == "crms":
        return ops.crms_norm(x, gain, bias, eps, **casts)
    return (ops.layer_norm if kind == "layer" else ops.rms_norm)(x, [-1], gain, bias, eps, **casts)


# The interpreter of triton 3.7 keeps bfloat16 as bits (uint16). It truncates where hardware rounds to
# nearest even, and multiplies the bits as integers in dot. Both are set right here.
_Builder = interpreter.InterpreterBuilder
_plain_cast, _plain_dot = _Builder.cast_impl, _Builder.create_dot


def _widened(t):
    if t.dtype.scalar != tl.bfloat16:
        return t
    bits = t.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _cast(self, src, dst_type):
    if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
        return _widened(src)
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        values = np.ascontiguousarray(src.data)
        bits = values.view(np.uint32)
        rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(values), (bits >> 16) | 0x40, rounded)
        return interpreter.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)
    return _plain_cast(self, src, dst_type)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    return _plain_dot(self, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)


_Builder.cast_impl, _Builder.create_dot = _cast, _dot

# Every call of a helper inside a kernel makes triton replace all functions of ``triton.language`` anew,
# which takes longer than most helpers: once a launch is enough.
_plain_patch, _patched = interpreter._patch_lang, set()


def _patch_once(fn):
    modules = frozenset(name for name, m in fn.__globals__.items() if m in (tl, tl.core))
    if modules in _patched:
        return None
    scope, outermost = _plain_patch(fn), not _patched
    _patched.add(modules)
    if outermost:
        restore = scope.restore

        def closed():
            _patched.clear()
            restore()

        scope.restore = closed
    return scope


interpreter._patch_lang = _patch_once


def error(a: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest error over the rows that are finite in truth, relative to the largest number there."""
    assert a.shape == truth.shape, (a.shape, truth.shape)
    if a.numel() == 0:
        return 0.0
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isfinite(a) | ~finite, torch.ones_like(finite)), (
        "new infinities or NaN"
    )
    if not finite.any():
        return 0.0
    d = (a.double() - truth.double())[finite].abs().max().item()
    return d / max(truth.double()[finite].abs().max().item(), 1e-300)


def check(ours, eager, truth, *, slack=None, factor=1.5):
    """Our error against float64 is at most ``factor`` times eager's, plus ``slack``.

    ``slack`` (relative to the largest element) covers cases where eager happens to be exact.
    """
    mine, theirs = error(ours, truth), error(eager, truth)
    slack = 4 * torch.finfo(torch.float32).eps if slack is None else slack
    assert ours.dtype == eager.dtype, (ours.dtype, eager.dtype)
    assert mine <= factor * theirs + slack, f"error {mine:.3g}, eager {theirs:.3g}"


def _no_fallback(name, failure):
    raise AssertionError(f"{name} fell back to plain PyTorch: {failure}") from failure


# a kernel that fails must not pass these tests by its formula
plain_warn_once = launch._warn_once
launch._warn_once = _no_fallback
