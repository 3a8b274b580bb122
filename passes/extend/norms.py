"""Trainable rescalings of norms, each the identity at insertion.

Sources: "Outlier-driven rescaling" (GatedNorm, section 3.4; PreAffine, section 3.3), "SeeDNorm", and
PPGT's AdaRMSN. Why: large models grow a few huge channels that, through the norm, rescale everything
else; an explicit rescaling can do the same without the outliers that ruin low-bit quantization.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .. import ir
from ..contract import Context, register
from ..errors import NormfuseError, Refuse
from .parameters import check_free, constant, norm_prefix, parameter, parameter_dtype, uniform
from .sites import (
    NormExtension,
    Selection,
    fixed,
    is_pre_affine,
    result_of,
    shared_refusals,
    width,
)

aten = torch.ops.aten
nf = torch.ops.normfuse

_DYNAMIC = {
    nf.gated_rms_norm.default: "gated",
    nf.seed_norm.default: "a SeeDNorm",
    nf.ada_rms_norm.default: "an AdaRMSNorm",
}


def _extended(node: fx.Node) -> str:
    if node.target in _DYNAMIC:
        return f"the norm is {_DYNAMIC[node.target]} already"
    results = [node, *(u for u in node.users if u.target is operator.getitem)]
    if any(ir.is_call(u, nf.self_gate) for r in results for u in r.users):
        return "the norm is gated already"
    return ""


class _Rescaling(NormExtension):
    """Extensions that exclude each other."""

    def extended(self, node: fx.Node) -> str:
        return _extended(node)

    def plan(self, gm: fx.GraphModule, node: fx.Node, context: Context) -> Callable[[], None]:
        if why := _extended(node):
            raise Refuse(why, node)
        shared_refusals(node)
        return self.plan_rescaling(gm, node)

    def plan_rescaling(self, gm: fx.GraphModule, node: fx.Node) -> Callable[[], None]:
        raise NotImplementedError


@register
class InsertGatedNorm(_Rescaling):
    """``y = norm(x)`` becomes ``y ⊙ 2σ(W_up·silu(W_down·y))`` with ``W_up = 0``.

    The gate is exactly 1 at insertion, in every dtype. ``W_down`` gets the default initialization of
    a linear layer, so ``W_up`` has a gradient from the first step (``W_down``'s follows).

    Args:
        sites: see :class:`~normfuse.passes.extend.sites.ExtendPass`.
        rank: of the gate.
        seed: for ``W_down``.

    New parameters: ``<norm>.gate_down`` ``(rank, d)`` and ``<norm>.gate_up`` ``(d, rank)``.
    """

    name = "insert_gated_norm"

    def __init__(self, sites: Selection = "all", rank: int = 16, seed: int = 0) -> None:
        if not isinstance(rank, int) or rank < 1:
            raise NormfuseError(f"rank must be a positive whole number, got {rank!r}")
        super().__init__(sites, rank=rank, seed=seed)

    def plan_rescaling(self, gm: fx.GraphModule, node: fx.Node) -> Callable[[], None]:
        y = result_of(node)
        rank, d = self.options["rank"], width(y)
        args = ir.NormArgs(node)
        prefix = norm_prefix(node)
        down, up = f"{prefix}gate_down", f"{prefix}gate_up"
        check_free(gm, down, (rank, d))
        check_free(gm, up, (d, rank))
        dtype = parameter_dtype(args.gain, args.x)

        def commit() -> None:
            init = uniform((rank, d), d**-0.5, down, self.options["seed"], y, dtype)
            w_down, fresh = parameter(gm, down, init, before=node)
            w_up, _ = parameter(gm, up, constant((d, rank), 0.0, y, dtype), before=node)
            if not fresh:
                self.reused.append(down)
            graph = gm.graph
            if node.target is nf.rms_norm.default and not args.bounded:
                with graph.inserting_before(node):
                    gated = ir.emit(
                        graph,
                        nf.gated_rms_norm.default,
                        args.x,
                        list(args.dims),
                        args.gain,
                        args.bias,
                        w_down,
                        w_up,
                        args.eps,
                        like=node,
                        **args.casts,
                    )
                ir.inherit(gated, node, site=True)
                ir.replace(node, gated)
                return
            with graph.inserting_after(y):
                gated = ir.emit(graph, nf.self_gate.default, y, w_down, w_up, like=node)
            y.replace_all_uses_with(gated, delete_user_cb=lambda u: u is not gated)

        return commit


@register
class InsertPreAffine(NormExtension):
    """``norm(x)`` becomes ``norm(λ ⊙ x)`` with ``λ = 1``: exactly the same at insertion.

    ``λ`` does not fold into a matmul (it changes the statistic).

    New parameter: ``<norm>.pre_affine``, one number per normalized feature.
    """

    name = "insert_pre_affine"

    def __init__(self, sites: Selection = "all") -> None:
        super().__init__(sites)

    def extended(self, node: fx.Node) -> str:
        return "the norm has a pre-affine already" if is_pre_affine(node.args[0]) else ""

    def plan(self, gm: fx.GraphModule, node: fx.Node, context: Context) -> Callable[[], None]:
        args = ir.NormArgs(node)
        if "residual" in args._values:
            raise Refuse(
                "the residual add is fused into the norm: run before fuse_residual_norm", node
            )
        name = f"{norm_prefix(node)}pre_affine"
        x = args.x
        if why := self.extended(node):
            raise Refuse(why, node)
        first = min(args.dims)
        sizes = ir.shape(x)[first:]
        shape = tuple(
            s if d in args.dims else 1 for d, s in zip(range(first, 0), sizes, strict=True)
        )
        shape = tuple(fixed(s, "a normalized dim", node) for s in shape)
        check_free(gm, name, shape)
        dtype = parameter_dtype(args.gain, x)

        def commit() -> None:
            scale, fresh = parameter(gm, name, constant(shape, 1.0, x, dtype), before=node)
            if not fresh:
                self.reused.append(name)
            with gm.graph.inserting_before(node):
                if ir.dtype(scale) != ir.dtype(x):  # a wider scale would widen the stream
                    scale = ir.emit(gm.graph, aten.to.dtype, scale, ir.dtype(x), like=node)
                scaled = ir.emit(gm.graph, aten.mul.Tensor, x, scale, like=node)
            node.replace_input_with(x, scaled)
            ir.set_val(node)

        return commit


class _Dynamic(_Rescaling):
    """An RMSNorm becomes another norm op with two vectors ``alpha`` and ``beta``."""

    prefix = ""
    target: Any = None
    initial = (0.0, 0.0)

    def extra(self) -> dict[str, Any]:
        """Further arguments of the op."""
        return {}

    def check_width(self, d: int, node: fx.Node) -> None:
        """Refuse widths the options do not fit."""

    def plan_rescaling(self, gm: fx.GraphModule, node: fx.Node) -> Callable[[], None]:
        if ir.is_call(node, nf.layer_norm, nf.add_layer_norm, nf.crms_norm):
            raise Refuse(
                "it rescales an RMSNorm and this norm subtracts the mean: run remove_mean first, or "
                "gate it with insert_gated_norm",
                node,
            )
        if node.target is not nf.rms_norm.default:
            raise Refuse(
                "the residual add is fused into the norm: run before fuse_residual_norm", node
            )
        args = ir.NormArgs(node)
        if args.bounded:
            raise Refuse(
                "the norm bounds its statistic from below instead of adding eps: gate it with "
                "insert_gated_norm",
                node,
            )
        if args.gain is not None and not ir.shape(args.gain):
            raise Refuse("the norm's gain is a single number", node)
        d = width(args.x)
        self.check_width(d, node)
        base = norm_prefix(node) + self.prefix
        check_free(gm, f"{base}_alpha", (d,))
        check_free(gm, f"{base}_beta", (d,))
        dtype = parameter_dtype(args.gain, args.x)

        def commit() -> None:
            leaves = []
            for part, number in zip(("alpha", "beta"), self.initial, strict=True):
                name = f"{base}_{part}"
                leaf, fresh = parameter(
                    gm, name, constant((d,), number, args.x, dtype), before=node
                )
                leaves.append(leaf)
                if not fresh:
                    self.reused.append(name)
            with gm.graph.inserting_before(node):
                new = ir.emit(
                    gm.graph,
                    self.target,
                    args.x,
                    list(args.dims),
                    args.gain,
                    args.bias,
                    *leaves,
                    args.eps,
                    like=node,
                    **self.extra(),
                    **args.casts,
                )
            ir.inherit(new, node, site=True)
            ir.replace(node, new)

        return commit


@register
class SeeDNorm(_Dynamic):
    """``γ ⊙ x/rms(x)`` becomes ``(tanh(x·βᵀ)·α + γ) ⊙ x/rms(x)`` with ``β = 0``, ``α = 1``.

    Exactly the same at insertion, in every dtype. The norm keeps its own gain ``γ``. Weight decay
    belongs on ``α`` and ``β`` (the paper, for stability).

    Args:
        heads: number of contiguous slices with a dot product of their own; must divide the width.

    New parameters: ``<norm>.seed_alpha`` and ``<norm>.seed_beta``.
    """

    name = "seed_norm"
    prefix = "seed"
    target = nf.seed_norm.default
    initial = (1.0, 0.0)

    def __init__(self, sites: Selection = "all", heads: int = 1) -> None:
        if not isinstance(heads, int) or heads < 1:
            raise NormfuseError(f"heads must be a positive whole number, got {heads!r}")
        super().__init__(sites, heads=heads)

    def extra(self) -> dict[str, Any]:
        return {"heads": self.options["heads"]}

    def check_width(self, d: int, node: fx.Node) -> None:
        if d % self.options["heads"]:
            raise Refuse(f"{self.options['heads']} heads do not divide the width {d}", node)


@register
class AdaRMSNorm(_Dynamic):
    """``x/rms(x)`` becomes ``x/rms(x) · sqrt((mean((α⊙x + β)²) + ε)/(1 + ε))``, ``α = 0, β = 1``.

    Exactly the same at insertion (dividing by ``sqrt(1 + ε)`` is our change to the paper's form).
    The norm keeps its own gain.

    New parameters: ``<norm>.ada_alpha`` and ``<norm>.ada_beta``.
    """

    name = "ada_rms_norm"
    prefix = "ada"
    target = nf.ada_rms_norm.default
    initial = (0.0, 1.0)

    def __init__(self, sites: Selection = "all", ada_eps: float = 1e-6) -> None:
        if not ada_eps > 0:
            raise NormfuseError(f"ada_eps must be positive, got {ada_eps!r}")
        super().__init__(sites, ada_eps=float(ada_eps))

    def extra(self) -> dict[str, Any]:
        return {"ada_eps": self.options["ada_eps"]}
