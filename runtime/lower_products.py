"""Linear layers behind a norm to ``norm_linear``: one product, the statistic taken inside it.

Two shapes of graph come here: a row scale that ``defer_scale`` moved behind a product
(``scaled_linear`` with the ``row_rstd`` of its own input), and a gainless norm whose only readers are
linear layers. All layers that read one norm are lowered together or not at all: a single remaining
reader would need the normed tensor, which then might as well serve all.

The activation behind a product, and gated pairs (``act(gate)·up`` of two layers or of the halves of
one), are computed in the product's epilogue.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..passes import cost, ir
from ..passes.axis import dropout_is_active, is_dropout
from ..passes.errors import Refuse
from ..passes.linear import Linear, match_linear
from . import devices
from .lower_checks import (
    DTYPES,
    KINDS,
    MEASURED,
    Lowering,
    ask,
    casts,
    emit_before,
    float32_statistic,
    last_dim,
    measured,
    same_layout,
    take,
    tensor,
    vector,
)

aten = torch.ops.aten
nf = torch.ops.normfuse

_ADDING = (nf.add_layer_norm.default, nf.add_rms_norm.default)
_VIEWS = (aten.view, aten.reshape, aten._unsafe_view, aten.flatten)
_CASTS = (torch.ops.prims.convert_element_type, aten.to, aten._to_copy, aten.contiguous, aten.alias)
_ACTIVATIONS = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
    aten.sigmoid.default: "sigmoid",
}


@dataclass
class Statistic:
    """What the rows are scaled by: a statistic of the input itself, or any given scale."""

    kind: str = ""
    eps: float = 0.0
    scale: fx.Node | None = None


@dataclass
class Product:
    """One linear layer, its un-normalized input reshaped as the layer takes it.

    ``shape`` are the sizes the normed tensor was viewed as before this layer (``None``: as it is),
    ``rounded`` the dtypes it went through, its own first.
    """

    layer: Linear
    shape: list[Any] | None = None
    rounded: tuple[torch.dtype, ...] = ()

    @property
    def node(self) -> fx.Node:
        return self.layer.node


@dataclass
class Job:
    """A product or a gated pair of products; ``last`` is the node whose value the kernel writes.

    ``halves`` names the rows of the one weight that hold gate and up, ``pair`` the second layer.
    """

    product: Product
    act: str
    last: fx.Node
    up: Product | None = None
    halves: tuple[slice, slice] | None = None

    @property
    def dual(self) -> bool:
        return self.up is not None or self.halves is not None

    def layer_cost(self) -> devices.Layer:
        n = cost.hint(self.product.layer.out_features)
        n = n // 2 if self.halves else n
        return devices.Layer(n, self.dual, self.dual or self.act != "identity")


def lower_products(gm: fx.GraphModule, nk: Any, model: Any, policy: str) -> list[Lowering]:
    """Replace norms and the products behind them, in place; one entry per norm or deferred scale."""
    out = []
    for node in list(gm.graph.nodes):
        if node._erased or node.op != "call_function":
            continue
        if node.target in KINDS:
            found = _behind_norm
        elif node.target is nf.scaled_linear.default:
            found = _deferred
        else:
            continue
        key = node.meta.get("site", node.name)
        name = node.target._schema.name.split("::")[1]
        try:
            out += [Lowering(key, name, *done) for done in found(node, nk, model, policy)]
        except Refuse as refusal:
            out.append(Lowering(key, name, "", refusal.reason))
    return out


# --- a norm and all its readers --------------------------------------------------------------------


def _behind_norm(norm: fx.Node, nk: Any, model: Any, policy: str) -> list[tuple[str, str]]:
    if not _feeds_linear(norm):
        return []
    args = ir.NormArgs(norm)
    x = tensor(args.x, "the input")
    if args.gain is not None or args.bias is not None:
        raise Refuse("the norm has a gain or a bias of its own, which no product can apply")
    result = norm
    adding = norm.target in _ADDING
    if adding:
        tensor(args.residual, "the residual")
        parts = list(norm.users)
        if any(u.target is not operator.getitem for u in parts):
            raise Refuse("the pair of results is used as a whole")
        normed = [u for u in parts if u.args[1] == 0]
        if len(normed) != 1:
            raise Refuse("the normed result is taken out of the pair more than once")
        result, x = normed[0], ir.val(norm)[1]
    last_dim(args, x)
    float32_statistic(args, x)
    casts(args)
    rounded = tuple(d for d in (args.norm_dtype, args.out_dtype) if d is not None)
    products = list(_readers(result, result, Path(None, rounded)))
    for product in products:
        _check(product, x.dtype)
    jobs = _jobs(products)
    for job in jobs:
        same_layout(job.last)
    reason = _pays(jobs, x, policy, model, deferred=False)
    statistic = Statistic(KINDS[norm.target], args.eps)
    source = args.x
    if adding:
        source = emit_before(norm, aten.add.Tensor, args.x, args.residual)
        for part in list(norm.users):
            if part.args[1] == 1:
                ir.replace(part, source)
    for job in jobs:
        _commit(job, nk, source, statistic)
    for node in (result, norm):
        _erase(node)
    return [("norm_linear", reason)] * len(jobs)


def _passes_through(node: fx.Node) -> bool:
    return ir.is_call(node, *_CASTS) or (is_dropout(node) and not dropout_is_active(node))


def _feeds_linear(node: fx.Node) -> bool:
    """True if a linear layer reads ``node``, directly or through views and casts."""
    for user in node.users:
        layer = match_linear(user)
        if layer is not None and layer.input is node:
            return True
        through = user.target is operator.getitem or ir.is_call(user, *_VIEWS)
        if (through or _passes_through(user)) and _feeds_linear(user):
            return True
    return False


@dataclass(frozen=True)
class Path:
    """What became of a normed tensor on the way to a layer: see :class:`Product`."""

    shape: list[Any] | None
    rounded: tuple[torch.dtype, ...]


def _readers(norm: fx.Node, at: fx.Node, path: Path) -> Iterator[Product]:
    """The linear layers behind views and casts of ``at``."""
    path = replace(path, rounded=(*path.rounded, ir.dtype(at)))
    for user in at.users:
        layer = match_linear(user)
        if layer is not None and layer.input is at and at not in (layer.weight, layer.bias):
            yield Product(layer, path.shape, path.rounded)
        elif _passes_through(user):
            yield from _readers(norm, user, path)
        elif ir.is_call(user, *_VIEWS) and ir.same_dim(ir.shape(user)[-1], ir.shape(norm)[-1]):
            sizes = user.args[1] if not ir.is_call(user, aten.flatten) else list(ir.shape(user))
            yield from _readers(norm, user, replace(path, shape=list(sizes)))
        else:
            raise Refuse(f"{ir.describe(user)} needs the normed tensor too")


def _check(product: Product, dtype: torch.dtype) -> None:
    layer = product.layer
    if layer.layout not in ("linear", "addmm", "mm", "matmul") or layer.stacked:
        raise Refuse(f"a reader is a {layer.layout}, which no kernel computes")
    w = tensor(layer.weight, "the weight")
    if w.dim() != 2:
        raise Refuse(f"the weight has shape {tuple(w.shape)}, not two dims")
    vector(layer.bias, "the bias", layer.out_features)
    if ir.dtype(layer.node) != w.dtype:
        raise Refuse(f"the result is {ir.dtype(layer.node)}, the weight {w.dtype}")
    _check_rounding(dtype, product.rounded, w.dtype)


def _check_rounding(x: torch.dtype, way: Sequence[torch.dtype], weight: torch.dtype) -> None:
    """The kernel rounds a row once, to the weights' dtype and before it is scaled, where eager rounds
    the scaled row: the same up to that rounding. Anything coarser on the way it would leave out."""
    if not _combines(x, weight):
        why = "may overflow when they are rounded before they are scaled"
        if weight != torch.float16:
            why = "are not multiplied exactly by every device"
        raise Refuse(f"rows of {x} before a {weight} layer {why}")
    coarse = [d for d in way if torch.finfo(d).eps > torch.finfo(weight).eps]
    if coarse:
        raise Refuse(f"the normed tensor is rounded to {coarse[0]} before a {weight} layer")


def _combines(x: torch.dtype, weight: torch.dtype) -> bool:
    from .triton_ops.linear import combines

    return combines(x, weight)


# --- a scale that was moved behind its product already ---------------------------------------------


def _deferred(node: fx.Node, nk: Any, model: Any, policy: str) -> list[tuple[str, str]]:
    args = ir.NormArgs(node)
    x = tensor(args.x, "the input")
    own, source = _own_statistic(args)
    if own is None and policy != "always":
        raise Refuse("its scale is not the statistic of its own input: a library product is kept")
    statistic = Statistic(scale=args.scale) if own is None else Statistic("rms", own)
    # layers that share the statistic are decided together
    group = [node]
    if own is not None:
        group = [
            u
            for u in args.scale.users
            if u.target is nf.scaled_linear.default and ir.NormArgs(u).x is args.x
        ]
    products = []
    for member in group:
        a = ir.NormArgs(member)
        _check_scaled(a, x, ir.val(member))
        products.append(Product(Linear(member, a.x, a.weight, a.bias, "scaled_linear", -1, -2)))
    jobs = _jobs(products)
    for job in jobs:
        same_layout(job.last)
    reason = _pays(jobs, ir.val(source), policy, model, deferred=True)
    for job in jobs:
        _commit(job, nk, source, statistic)
    return [("scaled_linear" if own is None else "norm_linear", reason)] * len(jobs)


def _check_scaled(args: Any, x: torch.Tensor, result: torch.Tensor) -> None:
    w = tensor(args.weight, "the weight")
    if w.dim() != 2 or w.dtype != x.dtype:
        raise Refuse(f"the input is {x.dtype}, the weight {w.dtype} of shape {tuple(w.shape)}")
    vector(args.bias, "the bias", w.shape[0])
    if result.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Refuse(f"the result is {result.dtype}")
    scale = tensor(args.scale, "the scale")
    if scale.dim() != x.dim() or not ir.same_shape(scale.shape, (*x.shape[:-1], 1)):
        raise Refuse("the scale is not one number per row")


def _own_statistic(args: Any) -> tuple[float | None, fx.Node]:
    """The eps, if the scale is the row statistic of the very tensor that is multiplied, or of what
    was cast to it; and that tensor."""
    scale, x = args.scale, args.x
    if not ir.is_call(scale, nf.row_rstd):
        return None, x
    stat = ir.NormArgs(scale)
    if (
        stat.bounded
        or list(stat.dims) != [-1]
        or (stat.stat_dtype or ir.dtype(stat.x)) != torch.float32
    ):
        return None, x
    if stat.x is x:
        return stat.eps, x
    if ir.is_call(x, *_CASTS) and x.args[0] is stat.x and isinstance(stat.x, fx.Node):
        known = ir.dtype(stat.x) in DTYPES and _combines(ir.dtype(stat.x), ir.dtype(x))
        if known:
            return stat.eps, stat.x
    return None, x


# --- activations and gated pairs -------------------------------------------------------------------


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(node: fx.Node) -> tuple[str, fx.Node] | None:
    """The activation that is the only reader of ``node``."""
    user = _only_user(node)
    if user is None or user.args[:1] != (node,) or len(user.args) > 1:
        return None
    name = _ACTIVATIONS.get(user.target)
    if name is None or ir.dtype(user) != ir.dtype(node):
        return None
    if name == "gelu" and user.kwargs.get("approximate", "none") == "tanh":
        name = "gelu_tanh"
    return name, user


def _through_views(node: fx.Node) -> fx.Node:
    """The last of the views that are each the only reader of what they view."""
    while (user := _only_user(node)) is not None and ir.is_call(user, *_VIEWS):
        node = user
    return node


def _gating(gate: fx.Node, up: fx.Node) -> tuple[str, fx.Node] | None:
    """``(activation, product)`` if all that becomes of two values is ``act(gate)·up``."""
    act, end = _activation(gate) or ("identity", gate)
    user = _only_user(end)
    if user is None or user is not _only_user(up) or not ir.is_call(user, aten.mul.Tensor):
        return None
    if set(user.args) != {end, up} or ir.dtype(user) != ir.dtype(up):
        return None
    return act, user


def _halves(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two halves of the last dim, if they are all that is read of ``node``."""
    width = ir.concrete(ir.shape(node)[-1])
    if not isinstance(width, int) or width % 2:
        return None
    half, last = width // 2, (-1, len(ir.shape(node)) - 1)
    user = _only_user(node)
    if user is not None and ir.is_call(user, aten.chunk, aten.split, aten.split_with_sizes):
        size, dim = user.args[1], user.args[2] if len(user.args) > 2 else user.kwargs.get("dim", 0)
        wanted = 2 if ir.is_call(user, aten.chunk) else half
        if dim not in last or size not in (wanted, [half, half]):
            return None
        parts = {u.args[1]: u for u in user.users if u.target is operator.getitem}
        if len(user.users) != 2 or set(parts) != {0, 1}:
            return None
        return parts[0], parts[1]
    found: dict[int, fx.Node] = {}
    for user in node.users:
        if (
            not ir.is_call(user, aten.slice.Tensor)
            or len(user.args) < 4
            or user.args[1] not in last
        ):
            return None
        start, end = user.args[2] or 0, min(user.args[3], width)
        if (len(user.args) > 4 and user.args[4] != 1) or end - start != half or start in found:
            return None
        found[start] = user
    return (found[0], found[half]) if set(found) == {0, half} else None


