"""CompressZeroMean: drop one coordinate of a zero-mean residual stream (d → d − 1).

The coordinates of a zero-mean vector sum to zero, so the last one is redundant. Writers stop
computing it, RMSNorm becomes CRMSNorm, which knows what is missing, and linear readers use
``y_d = −Σ y_i`` (Jiang et al., "Pre-RMSNorm and Pre-CRMSNorm Transformers", 2023, section 3.2)::

    rms_norm(x)[:-1] = crms_norm(x[:-1])        W y = (W[:, :-1] − W[:, -1:]) y[:-1]

A width like 767 breaks the alignment that vector units and tensor cores want: the pass is opt-in
and worth its while only where ``d − 1`` is the round number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .. import cost, ir
from ..axis import SPLITS, Axis, operands, result_axis, users
from ..contract import Context, Pass, PassResult, register
from ..errors import Refuse
from ..linear import Linear, is_weight, match_features, match_linear
from ..residual import Stream, Writer, streams
from ..weight_builder import WeightBuilder
from ..zero_mean import centered_streams, linear_out_axis

if TYPE_CHECKING:
    import sympy

aten = torch.ops.aten
nf = torch.ops.normfuse

#: Under the policy "pays" the new width must be a multiple of this (elements).
ALIGNMENT = 16

_RESHAPES = (aten.view, aten.reshape, aten._unsafe_view, aten.expand, aten.broadcast_to)
_UNSIZED = (aten.view_as, aten.expand_as, aten.unflatten)


@dataclass
class _Outputs:
    """What happens to one norm's output: values on the way and the linears that read them."""

    values: dict[fx.Node, Axis] = field(default_factory=dict)
    linears: list[Linear] = field(default_factory=list)


