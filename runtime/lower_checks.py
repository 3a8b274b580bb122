"""What the kernel-lowering passes share: preconditions with reasons, and small graph edits."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..passes import ir
from ..passes.errors import Refuse
from . import autotune_cache, devices

nf = torch.ops.normfuse

#: Where kernels run (ROCm calls itself this too).
DEVICE = "cuda"
#: Of the kernel ops.
NAMESPACE = "normfuse_kernels"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Which statistics a norm takes, as the kernels call it.
KINDS = {
    nf.layer_norm.default: "layer",
    nf.add_layer_norm.default: "layer",
    nf.rms_norm.default: "rms",
    nf.add_rms_norm.default: "rms",
    nf.crms_norm.default: "crms",
}

#: Kernel name, reason, and what to do about it.
Plan = tuple[str, str, Callable[[], None]]


@dataclass(frozen=True)
class Lowering:
    """What became of one vocabulary node: the kernel's name (``""``: left to Inductor) and why."""

    key: str
    op: str
    kernel: str
    reason: str


def tensor(node: Any, what: str) -> torch.Tensor:
    v = ir.val(node)
    if not isinstance(v, torch.Tensor):
        raise Refuse(f"{what} is not a tensor")
    if v.device.type != DEVICE:
        raise Refuse(f"{what} is on {v.device.type}")
    if v.dtype not in DTYPES:
        raise Refuse(f"{what} is {v.dtype}; kernels take float16, bfloat16 and float32")
    return v


def vector(node: Any, what: str, size: Any) -> None:
    if node is None:
        return
    v = tensor(node, what)
    if v.dim() != 1 or not ir.same_dim(v.shape[0], size):
        raise Refuse(f"{what} has shape {tuple(v.shape)}, not one number per feature")


def float32_statistic(args: Any, x: torch.Tensor) -> None:
    if args.bounded:
        raise Refuse("the statistic is bounded from below, kernels add eps")
    if (args.stat_dtype or x.dtype) != torch.float32:
        raise Refuse(f"the statistic is taken in {args.stat_dtype or x.dtype}, kernels use float32")


def last_dim(args: Any, x: torch.Tensor) -> None:
    if list(args.dims) != [-1] or x.dim() < 1:
        raise Refuse(f"normalizes over dims {list(args.dims)}; kernels take the last one")


def casts(args: Any) -> None:
    for dtype in (args.norm_dtype, args.out_dtype):
        if dtype is not None and dtype not in DTYPES:
            raise Refuse(f"rounds to {dtype}")


def same_layout(node: fx.Node) -> None:
    """Kernels write contiguous results; a later view may rely on another layout."""
    values = ir.val(node)
    for v in values if isinstance(values, (tuple, list)) else (values,):
        if not v.is_contiguous():
            raise Refuse("the result is not laid out contiguously")


def measured(
    kernel: str, x: torch.Tensor, dtype: torch.dtype, sizes: tuple[int, ...]
) -> bool | None:
    """Whether ``benchmarks/kernels.py --tune`` found a kernel faster on this device (``None``: it was
    not there); refuses where it found it slower. ``sizes``: rows first."""
    entry = autotune_cache.verdict(x.device, kernel, dtype, sizes)
    if entry is not None and not entry["faster"]:
        raise Refuse("Inductor's own code was measured faster on this device")
    return None if entry is None else True


MEASURED = "measured faster on this device"


def ask(policy: str, model: Any, decide: Callable[[Any], devices.Decision]) -> str:
    """The cost model's reason for a kernel; refuses with its reason against one."""
    if policy == "always":
        return "asked for"
    if model is None:
        raise Refuse("this device is not in the cost model's table")
    decision = decide(model)
    if not decision.use:
        raise Refuse(decision.reason)
    return decision.reason


def lower_each(
    gm: fx.GraphModule, plans: Mapping[Any, Callable[[fx.Node], Plan]]
) -> list[Lowering]:
    """Carry out, or note the refusal of, the plan for every node whose target has one."""
    out = []
    for node in list(gm.graph.nodes):
        plan = plans.get(node.target) if node.op == "call_function" else None
        if plan is None or node._erased:
            continue
        key = node.meta.get("site", node.name)
        name = node.target._schema.name.split("::")[1]
        try:
            kernel, reason, commit = plan(node)
        except Refuse as refusal:
            out.append(Lowering(key, name, "", refusal.reason))
            continue
        commit()
        out.append(Lowering(key, name, kernel, reason))
    return out


def emit_before(node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    with node.graph.inserting_before(node):
        new = ir.emit(node.graph, target, *args, like=node, **kwargs)
    ir.inherit(new, node, site=True)
    return new


def take(node: fx.Node, source: fx.Node, index: int) -> fx.Node:
    with node.graph.inserting_before(node):
        return ir.emit(node.graph, operator.getitem, source, index, like=node)


def replace_single(node: fx.Node, target: Any, *args: Any) -> None:
    """The op's first result stands for ``node``."""
    ir.replace(node, take(node, emit_before(node, target, *args), 0))


def replace_pair(node: fx.Node, target: Any, *args: Any) -> None:
    """For ops whose first two results are those of the vocabulary op."""
    new = emit_before(node, target, *args)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_input_with(node, new)
    node.graph.erase_node(node)
