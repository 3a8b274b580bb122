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
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..passes import cost, ir
from ..passes.errors import Refuse
from . import devices

aten = torch.ops.aten
nf = torch.ops.normfuse

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Lowering:
    """What became of one vocabulary node: the kernel's name (``""``: left to Inductor) and why."""

    key: str
    op: str
    kernel: str
    reason: str


@functools.cache
def kernels() -> Any:
    """``torch.ops.normfuse_kernels`` with all ops registered; ``None`` without a working triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from . import triton_ops  # noqa: F401
    except Exception as error:
        warnings.warn(
            f"normfuse's GPU kernels are not used: {type(error).__name__}: {error}", stacklevel=2
        )
        return None
    return torch.ops.normfuse_kernels


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
    if device.type != "cuda":
        return []
    nk = kernels()
    if nk is None:
        return []
    if model is None:
        model = devices.find(device)
    out = []
    for node in list(gm.graph.nodes):
        plan = _PLANS.get(node.target) if node.op == "call_function" else None
        if plan is None or node._erased:
            continue
        key = node.meta.get("site", node.name)
        name = node.target._schema.name.split("::")[1]
        try:
            kernel, reason, commit = plan(node, nk, model, policy)
        except Refuse as refusal:
            out.append(Lowering(key, name, "", refusal.reason))
            continue
        commit()
        out.append(Lowering(key, name, kernel, reason))
    if any(entry.kernel for entry in out):
        ir.erase_dead(gm)
        gm.recompile()
    return out


# --- preconditions ---------------------------------------------------------------------------------


def _tensor(node: Any, what: str) -> torch.Tensor:
    v = ir.val(node)
    if not isinstance(v, torch.Tensor):
        raise Refuse(f"{what} is not a tensor")
    if v.device.type != "cuda":
        raise Refuse(f"{what} is on {v.device.type}")
    if v.dtype not in _DTYPES:
        raise Refuse(f"{what} is {v.dtype}; kernels take float16, bfloat16 and float32")
    return v


def _vector(node: Any, what: str, size: Any) -> None:
    if node is None:
        return
    v = _tensor(node, what)
    if v.dim() != 1 or not ir.same_dim(v.shape[0], size):
        raise Refuse(f"{what} has shape {tuple(v.shape)}, not one number per feature")


def _float32_statistic(args: Any, x: torch.Tensor) -> None:
    if (args.stat_dtype or x.dtype) != torch.float32:
        raise Refuse(f"the statistic is taken in {args.stat_dtype or x.dtype}, kernels use float32")


def _last_dim(args: Any, x: torch.Tensor) -> None:
    if list(args.dims) != [-1] or x.dim() < 1:
        raise Refuse(f"normalizes over dims {list(args.dims)}; kernels take the last one")


def _casts(args: Any) -> None:
    for dtype in (args.norm_dtype, args.out_dtype):
        if dtype is not None and dtype not in _DTYPES:
            raise Refuse(f"rounds to {dtype}")


def _same_layout(node: fx.Node) -> None:
    """Kernels write contiguous results; a later view may rely on another layout."""
    values = ir.val(node)
    for v in values if isinstance(values, (tuple, list)) else (values,):
        if not v.is_contiguous():
            raise Refuse("the result is not laid out contiguously")


# --- rewriting -------------------------------------------------------------------------------------


def _emit(node: fx.Node, target: Any, *args: Any) -> fx.Node:
    with node.graph.inserting_before(node):
        new = ir.emit(node.graph, target, *args, like=node)
    ir.inherit(new, node, site=True)
    return new


def _take(node: fx.Node, source: fx.Node, index: int) -> fx.Node:
    with node.graph.inserting_before(node):
        return ir.emit(node.graph, operator.getitem, source, index, like=node)


def _replace_single(node: fx.Node, target: Any, *args: Any, tuple_result: bool = True) -> None:
    new = _emit(node, target, *args)
    ir.replace(node, _take(node, new, 0) if tuple_result else new)


def _replace_pair(node: fx.Node, target: Any, *args: Any) -> None:
    """For ops whose first two results are those of the vocabulary op."""
    new = _emit(node, target, *args)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_input_with(node, new)
    node.graph.erase_node(node)


# --- one function per vocabulary op: check, decide, return (kernel, reason, commit) ----------------

_Plan = tuple[str, str, Callable[[], None]]


def _measured(kernel: str, x: torch.Tensor, policy: str) -> str:
    """Plain norms: only where asked for, or where a measurement on this device says so."""
    if policy == "always":
        return "asked for"
    from . import autotune_cache

    rows = cost.hint(x.numel()) // max(cost.hint(x.shape[-1]), 1)
    entry = autotune_cache.verdict(x.device, kernel, x.dtype, (rows, cost.hint(x.shape[-1])))
    if entry is None:
        raise Refuse("Inductor's own norm is kept: no measurement on this device says otherwise")
    if not entry["faster"]:
        raise Refuse("Inductor's own norm was measured faster on this device")
    return "measured faster on this device"


def _norm(node: fx.Node, nk: Any, model: Any, policy: str) -> _Plan:
    args = ir.NormArgs(node)
    x = _tensor(args.x, "the input")
    _last_dim(args, x)
    _float32_statistic(args, x)
    _casts(args)
    _vector(args.gain, "the gain", x.shape[-1])
    _vector(args.bias, "the bias", x.shape[-1])
    _same_layout(node)
    reason = _measured("norm", x, policy)
    rest = (args.gain, args.bias, args.eps, node.target is nf.layer_norm.default)
    rest = (*rest, args.norm_dtype, args.out_dtype)
    return "norm", reason, lambda: _replace_single(node, nk.norm.default, args.x, *rest)


def _add_norm(node: fx.Node, nk: Any, model: Any, policy: str) -> _Plan:
    args = ir.NormArgs(node)
    x, residual = _tensor(args.x, "the input"), _tensor(args.residual, "the residual")
    if not ir.same_shape(x.shape, residual.shape):
        raise Refuse("the residual is broadcast")
    if any(u.target is not operator.getitem for u in node.users):
        raise Refuse("the pair of results is used as a whole")
    stream = ir.val(node)[1]
    _last_dim(args, x)
    _float32_statistic(args, stream)
    _casts(args)
    _vector(args.gain, "the gain", x.shape[-1])
    _vector(args.bias, "the bias", x.shape[-1])
    _same_layout(node)
    reason = _measured("add_norm", x, policy)
    rest = (args.gain, args.bias, args.eps, node.target is nf.add_layer_norm.default)
    rest = (*rest, args.norm_dtype, args.out_dtype)
    return (
        "add_norm",
        reason,
        lambda: _replace_pair(node, nk.add_norm.default, args.x, args.residual, *rest),
    )


def _gated(node: fx.Node, nk: Any, model: Any, policy: str) -> _Plan:
    from .triton_ops import MAX_RANK

    args = ir.NormArgs(node)
    x = _tensor(args.x, "the input")
    down, up = _tensor(args.down, "the gate's down weight"), _tensor(args.up, "its up weight")
    _last_dim(args, x)
    _float32_statistic(args, x)
    _casts(args)
    _vector(args.gain, "the gain", x.shape[-1])
    _vector(args.bias, "the bias", x.shape[-1])
    if down.dim() != 2 or up.dim() != 2 or cost.hint(down.shape[0]) > MAX_RANK:
        raise Refuse(f"the gate's rank is over {MAX_RANK}")
    _same_layout(node)
    d = cost.hint(x.shape[-1])
    rows = cost.hint(x.numel()) // max(d, 1)
    rank = cost.hint(down.shape[0])
    reason = _ask(policy, model, lambda m: devices.gated(m, rows, d, rank, x.element_size()))
    rest = (args.gain, args.bias, args.down, args.up, args.eps, args.gate_scale)
    rest = (*rest, args.norm_dtype, args.out_dtype)
    return (
        "gated_norm",
        reason,
        lambda: _replace_single(node, nk.gated_norm.default, args.x, *rest),
    )


def _ask(policy: str, model: Any, decide: Callable[[Any], devices.Decision]) -> str:
    if policy == "always":
        return "asked for"
    if model is None:
        raise Refuse("this device is not in the cost model's table")
    decision = decide(model)
    if not decision.use:
        raise Refuse(decision.reason)
    return decision.reason


_ACTIVATIONS = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
}


def _activation(node: fx.Node) -> tuple[str, fx.Node]:
    """The activation that is the product's only reader, and the node that then holds the result."""
    if len(node.users) != 1:
        return "identity", node
    user = next(iter(node.users))
    name = _ACTIVATIONS.get(user.target)
    if name is None or not user.args or user.args[0] is not node or len(user.args) > 1:
        return "identity", node
    if name == "gelu":
        approximate = user.kwargs.get("approximate", "none")
        return ("gelu" if approximate == "none" else "gelu_tanh"), user
    return name, user


