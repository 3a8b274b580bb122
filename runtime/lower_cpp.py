"""Vocabulary ops to our C++ on CPUs: a graph pass that runs before ``lower.expand``.

Only what Inductor's C++ cannot have: a gate's thin products next to its elementwise parts, with nothing
written between them. Norms stay with Inductor, which fuses them into what surrounds them.
"""

from __future__ import annotations

import functools

import torch
from torch import fx

from ..passes import cost, ir
from ..passes.errors import Refuse
from .cpp import library
from .lower_checks import Lowering, Plan, emit_before, lower_each, same_layout, take

nf = torch.ops.normfuse

#: Rows, and numbers in them, from which it was measured faster than Inductor's code (``docs/gating.md``).
FEWEST_ROWS, SMALLEST = 64, 1 << 16
#: Ranks up to which it was measured faster.
LARGEST_RANK = 64


def lower_to_cpp(gm: fx.GraphModule, *, policy: str = "pays") -> list[Lowering]:
    """Replace the gates of ``gm`` that deserve it, in place; ``gm`` runs on a CPU.

    Args:
        policy: ``"pays"`` asks for a size at which it was measured faster; ``"always"`` does not.
    """
    gate = functools.partial(_gate, policy=policy)
    done = lower_each(gm, {nf.self_gate.default: gate, nf.gated_rms_norm.default: gate})
    if any(entry.kernel for entry in done):
        gm.recompile()
    return done


def _gate(node: fx.Node, policy: str) -> Plan:
    _check(node, policy)
    reason = "of a size measured faster than in Inductor's code"
    reason = "asked for" if policy == "always" else reason
    return "self_gate in C++", reason, lambda: _replace(node)


def _check(node: fx.Node, policy: str) -> None:
    from .cpp.gate import WIDTHS

    args = ir.NormArgs(node)
    if node.target is nf.gated_rms_norm.default and list(args.dims) != [-1]:
        raise Refuse(f"normalizes over dims {list(args.dims)}; the C++ takes the last one")
    y, down, up = (ir.val(n) for n in (node, args.down, args.up))
    for v, what in (
        (y, "the gated vector"),
        (down, "the gate's down weight"),
        (up, "its up weight"),
    ):
        if v.device.type != "cpu" or v.dtype != torch.float32:
            raise Refuse(f"{what} is {v.dtype} on {v.device.type}; the C++ takes float32 on CPUs")
    d, rank = y.shape[-1], down.shape[0]
    if not isinstance(d, int) or not isinstance(rank, int) or d % WIDTHS or not rank:
        raise Refuse(
            f"the width is {d}, the rank {rank}; the C++ takes multiples of {WIDTHS} and a rank"
        )
    if tuple(down.shape) != (rank, d) or tuple(up.shape) != (d, rank):
        raise Refuse("the gate's weights are broadcast")
    same_layout(node)
    if policy != "always":
        if cost.hint(y.numel()) < max(SMALLEST, FEWEST_ROWS * d):
            raise Refuse("few rows, as far as known: calling the op would cost more than it saves")
        if rank > LARGEST_RANK:
            raise Refuse(f"the gate's rank is over {LARGEST_RANK}")
    if reason := library.why_absent("gate"):
        raise Refuse(f"no C++ here: {reason}")


def _replace(node: fx.Node) -> None:
    args = ir.NormArgs(node)
    y = args.y if node.target is nf.self_gate.default else emit_before(
        node, nf.rms_norm.default, args.x, args.dims, args.gain, args.bias, args.eps,
        stat_dtype=args.stat_dtype, norm_dtype=args.norm_dtype, out_dtype=args.out_dtype,
    )  # fmt: skip
    gate = torch.ops.normfuse_cpp.self_gate.default
    both = emit_before(node, gate, y, args.down, args.up, args.gate_scale)
    ir.replace(node, take(node, both, 0))