@register
class CompressZeroMean(Pass):
    """Store zero-mean residual streams in d − 1 coordinates; needs FoldAffine and RemoveMean first.

    All norms of one stream or none.
    """

    name = "compress_zero_mean"
    promise = "exact"

    def __init__(self) -> None:
        super().__init__()

    @classmethod
    def identity(cls) -> Sequence[tuple[sympy.Matrix, sympy.Matrix]]:
        """RMSNorm of a zero-mean vector from d − 1 coordinates; a linear reader of the result."""
        import sympy

        d, k = 4, 2
        eps = sympy.Symbol("epsilon", positive=True)
        u = sympy.Matrix(d - 1, 1, sympy.symbols(f"u:{d - 1}", real=True))
        w = sympy.Matrix(k, d, sympy.symbols(f"w:{k * d}", real=True))
        v = sympy.Matrix(d, k, sympy.symbols(f"v:{d * k}", real=True))
        z = sympy.Matrix(k, 1, sympy.symbols(f"z:{k}", real=True))
        full = u.col_join(sympy.Matrix([[-sum(u)]]))
        rms = full / sympy.sqrt((full.T * full)[0] / d + eps)
        crms = u / sympy.sqrt(((u.T * u)[0] + sum(u) ** 2) / d + eps)
        folded = w[:, :-1] - w[:, -1] * sympy.ones(1, d - 1)
        return [
            (sympy.Matrix(rms[:-1]), crms),
            (w * rms, folded * crms),
            (sympy.Matrix((v * z)[:-1]), v[:-1, :] * z),
        ]

    def run(self, gm: fx.GraphModule, context: Context) -> PassResult:
        result = PassResult()
        done: set[str] = set()
        while True:
            found = streams(gm)
            changed = False
            for stream, centered in zip(found, centered_streams(found), strict=True):
                keys = [
                    r.node.meta["site"]
                    for r in stream.norms
                    if ir.is_call(r.node, nf.rms_norm, nf.add_rms_norm)
                ]
                keys = list(dict.fromkeys(keys))
                if not keys or not done.isdisjoint(keys):
                    continue
                done.update(keys)
                banned = next((k for k in keys if (self.name, k) in context.banned), keys[0])

                def plan(stream: Stream = stream, centered: bool = centered) -> Callable[[], None]:
                    return self._plan(gm, context, stream, centered)

                others = [k for k in keys if k != banned]
                if self.attempt(context, result, banned, plan):
                    result.applied += others
                    for r in stream.norms:
                        element = ir.dtype(r.value).itemsize
                        rows = _rows(r.value, r.axis)
                        result.savings[r.node.meta["site"]] = (2.0 * rows * element, 4.0 * rows)
                    changed = True
                    break
                reason = result.refused[-1][1]
                result.refused += [(k, reason) for k in others]
            if not changed:
                return result

    # -- planning ----------------------------------------------------------------------------

    def _plan(
        self, gm: fx.GraphModule, context: Context, stream: Stream, centered: bool
    ) -> Callable[[], None]:
        width = stream.width
        if not isinstance(width, int) or width < 2:
            raise Refuse(f"the stream's width {width} is not a fixed number of at least 2")
        self._check_norms(stream)
        if not centered:
            raise Refuse(
                "the stream is not zero-mean by construction (RemoveMean makes it so where "
                "LayerNorms read it)",
                stream.norms[0].node,
            )
        if stream.raw_readers or stream.taps:
            r = (*stream.raw_readers, *stream.taps)[0]
            raise Refuse(f"{r.label} reads the stream itself, in full width", r.value)
        if context.policy == "pays" and (width - 1) % ALIGNMENT:
            raise Refuse(
                f"does not pay: the compressed width {width - 1} is not a multiple of {ALIGNMENT}, "
                "so every row would be misaligned for vector units and tensor cores"
            )
        norms = {r.node for r in stream.norms}
        for value, axis in stream.values.items():
            self._check_value(stream, value, axis, norms)
        outputs = {n: _outputs(n) for n in norms}

        def commit() -> None:
            _Rewrite(WeightBuilder(gm.graph, context), stream, width).run(outputs)

        return commit

    @staticmethod
    def _check_norms(stream: Stream) -> None:
        for r in stream.norms:
            if not ir.is_call(r.node, nf.rms_norm):
                raise Refuse("a norm other than a plain RMSNorm reads the stream", r.node)
            args = ir.NormArgs(r.node)
            if args.gain is not None or args.bias is not None:
                raise Refuse(
                    "the norm has a gain or a bias, which treat coordinates unequally; fold them "
                    "first (FoldAffine)",
                    r.node,
                )
            if args.bounded:
                raise Refuse(
                    "the norm bounds its statistic from below instead of adding eps", r.node
                )
            if list(args.dims) != [-1]:
                raise Refuse(f"normalizes over dims {list(args.dims)}, not the last one", r.node)

    @staticmethod
    def _check_value(stream: Stream, value: fx.Node, axis: Axis, norms: set[fx.Node]) -> None:
        if not axis.whole or len(axis.dims) != 1:
            raise Refuse("the features are only a part of a dim here", value)
        if value not in {w.node for w in stream.writers}:
            _check_sizes(value, axis)
        for user in users(value):
            if user in norms or (user in stream.values and _enters(user, value, stream)):
                continue
            if ir.is_call(user, aten.sym_size):
                dim = user.args[1] if len(user.args) > 1 else None
                rank = len(ir.shape(value))
                if isinstance(dim, int) and dim % rank - rank != axis.dims[0]:
                    continue
            raise Refuse("reads the stream's full width", user)


def _enters(user: fx.Node, value: fx.Node, stream: Stream) -> bool:
    return any(o is value for o, _ in stream.operands(user))


def _rows(value: fx.Node, axis: Axis) -> int:
    width = axis.size(ir.shape(value))
    return cost.numel(value) // width if isinstance(width, int) else 1


def _check_sizes(node: Any, axis: Axis) -> None:
    """Refuse ops whose result width we cannot state anew."""
    if ir.is_call(node, *_UNSIZED):
        raise Refuse("takes its shape from elsewhere", node)
    if ir.is_call(node, *_RESHAPES):
        sizes = node.args[1] if len(node.args) > 1 else node.kwargs.get("size")
        if not isinstance(sizes, (list, tuple)) or not isinstance(sizes[axis.dims[0]], int):
            raise Refuse("the stream's width is written here as a computed number", node)


def _outputs(norm: fx.Node) -> _Outputs:
    """All linear readers of a norm's output; refuse if anything else reads it."""
    out = _Outputs()
    stack: list[tuple[fx.Node, Axis]] = [(norm, Axis((-1,)))]
    while stack:
        value, axis = stack.pop()
        for user in users(value):
            if user in out.values:
                continue
            linear = match_features(user, axis.dims)
            if linear is not None:
                if (
                    linear.input is value
                    and axis == Axis((linear.feature_in,))
                    and linear.groups == 1
                    and linear.layout != "grouped_mm"  # wants aligned rows
                    and is_weight(linear.weight)
                ):
                    out.linears.append(linear)
                    continue
                raise Refuse("reads the norm's output, but not as features of its input", user)
            if ir.is_call(user, aten.sym_size):
                dim = user.args[1] if len(user.args) > 1 else None
                rank = len(ir.shape(value))
                if isinstance(dim, int) and dim % rank - rank != axis.dims[0]:
                    continue
            found = result_axis(user, value, axis)
            links = operands(user, found) if found is not None else None
            if found is None or links is None or len(links) != 1 or not found.whole:
                raise Refuse(
                    "reads the norm's output and is not linear, so it needs all coordinates", user
                )
            _check_sizes(user, found)
            out.values[user] = found
            stack.append((user, found))
    return out