def _merged_pair(product: Product) -> Job | None:
    """A layer whose halves gate one another."""
    node = product.node
    width = ir.concrete(ir.shape(node)[-1])
    if not isinstance(width, int) or width % 2:
        return None
    first, second = slice(0, width // 2), slice(width // 2, width)
    user = _only_user(node)
    if user is not None and ir.is_call(user, aten.glu):
        dim = user.args[1] if len(user.args) > 1 else -1
        if dim in (-1, len(ir.shape(node)) - 1):
            return Job(product, "sigmoid", user, halves=(second, first))
        return None
    parts = _halves(node)
    if parts is None:
        return None
    for (gate, up), rows in ((parts, (first, second)), (parts[::-1], (second, first))):
        found = _gating(gate, up)
        if found is not None:
            return Job(product, found[0], found[1], halves=rows)
    return None


def _separate_pair(a: Product, b: Product) -> Job | None:
    """Two layers of equal shape of which one gates the other."""
    la, lb = a.layer, b.layer
    alike = ir.same_shape(ir.shape(la.node), ir.shape(lb.node)) and la.in_dim == lb.in_dim
    if not alike or (la.bias is None) != (lb.bias is None) or a.shape != b.shape:
        return None
    if ir.dtype(la.node) != ir.dtype(lb.node) or ir.dtype(la.weight) != ir.dtype(lb.weight):
        return None
    for gate, up in ((a, b), (b, a)):
        found = _gating(gate.node, up.node)
        if found is not None:
            return Job(gate, found[0], found[1], up=up)
    return None


def _jobs(products: Sequence[Product]) -> list[Job]:
    jobs: list[Job] = []
    left = list(products)
    while left:
        product = left.pop(0)
        job = _merged_pair(product)
        if job is None:
            for other in left:
                job = _separate_pair(product, other)
                if job is not None:
                    left.remove(other)
                    break
        if job is None:
            end = _through_views(product.node)
            act, _ = _activation(end) or ("identity", end)
            job = Job(product, act, product.node)
        jobs.append(job)
    return jobs


# --- deciding and rewriting ------------------------------------------------------------------------


def _pays(jobs: list[Job], x: torch.Tensor, policy: str, model: Any, *, deferred: bool) -> str:
    k = cost.hint(x.shape[-1])
    m = cost.hint(x.numel()) // max(k, 1)
    layers = [job.layer_cost() for job in jobs]
    weight = max((ir.dtype(job.product.layer.weight) for job in jobs), key=lambda d: d.itemsize)
    if policy != "always" and x.dtype == weight:
        # measured with a norm of its own for each layer: for one that several share the model decides
        names = ["norm_linear pair" if layer.dual else "norm_linear" for layer in layers]
        found = [
            measured(name, x, weight, (m, layer.n, k))
            for name, layer in zip(names, layers, strict=True)
        ]
        if found == [True]:
            return MEASURED
    sizes = (weight.itemsize, layers, x.element_size())
    return ask(policy, model, lambda d: devices.norm_linear(d, m, k, *sizes, deferred=deferred))


def _operands(
    at: fx.Node, layer: Linear, rows: slice | None, centered: bool
) -> tuple[fx.Node, fx.Node | None, fx.Node | None]:
    """Weight ``[N, K]``, bias and (if ``centered``) the weight's sums over K: views but for the sums."""
    weight, bias = layer.weight, layer.bias
    if rows is not None:
        cut = (rows.start, rows.stop)
        weight = emit_before(at, aten.slice.Tensor, weight, layer.out_dim, *cut)
        bias = None if bias is None else emit_before(at, aten.slice.Tensor, bias, 0, *cut)
    sums = None
    if centered and ir.is_weight_expr(weight):
        sums = emit_before(
            at,
            aten.sum.dim_IntList,
            weight,
            [layer.in_dim],
            dtype=torch.float32,
            weight=True,
        )
    if layer.in_dim == -2:
        weight = emit_before(at, aten.t.default, weight)
    return weight, bias, sums


def _commit(job: Job, nk: Any, source: fx.Node, statistic: Statistic) -> None:
    node, last = job.product.node, job.last
    centered = statistic.kind == "layer"
    x = source
    if job.product.shape is not None:
        x = emit_before(last, aten.reshape.default, source, job.product.shape)
    first, second = job.halves or (None, None)
    weight, bias, sums = _operands(last, job.product.layer, first, centered)
    up: tuple[fx.Node | None, fx.Node | None, fx.Node | None] = (None, None, None)
    if job.dual:
        layer = job.up.layer if job.up is not None else job.product.layer
        up = _operands(last, layer, second, centered)
    dtype = ir.dtype(node)
    if statistic.scale is None:
        pair = emit_before(
            last,
            nk.norm_linear.default,
            *(x, weight, bias, sums, *up),
            *(statistic.eps, statistic.kind, job.act, dtype),
        )
        new = take(last, pair, 0)
    else:
        new = emit_before(
            last,
            nk.scaled_linear.default,
            *(x, weight, statistic.scale, bias, *up[:2], job.act, dtype),
        )
    if job.act != "identity" and last is node:
        _, activation = _activation(_through_views(node))  # type: ignore[misc]
        ir.replace(activation, activation.args[0])
    last.replace_all_uses_with(new)
    _erase(last)
    for product in (job.product, job.up):
        if product is not None:
            _erase(product.node)


def _erase(node: fx.Node) -> None:
    """Erase a node that has lost its readers, and then those that only it had read."""
    stack = [node]
    while stack:
        n = stack.pop()
        if n._erased or n.users or not (ir.is_pure(n) or _passes_through(n)):
            continue
        inputs = n.all_input_nodes
        n.graph.erase_node(n)
        stack += inputs
