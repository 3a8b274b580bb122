"""FuseResidualNorm: the residual add and the norm that reads it become one op with two results.

The statistic reads the rounded sum, as eager PyTorch does, and the sum's other readers use the
second result. No arithmetic changes; what is saved is one read of the sum by the norm.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .. import ir
from ..contract import Context, Pass, PassResult, register
from ..errors import Refuse

if TYPE_CHECKING:
    import sympy

aten = torch.ops.aten
nf = torch.ops.normfuse

_FUSED: dict[Any, Any] = {
    nf.layer_norm.default: nf.add_layer_norm.default,
    nf.rms_norm.default: nf.add_rms_norm.default,
}


@register
class FuseResidualNorm(Pass):
    """``y = norm(x + r)`` with the sum kept: ``y, s = add_norm(x, r)``.

    Under the policy ``"pays"`` it declines on CPU, where Inductor fuses the add into the norm's
    first loop by itself and a fused op could only stand in its way.
    """

    name = "fuse_residual_norm"
    promise = "exact"

    @classmethod
    def identity(cls) -> Sequence[tuple[sympy.Matrix, sympy.Matrix]]:
        """The two results of the fused op against the two separate ops."""
        import sympy

        d = 3
        eps = sympy.Symbol("epsilon", positive=True)
        x = sympy.Matrix(d, 1, sympy.symbols(f"x:{d}", real=True))
        r = sympy.Matrix(d, 1, sympy.symbols(f"r:{d}", real=True))

        def rms(v: sympy.Matrix) -> sympy.Matrix:
            return v / sympy.sqrt((v.T * v)[0] / d + eps)

        stream = x + r
        fused = sympy.Matrix.vstack(rms(stream), stream)
        return [(fused, sympy.Matrix.vstack(rms(x + r), r + x))]

    def run(self, gm: fx.GraphModule, context: Context) -> PassResult:
        result = PassResult()
        for node in ir.norm_nodes(gm):
            if node.target not in _FUSED or not ir.is_call(node.args[0], aten.add.Tensor):
                continue  # nothing to fuse: not worth a line in the report

            def plan(node: fx.Node = node) -> Callable[[], None]:
                return self._plan(node, context)

            add: Any = node.args[0]
            if self.attempt(context, result, node.meta["site"], plan):
                value = add.meta["val"]
                if all(isinstance(s, int) for s in value.shape):
                    saved = float(value.numel() * value.element_size())
                    result.savings[node.meta["site"]] = (saved, 0.0)
        return result

    def _plan(self, node: fx.Node, context: Context) -> Callable[[], None]:
        add: Any = node.args[0]
        if context.policy == "pays" and context.device == "cpu":
            raise Refuse("on CPU Inductor fuses the residual add into the norm by itself")
        if add.meta.get("mutated"):
            raise Refuse("the residual sum is written in place", add)
        if add.meta.get("region") != node.meta.get("region"):
            raise Refuse(
                "the sum and the norm belong to different checkpointed regions, and the sum is what "
                "is kept between them",
                add,
            )
        if len(add.args) != 2 or add.kwargs.get("alpha", 1) != 1:
            raise Refuse("the residual add scales one operand (alpha)", add)
        x, residual = add.args
        if not (ir.is_tensor(x) and ir.is_tensor(residual)):
            raise Refuse("the add has a number as operand, not a residual stream", add)
        for operand in (x, residual):
            if not ir.same_shape(ir.shape(operand), ir.shape(add)):
                raise Refuse("the add broadcasts one operand", add)
            if ir.dtype(operand) != ir.dtype(add):
                raise Refuse(f"the add promotes {ir.dtype(operand)} to {ir.dtype(add)}", add)
        if any(
            other is not node and other.target in _FUSED and other.args[0] is add
            for other in add.users
        ):
            raise Refuse(
                "several norms read the same sum; it is computed once for all of them", add
            )

        def commit() -> None:
            args = ir.NormArgs(node)
            graph = node.graph
            # the fused op takes the norm's place; the sum's earlier readers move behind it when
            # the manager re-sorts the graph
            with graph.inserting_before(node):
                both = ir.emit(
                    graph,
                    _FUSED[node.target],
                    x,
                    residual,
                    args.dims,
                    args.gain,
                    args.bias,
                    args.eps,
                    like=node,
                    **({"floor": True} if args.bounded else {}),
                    **args.casts,
                )
                ir.inherit(both, node, site=True)
                y = ir.emit(graph, operator.getitem, both, 0, like=node)
                stream = ir.emit(graph, operator.getitem, both, 1, like=add)
            ir.replace(node, y)
            ir.replace(add, stream)

        return commit