class _Rewrite:
    """The commit: narrows writers, then everything downstream in order."""

    def __init__(self, builder: WeightBuilder, stream: Stream, width: int) -> None:
        self.builder, self.graph = builder, builder.graph
        self.stream, self.width = stream, width

    def run(self, outputs: dict[fx.Node, _Outputs]) -> None:
        stream = self.stream
        written = {w.node for w in stream.writers if w.user is None}
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        for w in stream.writers:
            self._narrow_writer(w)
        for value, axis in stream.values.items():
            if value not in written:
                self._narrow_value(value, axis)
        for r in stream.norms:
            self._to_crms(r.node)
        for out in outputs.values():
            for value in sorted(out.values, key=order.__getitem__):
                self._narrow_value(value, out.values[value])
            for linear in dict.fromkeys(lin.node for lin in out.linears):
                self._narrow_reader(linear)

    def _dropped(self, weight: fx.Node, dim: int) -> fx.Node:
        """``weight`` without its last index along ``dim``."""
        work = self.builder.work(weight)
        part = self.builder.emit(aten.slice.Tensor, work, dim, 0, self.width - 1)
        return self.builder.finish(part, ir.dtype(weight))

    def _narrow_writer(self, w: Writer) -> None:
        if w.kind == "weight":
            assert w.user is not None
            w.user.replace_input_with(w.node, self._dropped(w.node, w.axis.dims[0]))
        elif w.kind == "embedding":
            table: Any = w.source.args[0]
            w.source.update_arg(0, self._dropped(table, -1))
            ir.set_val(w.source)
        elif w.linear is not None:
            axis = linear_out_axis(w.linear, w.source_axis)
            assert axis is not None
            changes = {"weight": self._dropped(w.linear.weight, axis.dims[0])}
            if w.linear.bias is not None:
                changes["bias"] = self._dropped(w.linear.bias, -1)
            w.linear.rebuild(**changes)
        else:
            self._slice_after(w.node, w.axis)

    def _slice_after(self, value: fx.Node, axis: Axis) -> None:
        stream = self.stream
        inside = set(stream.values) | {r.node for r in stream.norms if r.value is value}
        last = value
        if value.op == "placeholder":
            last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            new = ir.emit(
                self.graph, aten.slice.Tensor, value, axis.dims[0], 0, self.width - 1, like=value
            )
        for user in list(value.users):
            parts = user.users if ir.is_call(user, *SPLITS) else (user,)
            if user is not new and any(p in inside for p in parts):
                user.replace_input_with(value, new)

    def _narrow_value(self, value: Any, axis: Axis) -> None:
        """Restate the width where a shape op spells it, and recompute the fake value."""
        dim = axis.dims[0]
        if ir.is_call(value, *_RESHAPES):
            sizes = list(value.args[1])
            if sizes[dim] != -1:
                sizes[dim] = self.width - 1
            value.update_arg(1, sizes)
        for arg in value.all_input_nodes:
            if ir.is_call(arg, *SPLITS):
                ir.set_val(arg)
        ir.set_val(value)
        if not ir.same_dim(ir.shape(value)[dim], self.width - 1):
            raise AssertionError(f"{value.name} kept its width {ir.shape(value)}")

    def _to_crms(self, node: Any) -> None:
        args = ir.NormArgs(node)
        node.target = nf.crms_norm.default
        node.args = (args.x, None, None, args.eps)
        node.kwargs = args.casts
        ir.set_val(node)

    def _narrow_reader(self, node: fx.Node) -> None:
        linear = match_linear(node)
        assert linear is not None
        dim, emit = linear.in_dim, self.builder.emit
        w = self.builder.work(linear.weight)
        head = emit(aten.slice.Tensor, w, dim, 0, self.width - 1)
        last = emit(aten.slice.Tensor, w, dim, self.width - 1, self.width)
        weight = emit(aten.sub.Tensor, head, last)
        linear.rebuild(weight=self.builder.finish(weight, ir.dtype(linear.weight)))
