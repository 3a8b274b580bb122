"""FoldAffine: a norm's gain and bias move into the linear layers that read it.

``W (γ ⊙ n + β) + b = (W diag(γ)) n + (b + W β)``: the bias is folded with the weight as it was
(FlashNorm, 2024, section 2; Jiang et al., 2023, step 0). All readers or none.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from .. import cost, ir
from ..contract import Context, Pass, PassResult, register
from ..errors import Refuse
from ..exposure import Exposed, hidden_channels, sentence
from ..linear import is_weight, set_args
from ..readers import check_readers, feature_axis, fold_into_readers
from ..weight_builder import WeightBuilder

if TYPE_CHECKING:
    import sympy

nf = ir.nf


def foldable_value(node: fx.Node) -> fx.Node:
    """The normed result of a norm whose gain and bias are weights: itself, or part 0 of a pair.

    Raises:
        Refuse: gain or bias come from activations, or nobody reads the result.
    """
    args = ir.NormArgs(node)
    for name in ("gain", "bias"):
        t = getattr(args, name)
        if t is not None and not is_weight(t):
            raise Refuse(f"the norm's {name} {ir.why_no_weight(t)}", t)
    if not ir.is_call(node, nf.add_rms_norm, nf.add_layer_norm):
        return node
    value = next((u for u in node.users if u.args[1] == 0), None)
    if value is None:
        raise Refuse("nobody reads the normed result", node)
    return value


@register
class FoldAffine(Pass):
    """Fold gains and biases of norms into every linear reader.

    A gain near zero may hide a huge channel from its readers; folding it hands them the raw channel
    (:mod:`~normfuse.passes.exposure`). The report then says so, and a warning.

    Args:
        copy_tied: also fold into heads whose weight is an embedding table, at the price of a copy.
        keep: site keys or glob patterns of norms that keep their gain.
    """

    name = "fold_affine"
    promise = "exact"

    def __init__(self, *, copy_tied: bool = False, keep: str | Iterable[str] = ()) -> None:
        self.keep = (keep,) if isinstance(keep, str) else tuple(keep)
        super().__init__(copy_tied=copy_tied, keep=self.keep)
        self.copy_tied = copy_tied

    @classmethod
    def identity(cls) -> Sequence[tuple[sympy.Matrix, sympy.Matrix]]:
        """Bias before gain, for a plain layer and for features repeated over heads."""
        import sympy

        d, k, heads = 3, 2, 2
        w = sympy.Matrix(k, d, sympy.symbols(f"w:{k * d}", real=True))
        b = sympy.Matrix(k, 1, sympy.symbols(f"b:{k}", real=True))
        n = sympy.Matrix(d, 1, sympy.symbols(f"n:{d}", real=True))
        gain = sympy.Matrix(d, 1, sympy.symbols(f"g:{d}", real=True))
        beta = sympy.Matrix(d, 1, sympy.symbols(f"h:{d}", real=True))
        big = sympy.Matrix(k, d * heads, sympy.symbols(f"u:{k * d * heads}", real=True))
        rows = sympy.Matrix(d * heads, 1, sympy.symbols(f"m:{d * heads}", real=True))
        tiled = sympy.Matrix([*gain, *gain])
        shift = sympy.Matrix([*beta, *beta])
        return [
            (
                w * (gain.multiply_elementwise(n) + beta) + b,
                (w * sympy.diag(*gain)) * n + (b + w * beta),
            ),
            (
                big * (tiled.multiply_elementwise(rows) + shift),
                (big * sympy.diag(*tiled)) * rows + big * shift,
            ),
        ]

    def run(self, gm: fx.GraphModule, context: Context) -> PassResult:
        result = PassResult()
        builder = WeightBuilder(gm.graph, context)
        exposed: list[Exposed] = []
        measured = None if context.calibration is None else context.calibration.hidden()
        for node in ir.norm_nodes(gm):
            args = ir.NormArgs(node)
            if args.gain is None and args.bias is None:
                continue
            key = node.meta["site"]

            def plan(node: fx.Node = node, args: Any = args) -> Callable[[], None]:
                return self._plan(node, args, context, builder)

            saved = cost.Cost(
                sum(cost.nbytes(t) for t in (args.gain, args.bias) if t is not None),
                cost.numel(args.x) * sum(t is not None for t in (args.gain, args.bias)),
            )
            if self.attempt(context, result, key, plan):
                result.savings[key] = (saved.bytes, saved.flops)
                found = hidden_channels(gm, key, args.gain, measured)
                exposed += [found] if found is not None else []
        if exposed:
            result.warnings.append(sentence(exposed))
        return result

    def _plan(
        self, node: fx.Node, args: Any, context: Context, builder: WeightBuilder
    ) -> Callable[[], None]:
        if ir.is_call(node, nf.gated_rms_norm):
            raise Refuse("a gated norm's own gate reads the scaled result", node)
        if ir.is_call(node, nf.seed_norm):
            raise Refuse("the norm adds an input-dependent term to its gain", node)
        if any(
            node.meta["site"] == k or fnmatch.fnmatchcase(node.meta["site"], k) for k in self.keep
        ):
            raise Refuse("its gain is kept on request (keep=)")
        if node.meta.get("absorbed"):
            raise Refuse("its gain keeps channels out that absorb_outliers moved into biases", node)
        value = foldable_value(node)
        axis = feature_axis(value, (args.gain, args.bias), args.dims)
        readings = check_readers(
            value,
            axis,
            gain=args.gain is not None,
            shift=args.bias is not None,
            copy_tied=self.copy_tied,
        )
        if context.policy == "pays" and context.training:
            weights = sum(cost.numel(r.linear.weight) for r in readings)
            raise Refuse(
                f"does not pay in training: {weights:,} weight elements would be scaled at every "
                f"step to spare {cost.numel(value):,} multiplications that fuse into the norm",
                node,
            )
        sizes = [ir.shape(value)[d] for d in axis.dims]

        def commit() -> None:
            fold_into_readers(
                builder,
                readings,
                lambda t: builder.vector(t, axis.dims, sizes),
                args.gain,
                args.bias,
            )
            # the gain may have promoted the result: keep its dtype
            set_args(node, gain=None, bias=None, out_dtype=ir.dtype(value))

        return commit
