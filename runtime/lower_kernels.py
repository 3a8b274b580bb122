"""Vocabulary ops to kernel ops on CUDA and ROCm: a graph pass that runs before ``lower.expand``.

What it leaves (another device, no triton, a cast order or layout no kernel takes, a site the cost
model declines) ``expand`` turns into plain ATen, which Inductor fuses. Every decision has a reason.

A kernel is a fusion barrier to Inductor, and Inductor writes good norms. So a plain norm stays with it
unless the tuned plans on disk hold a measurement of that shape where ours was faster; sites whose
algebra Inductor cannot reach (a row scale behind a product, a gated norm) go by the cost model.
"""

from __future__ import annotations

import functools
import importlib.util
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..passes import cost, ir
from ..passes.errors import Refuse
from ..passes.warn import warn
from . import devices, lower_checks
from .lower_checks import (
    KINDS,
    MEASURED,
    Lowering,
    Plan,
    ask,
    casts,
    emit_before,
    float32_statistic,
    last_dim,
    lower_each,
    measured,
    replace_pair,
    replace_single,
    same_layout,
    take,
    tensor,
    vector,
)
from .lower_products import lower_products

aten = torch.ops.aten
nf = torch.ops.normfuse


@functools.cache
def kernels() -> Any:
    """``torch.ops.normfuse_kernels`` with all ops registered; ``None`` without a working triton."""
    if importlib.util.find_spec("triton") is None:
        warn("normfuse's GPU kernels are not used: triton is not installed")
        return None
    try:
        from . import triton_ops  # noqa: F401
    except Exception as error:
        warn(f"normfuse's GPU kernels are not used: {type(error).__name__}: {error}")
        return None
    return torch.ops.normfuse_kernels


@functools.cache
def kernels_for(device: torch.device) -> Any:
    """:func:`kernels` if they can run on ``device``, else ``None`` (with one warning)."""
    problem = devices.unsupported(device)
    if problem is not None:
        warn(f"normfuse's GPU kernels are not used: {problem}")
        return None
    return kernels()


