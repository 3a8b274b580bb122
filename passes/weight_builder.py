"""Combining weights: what passes write into the weight program.

Combined weights are computed in ``context.fold_dtype`` and rounded once, also after several passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from . import ir
from .linear import Linear

if TYPE_CHECKING:
    from .contract import Context

aten = torch.ops.aten


class WeightBuilder:
    """Emits weight expressions, each only once per graph.

    Work happens in ``context.fold_dtype``; :meth:`finish` rounds to the dtype a weight had.

    Args:
        graph: where to emit.
        context: decides the working dtype.
    """

    def __init__(self, graph: fx.Graph, context: Context) -> None:
        self.graph, self.context = graph, context
        self._known: dict[Any, fx.Node] = {}
        # weights may precede the graph's inputs, computations must not
        self._start = next((n for n in reversed(graph.nodes) if n.op == "placeholder"), None)

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of the weight program (the same call twice is one node)."""
        key = (target, ir.frozen(args), ir.frozen(kwargs))
        found = self._known.get(key)
        if found is None:
            like = next(iter(_nodes(args)))
            with self.graph.inserting_after(self._last(args)):
                found = ir.emit(self.graph, target, *args, like=like, weight=True, **kwargs)
            self._known[key] = found
        return found

    def _last(self, args: Sequence[Any]) -> fx.Node:
        """The node behind which an expression of ``args`` may stand."""
        nodes = list(_nodes(args))
        return max(nodes if self._start is None else [*nodes, self._start])

    def work_dtype(self, *tensors: fx.Node) -> torch.dtype:
        return self.context.fold_dtype(*(ir.dtype(t) for t in tensors))

    def work(self, tensor: fx.Node, *others: fx.Node) -> fx.Node:
        """``tensor`` in the working dtype, without the rounding that an earlier pass ended with."""
        dtype = self.work_dtype(tensor, *others)
        if ir.is_call(tensor, aten.to.dtype) and tensor.meta.get("weight_program"):
            inner: Any = tensor.args[0]
            wide = ir.dtype(inner)
            if torch.promote_types(wide, ir.dtype(tensor)) == wide:
                tensor = inner
        return self.cast(tensor, dtype)

    def cast(self, tensor: fx.Node, dtype: torch.dtype) -> fx.Node:
        if ir.dtype(tensor) == dtype:
            return tensor
        return self.emit(aten.to.dtype, tensor, dtype)

    def finish(self, tensor: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Round a finished expression; :meth:`work` of a later pass looks behind this rounding."""
        return self.cast(tensor, dtype)

    # -- shapes of vectors -------------------------------------------------------------------

    def vector(self, tensor: fx.Node, dims: Sequence[int], sizes: Sequence[int]) -> fx.Node:
        """``tensor`` as a vector over the features that lie in ``dims`` (negative, ascending).

        Args:
            tensor: broadcastable to a value whose ``dims`` have ``sizes``; constant along its
                other dims.
        """
        shape = ir.shape(tensor)
        kept = [shape[d] if -d <= len(shape) else 1 for d in dims]
        if list(shape) != kept:
            tensor = self.emit(aten.reshape.default, tensor, kept)
        if kept != list(sizes):
            tensor = self.emit(aten.expand.default, tensor, list(sizes))
        return tensor if len(kept) == 1 else self.emit(aten.reshape.default, tensor, [-1])

    def tile(self, vector: fx.Node, outer: int, inner: int) -> fx.Node:
        """``[n]`` to ``[outer·n·inner]``, constant along the outer and inner factors."""
        if outer == 1 and inner == 1:
            return vector
        n = ir.shape(vector)[0]
        cube = self.emit(aten.reshape.default, vector, [1, n, 1])
        cube = self.emit(aten.expand.default, cube, [outer, n, inner])
        return self.emit(aten.reshape.default, cube, [outer * n * inner])

    def along(self, vector: fx.Node, dim: int) -> fx.Node:
        """A vector, broadcastable along the negative ``dim``."""
        if dim == -1:
            return vector
        return self.emit(aten.reshape.default, vector, [-1] + [1] * (-dim - 1))

    # -- the algebra ---------------------------------------------------------------------------
    # Weights and vectors are in the working dtype on the way in and on the way out.

    def scale_in(self, linear: Linear, weight: fx.Node, gain: fx.Node | float) -> fx.Node:
        """``W·diag(gain)``: the weight of ``x → W (gain ⊙ x)``; ``gain`` is ``[in]`` or a number."""
        if not isinstance(gain, fx.Node) or not ir.shape(gain):
            return self.emit(aten.mul.Tensor, weight, gain)
        if linear.layout == "conv" and linear.groups > 1:
            shape = list(ir.shape(weight))
            n = shape[1]
            cube = self.emit(aten.reshape.default, weight, [linear.groups, -1, *shape[1:]])
            g = self.emit(
                aten.reshape.default, gain, [linear.groups, 1, n] + [1] * (len(shape) - 2)
            )
            cube = self.emit(aten.mul.Tensor, cube, g)
            return self.emit(aten.reshape.default, cube, shape)
        return self.emit(aten.mul.Tensor, weight, self.along(gain, linear.in_dim))

    def scale_out(self, linear: Linear, weight: fx.Node, scale: fx.Node | float) -> fx.Node:
        """``diag(scale)·W``; ``scale`` is ``[out]`` or a number."""
        if not isinstance(scale, fx.Node) or not ir.shape(scale):
            return self.emit(aten.mul.Tensor, weight, scale)
        if linear.layout == "conv_transpose" and linear.groups > 1:
            shape = list(ir.shape(weight))
            cube = self.emit(aten.reshape.default, weight, [linear.groups, -1, *shape[1:]])
            s = self.emit(
                aten.reshape.default, scale, [linear.groups, 1, -1] + [1] * (len(shape) - 2)
            )
            cube = self.emit(aten.mul.Tensor, cube, s)
            return self.emit(aten.reshape.default, cube, shape)
        return self.emit(aten.mul.Tensor, weight, self.along(scale, linear.out_dim))

    def response(self, linear: Linear, weight: fx.Node, shift: fx.Node) -> fx.Node:
        """``W·shift``: what a constant ``[in]`` added to the input adds to the result.

        ``[out]``; for a stack of matrices ``[…, 1, out]``, or ``[…, out, 1]`` where the result's
        features are its rows. Not defined for ``linear.pads``.
        """
        if linear.layout == "conv":
            dims = list(range(2, len(ir.shape(weight))))
            if dims:
                weight = self.emit(aten.sum.dim_IntList, weight, dims)
            if linear.groups > 1:
                n = ir.shape(weight)[1]
                weight = self.emit(aten.reshape.default, weight, [linear.groups, -1, n])
                shift = self.emit(aten.reshape.default, shift, [linear.groups, n, 1])
                return self.emit(
                    aten.reshape.default, self.emit(aten.matmul.default, weight, shift), [-1]
                )
            return self.emit(aten.mv.default, weight, shift)
        if linear.stacked:
            if linear.in_dim == -1:
                column = self.emit(aten.reshape.default, shift, [-1, 1])
                return self.emit(aten.matmul.default, weight, column)
            row = self.emit(aten.reshape.default, shift, [1, -1])
            return self.emit(aten.matmul.default, row, weight)
        if linear.in_dim == -2:
            weight = self.emit(aten.t.default, weight)
        return self.emit(aten.mv.default, weight, shift)

    # -- whole layers --------------------------------------------------------------------------

    def fold_in(
        self, linear: Linear, gain: fx.Node | float | None, shift: fx.Node | None
    ) -> tuple[fx.Node, fx.Node | None]:
        """Weight and bias of ``x → W (gain ⊙ x + shift) + b``, each rounded once.

        ``gain`` and ``shift`` are vectors over ``linear``'s input features, ``gain`` may be a number.
        """
        weight, bias = linear.weight, linear.bias
        old = self.work(weight, *_nodes((gain, shift)))
        if gain is not None:
            new = self.scale_in(linear, old, self._factor(gain, old))
            weight = self.finish(new, ir.dtype(weight))
        if shift is not None:
            total = self.response(linear, old, self.work(shift, old))
            if bias is not None:
                total = self.emit(aten.add.Tensor, self.work(bias, old), total)
            bias = self.finish(total, ir.dtype(linear.weight if bias is None else bias))
        return weight, bias

    def fold_out(
        self, linear: Linear, scale: fx.Node | float | None, shift: fx.Node | None
    ) -> tuple[fx.Node, fx.Node | None]:
        """Weight and bias of ``x → scale ⊙ (W x + b) + shift``, each rounded once.

        ``scale`` and ``shift`` are vectors over the output features, ``scale`` may be a number.
        """
        weight, bias = linear.weight, linear.bias
        old = self.work(weight, *_nodes((scale, shift)))
        if scale is not None:
            new = self.scale_out(linear, old, self._factor(scale, old))
            weight = self.finish(new, ir.dtype(weight))
        if bias is None and shift is None:
            return weight, None
        total = None
        if bias is not None:
            total = self.work(bias, old)
            if scale is not None:
                total = self.emit(aten.mul.Tensor, total, self._factor(scale, old))
        if shift is not None:
            added = self.work(shift, old)
            total = added if total is None else self.emit(aten.add.Tensor, total, added)
        assert total is not None
        return weight, self.finish(total, ir.dtype(linear.weight if bias is None else bias))

    def _factor(self, scale: fx.Node | float, like: fx.Node) -> fx.Node | float:
        return self.work(scale, like) if isinstance(scale, fx.Node) else scale


def _nodes(args: Any) -> Iterator[fx.Node]:
    for a in args:
        if isinstance(a, fx.Node):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _nodes(a)
