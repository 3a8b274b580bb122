"""FoldBatchNorm: an evaluated BatchNorm is a fixed affine map per channel; a neighbour absorbs it.

With running statistics ``μ, v`` and affine ``γ, β``::

    BN(x) = s ⊙ x + t        s = γ / sqrt(v + eps),  t = β − s ⊙ μ

The preceding linear or convolution takes ``diag(s)·W`` and ``s ⊙ b + t``; failing that the following
one takes ``W·diag(s)`` and ``b + W t`` (Jacob et al., "Quantization and Training of Neural Networks
for Efficient Integer-Arithmetic-Only Inference", 2018, section 3.2, for the convolution case).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .. import cost, ir
from ..axis import Axis
from ..contract import Context, Pass, PassResult, register
from ..errors import Refuse
from ..linear import Linear, match_linear
from ..readers import check_readers, fold_into_readers
from ..weight_builder import WeightBuilder

if TYPE_CHECKING:
    import sympy

aten = torch.ops.aten


@register
class FoldBatchNorm(Pass):
    """Fold evaluated batch (and tracked instance) norms into the linear or conv before or after."""

    name = "fold_batch_norm"
    promise = "exact"

    @classmethod
    def identity(cls) -> Sequence[tuple[sympy.Matrix, sympy.Matrix]]:
        """Folding backwards into the producer and forwards into the reader."""
        import sympy

        d, k = 2, 3
        eps = sympy.Symbol("epsilon", positive=True)
        w = sympy.Matrix(d, k, sympy.symbols(f"w:{d * k}", real=True))
        w2 = sympy.Matrix(k, d, sympy.symbols(f"u:{d * k}", real=True))
        b, mean, beta, gamma, c = (
            sympy.Matrix(d, 1, sympy.symbols(f"{n}:{d}", real=True)) for n in "bmtgc"
        )
        b2 = sympy.Matrix(k, 1, sympy.symbols(f"e:{k}", real=True))
        x = sympy.Matrix(k, 1, sympy.symbols(f"x:{k}", real=True))
        var = sympy.symbols(f"v:{d}", positive=True)
        s = sympy.diag(*[gamma[i] / sympy.sqrt(var[i] + eps) for i in range(d)])
        t = beta - s * mean

        def norm(y: sympy.Matrix) -> sympy.Matrix:
            return sympy.Matrix(
                d,
                1,
                [
                    (y[i] - mean[i]) / sympy.sqrt(var[i] + eps) * gamma[i] + beta[i]
                    for i in range(d)
                ],
            )

        return [
            (norm(w * x + b), (s * w) * x + (s * b + t)),
            (w2 * norm(c) + b2, (w2 * s) * c + (b2 + w2 * t)),
        ]

    def run(self, gm: fx.GraphModule, context: Context) -> PassResult:
        result = PassResult()
        builder = WeightBuilder(gm.graph, context)
        for node in list(gm.graph.nodes):
            if not ir.is_call(node, aten.batch_norm, aten.instance_norm):
                continue
            key = node.meta.get("site") or ir.module_path(node) or node.name

            def plan(node: fx.Node = node) -> Callable[[], None]:
                return _plan(node, context, builder)

            # the activation is read and written once less, and neither multiplied nor shifted
            saved = (2.0 * cost.nbytes(node), 2.0 * cost.numel(node))
            if self.attempt(context, result, key, plan):
                result.savings[key] = saved
        return result


def _plan(node: fx.Node, context: Context, builder: WeightBuilder) -> Callable[[], None]:
    args = ir.bind(node)
    if ir.is_call(node, aten.instance_norm) and args["use_input_stats"]:
        raise Refuse("the instance norm uses statistics of its input", node)
    if args.get("training"):
        raise Refuse(
            "the batch norm uses statistics of the batch (training mode); call model.eval() first",
            node,
        )
    if args["running_mean"] is None or args["running_var"] is None:
        raise Refuse("the batch norm keeps no running statistics", node)
    tensors = [args[n] for n in ("running_mean", "running_var", "weight", "bias")]
    for t in tensors:
        if t is not None and not ir.is_weight_expr(t):
            raise Refuse(f"one of its statistics or affine parameters {ir.why_no_weight(t)}", t)
    if context.policy == "pays" and context.training:
        raise Refuse(
            "with gradients on, the folded weights would be recomputed at every step, which costs "
            "more than the normalization they replace",
            node,
        )
    rank = len(ir.shape(args["input"]))
    channel = 1 - rank
    before, why_not_before = _producer(args["input"], node, channel)
    if before is not None:

        def commit_before() -> None:
            s, t = _affine(builder, args, before.weight)
            weight, bias = builder.fold_out(before, s, t)
            before.rebuild(weight=weight, bias=bias)
            ir.replace(node, before.node)

        return commit_before
    try:
        after = check_readers(node, Axis((channel,)), gain=True, shift=True, copy_tied=False)
    except Refuse as refusal:
        raise Refuse(
            f"before it: {why_not_before}; after it: {refusal.reason}", refusal.node
        ) from None
    if not after:
        raise Refuse(f"before it: {why_not_before}; after it: nothing reads it", node)

    def commit_after() -> None:
        s, t = _affine(builder, args, after[0].linear.weight)
        fold_into_readers(builder, after, lambda vector: vector, s, t)
        ir.replace(node, args["input"])

    return commit_after


def _affine(builder: WeightBuilder, args: dict[str, Any], like: fx.Node) -> tuple[fx.Node, fx.Node]:
    """``s`` and ``t`` with ``BN(x) = s ⊙ x + t``, in the working dtype."""
    mean, var = builder.work(args["running_mean"], like), builder.work(args["running_var"], like)
    s = builder.emit(aten.rsqrt.default, builder.emit(aten.add.Tensor, var, args["eps"]))
    if args["weight"] is not None:
        s = builder.emit(aten.mul.Tensor, builder.work(args["weight"], like), s)
    shifted = builder.emit(aten.mul.Tensor, s, mean)
    if args["bias"] is None:
        return s, builder.emit(aten.neg.default, shifted)
    return s, builder.emit(aten.sub.Tensor, builder.work(args["bias"], like), shifted)


def _producer(x: Any, node: fx.Node, channel: int) -> tuple[Linear | None, str]:
    """The linear layer that makes ``x`` for ``node`` alone."""
    linear = match_linear(x)
    if linear is None:
        return None, f"{ir.describe(x)} is not a linear layer"
    if linear.layout == "scaled_linear":
        return None, "a linear layer with a deferred scale"
    if not linear.owned:
        return None, f"the weight {ir.why_no_weight(linear.weight, linear.bias)}"
    if linear.feature_out != channel:
        return None, "the layer's output features are not the normalized channels"
    others = [u for u in x.users if u is not node]
    if others:
        return None, f"its input is also read by {ir.describe(others[0])}"
    return linear, ""