def summary(done: Sequence[Lowering]) -> list[str]:
    """What became of the sites, one line per kernel and reason, for a report's notes."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for entry in done:
        groups.setdefault((entry.kernel, entry.op, entry.reason), []).append(entry.key)
    lines = []
    for (kernel, op, reason), keys in groups.items():
        where = keys[0] if len(keys) == 1 else f"{len(keys)} sites ({keys[0]}…)"
        what = f"kernel {kernel} at" if kernel else f"{op} without a kernel at"
        lines.append(f"{what} {where}: {reason}")
    return lines


def lower_to_kernels(
    gm: fx.GraphModule,
    device: torch.device | str,
    *,
    policy: str = "pays",
    model: devices.Device | None = None,
) -> list[Lowering]:
    """Replace the vocabulary ops of ``gm`` that deserve a kernel, in place.

    Args:
        device: where the graph runs; anything but ``cuda`` (ROCm included) changes nothing.
        policy: ``"pays"`` asks the cost model; ``"always"`` lowers whatever a kernel can compute.
        model: the cost model's device, by default looked up from ``device``.
    """
    device = torch.device(device)
    if device.type != lower_checks.DEVICE:
        return []
    nk = kernels_for(device)
    if nk is None:
        return []
    if model is None:
        model = devices.find(device)
    # products first: a statistic that moves into a product needs no kernel of its own
    out = lower_products(gm, nk, model, policy)
    ir.erase_dead(gm)
    given = {"nk": nk, "model": model, "policy": policy}
    out += lower_each(gm, {op: functools.partial(plan, **given) for op, plan in _PLANS.items()})
    if any(entry.kernel for entry in out):
        ir.erase_dead(gm)
        gm.recompile()
    return out


# --- one function per vocabulary op: check, decide, return (kernel, reason, commit) ----------------


def _measured(kernel: str, x: torch.Tensor, policy: str) -> str:
    """Plain norms: only where asked for, or where a measurement on this device says so."""
    if policy == "always":
        return "asked for"
    d = cost.hint(x.shape[-1])
    if measured(kernel, x, x.dtype, (cost.hint(x.numel()) // max(d, 1), d)) is None:
        raise Refuse("Inductor's own norm is kept: no measurement on this device says otherwise")
    return MEASURED


def _arguments(node: fx.Node, args: ir.NormArgs, x: Any, normed: Any) -> tuple:
    """What a norm kernel takes behind its inputs, once it is known to do what the op says.

    ``normed`` is what the statistic is taken of: the input, or its sum with the residual.
    """
    last_dim(args, x)
    float32_statistic(args, normed)
    casts(args)
    vector(args.gain, "the gain", x.shape[-1])
    vector(args.bias, "the bias", x.shape[-1])
    same_layout(node)
    kind = KINDS[node.target]
    return args.gain, args.bias, args.eps, kind, args.norm_dtype, args.out_dtype


def _norm(node: fx.Node, nk: Any, model: Any, policy: str) -> Plan:
    args = ir.NormArgs(node)
    x = tensor(args.x, "the input")
    rest = _arguments(node, args, x, x)
    reason = _measured("norm", x, policy)
    return "norm", reason, lambda: replace_single(node, nk.norm.default, args.x, *rest)


def _add_norm(node: fx.Node, nk: Any, model: Any, policy: str) -> Plan:
    args = ir.NormArgs(node)
    x, residual = tensor(args.x, "the input"), tensor(args.residual, "the residual")
    if not ir.same_shape(x.shape, residual.shape):
        raise Refuse("the residual is broadcast")
    if any(u.target is not operator.getitem for u in node.users):
        raise Refuse("the pair of results is used as a whole")
    rest = _arguments(node, args, x, ir.val(node)[1])
    reason = _measured("add_norm", x, policy)
    return (
        "add_norm",
        reason,
        lambda: replace_pair(node, nk.add_norm.default, args.x, args.residual, *rest),
    )


def _gated(node: fx.Node, nk: Any, model: Any, policy: str) -> Plan:
    from .triton_ops import MAX_RANK

    args = ir.NormArgs(node)
    x = tensor(args.x, "the input")
    down, up = tensor(args.down, "the gate's down weight"), tensor(args.up, "its up weight")
    last_dim(args, x)
    float32_statistic(args, x)
    casts(args)
    vector(args.gain, "the gain", x.shape[-1])
    vector(args.bias, "the bias", x.shape[-1])
    if down.dim() != 2 or up.dim() != 2 or cost.hint(down.shape[0]) > MAX_RANK:
        raise Refuse(f"the gate's rank is over {MAX_RANK}")
    same_layout(node)
    d = cost.hint(x.shape[-1])
    rows = cost.hint(x.numel()) // max(d, 1)
    rank = cost.hint(down.shape[0])
    if policy != "always" and measured("gated_norm", x, x.dtype, (rows, d, rank)):
        reason = MEASURED
    else:
        reason = ask(policy, model, lambda m: devices.gated(m, rows, d, rank, x.element_size()))
    rest = (args.gain, args.bias, args.down, args.up, args.eps, args.gate_scale)
    rest = (*rest, args.norm_dtype, args.out_dtype)
    return (
        "gated_norm",
        reason,
        lambda: replace_single(node, nk.gated_norm.default, args.x, *rest),
    )


def _row_rstd(node: fx.Node, nk: Any, model: Any, policy: str) -> Plan:
    args = ir.NormArgs(node)
    x = tensor(args.x, "the input")
    last_dim(args, x)
    float32_statistic(args, x)
    same_layout(node)
    add = args.x
    alone = _measured("row_rstd", x, policy)
    if not ir.is_call(add, aten.add.Tensor) or add.kwargs or add.meta.get("mutated"):
        return (
            "row_rstd",
            alone,
            lambda: ir.replace(node, emit_before(node, nk.row_rstd.default, add, args.eps)),
        )

    # the sum that is measured is written by the same kernel
    operands = [tensor(a, "an operand of the residual add") for a in add.args[:2]]
    if any(not ir.same_shape(v.shape, x.shape) for v in operands):
        raise Refuse("the residual add broadcasts an operand")
    same_layout(add)

    def commit() -> None:
        both = emit_before(add, nk.add_row_rstd.default, *add.args[:2], args.eps)
        ir.replace(node, take(add, both, 0))
        ir.replace(add, take(add, both, 1))

    return "add_row_rstd", alone, commit


_PLANS: dict[Any, Callable[..., Plan]] = {
    nf.layer_norm.default: _norm,
    nf.rms_norm.default: _norm,
    nf.crms_norm.default: _norm,
    nf.add_layer_norm.default: _add_norm,
    nf.add_rms_norm.default: _add_norm,
    nf.gated_rms_norm.default: _gated,
    nf.row_rstd.default: _row_rstd,
}