def _own_statistic(args: Any) -> float | None:
    """The eps, if the scale is the row statistic of the very tensor that is multiplied."""
    scale = args.scale
    if not ir.is_call(scale, nf.row_rstd):
        return None
    stat = ir.NormArgs(scale)
    if stat.x is not args.x or list(stat.dims) != [-1]:
        return None
    if (stat.stat_dtype or ir.dtype(stat.x)) != torch.float32:
        return None
    return stat.eps


def _scaled_linear(node: fx.Node, nk: Any, model: Any, policy: str) -> _Plan:
    args = ir.NormArgs(node)
    x, w = _tensor(args.x, "the input"), _tensor(args.weight, "the weight")
    if w.dim() != 2 or w.dtype != x.dtype:
        raise Refuse(f"the input is {x.dtype}, the weight {w.dtype} of shape {tuple(w.shape)}")
    _vector(args.bias, "the bias", w.shape[0])
    result = ir.val(node)
    if result.dtype not in _DTYPES:
        raise Refuse(f"the result is {result.dtype}")
    _same_layout(node)
    scale = _tensor(args.scale, "the scale")
    if scale.dim() != x.dim() or not ir.same_shape(scale.shape, (*x.shape[:-1], 1)):
        raise Refuse("the scale is not one number per row")
    n, k = (cost.hint(s) for s in w.shape)
    m = cost.hint(x.numel()) // max(k, 1)
    size = x.element_size()
    eps = _own_statistic(args)
    if eps is None and policy != "always":
        raise Refuse("its scale is not the statistic of its own input: a library product is kept")
    reason = _ask(policy, model, lambda m_: devices.norm_linear(m_, m, n, k, size))
    act, last = _activation(node)
    if last is not node and ir.dtype(last) != result.dtype:
        act, last = "identity", node

    def commit() -> None:
        common = (act, False, result.dtype)
        if eps is None:
            new = _emit(
                node, nk.scaled_linear.default, args.x, args.weight, args.scale, args.bias, *common
            )
        else:
            pair = _emit(
                node,
                nk.norm_linear.default,
                args.x,
                args.weight,
                None,
                args.bias,
                eps,
                False,
                *common,
            )
            new = _take(node, pair, 0)
        last.replace_all_uses_with(new)
        if last is not node:
            node.graph.erase_node(last)
        node.graph.erase_node(node)

    return ("scaled_linear" if eps is None else "norm_linear"), reason, commit


_PLANS: dict[Any, Callable[..., _Plan]] = {
    nf.layer_norm.default: _norm,
    nf.rms_norm.default: _norm,
    nf.add_layer_norm.default: _add_norm,
    nf.add_rms_norm.default: _add_norm,
    nf.gated_rms_norm.default: _gated,
    nf.scaled_linear.default: _scaled_linear,
}
