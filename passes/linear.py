"""Linear layers in the IR: recognizing and rebuilding them.

Every op that maps features linearly through a weight we own becomes one :class:`Linear`, whatever
its spelling: ``aten.linear``, ``addmm`` (weight ``[in, out]``), ``mm``/``matmul`` with the weight on
either side, stacks of expert matrices, convolutions of any rank with groups. The passes never look
at a spelling again.

Weights may be expressions already (:func:`ir.is_weight_expr`), so passes compose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import ir

aten = torch.ops.aten
nf = torch.ops.normfuse

_KEEP: Any = object()


@dataclass(frozen=True)
class Linear:
    """One linear layer: ``result = input · weight (+ bias)``.

    All dims are negative.

    Attributes:
        node: the op itself.
        input, weight, bias: its operands. ``weight`` is a weight expression for every layout but
            ``"linear"``, ``"addmm"``, ``"scaled_linear"`` and convolutions, where callers check;
            ``bias`` may be any tensor that is added to the result.
        layout: ``"linear"``, ``"scaled_linear"``, ``"addmm"``, ``"mm"``, ``"matmul"``, ``"bmm"``,
            ``"baddbmm"``, ``"grouped_mm"``, ``"conv"`` or ``"conv_transpose"``; with the weight as
            first operand ``"left_mm"``, ``"left_matmul"``, ``"left_bmm"`` (columns of features),
            ``"left_linear"`` (rows in, columns out) and ``"mv"`` (one vector).
        in_dim, out_dim: dims of ``weight`` that hold the input and output features.
        feature_in, feature_out: dims of ``input`` and of the result that hold the features.
        groups: of a convolution.
        pads: a convolution that adds zeros around its input (or a transposed one): a constant
            input does not give a constant result.
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    layout: str
    in_dim: int
    out_dim: int
    feature_in: int = -1
    feature_out: int = -1
    groups: int = 1
    pads: bool = False

    @property
    def in_features(self) -> Any:
        """Size of the input's feature dim."""
        return ir.shape(self.input)[self.feature_in]

    @property
    def out_features(self) -> Any:
        """Size of the result's feature dim."""
        return ir.shape(self.node)[self.feature_out]

    @property
    def stacked(self) -> bool:
        """True for a stack of matrices (experts)."""
        return "conv" not in self.layout and len(ir.shape(self.weight)) > 2

    @property
    def owned(self) -> bool:
        """True if weight and bias are weight expressions, so that new ones can be computed."""
        return is_weight(self.weight) and (self.bias is None or is_weight(self.bias))

    def rebuild(self, *, input: Any = _KEEP, weight: Any = _KEEP, bias: Any = _KEEP) -> fx.Node:
        """Replace operands in place; what is not given stays. Returns the node of the result.

        A bias for an op without a slot for one changes the op (``mm`` becomes ``addmm``) or adds
        an ``aten.add`` behind it, which then is the returned node: ``self.node`` in either case,
        so that users need no redirection.
        """
        node = self.node
        input = self.input if input is _KEEP else input
        weight = self.weight if weight is _KEEP else weight
        bias = self.bias if bias is _KEEP else bias
        old = (self.input, self.weight, self.bias)
        if self.layout.startswith("left") or self.layout == "mv":
            self._rebuild_left(input, weight, bias)
        elif self.layout in ("linear", "scaled_linear", "conv", "conv_transpose"):
            set_args(node, input=input, x=input, weight=weight, bias=bias)
        elif self.layout in ("addmm", "mm"):
            node.target = aten.mm.default if bias is None else aten.addmm.default
            node.args = (input, weight) if bias is None else (bias, input, weight)
            node.kwargs = {}
        elif self.layout in ("bmm", "baddbmm"):
            node.target = aten.bmm.default if bias is None else aten.baddbmm.default
            node.args = (input, weight) if bias is None else (bias, input, weight)
            node.kwargs = {}
        else:
            args = (input, weight, *node.args[2:])
            self._rebuild_product(args, bias)
        # computing fake values is what costs at 1,000 blocks: only where they change
        if not all(map(_alike, old, (input, weight, bias))):
            ir.set_val(node)
        return node

    def _rebuild_product(self, args: tuple, bias: fx.Node | None) -> None:
        """The op with other operands, and an ``aten.add`` behind it if there is a bias."""
        node = self.node
        if bias is None:
            node.args = args
            return
        with node.graph.inserting_before(node):
            options: dict[str, Any] = dict(node.kwargs)
            inner = ir.emit(node.graph, node.target, *args, like=node, **options)
        node.target, node.args, node.kwargs = aten.add.Tensor, (inner, bias), {}

    def _rebuild_left(self, input: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
        if bias is not None and self.feature_out == -2 and len(ir.shape(bias)) == 1:
            with self.node.graph.inserting_before(self.node):  # one number a row of the result
                bias = ir.emit(
                    self.node.graph, aten.unsqueeze.default, bias, -1, like=bias, weight=True
                )
        self._rebuild_product((weight, input), bias)


def _alike(a: fx.Node | None, b: fx.Node | None) -> bool:
    """True if a layer's result does not change shape or dtype when ``b`` takes ``a``'s place."""
    if a is None or b is None:
        return a is b
    return a is b or (ir.dtype(a) == ir.dtype(b) and ir.same_shape(ir.shape(a), ir.shape(b)))


def set_args(node: fx.Node, **changes: Any) -> None:
    """Set arguments by schema name (names the op does not have are ignored)."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: v for a, v in zip(schema, node.args, strict=False)}
    given.update(node.kwargs)
    names = {a.name for a in schema}
    given.update({k: v for k, v in changes.items() if k in names})
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for a in schema:
        if a.name in given and not a.kwarg_only and len(args) == schema.index(a):
            args.append(given[a.name])
        elif a.name in given and given[a.name] != a.default_value:
            kwargs[a.name] = given[a.name]
    node.args, node.kwargs = tuple(args), kwargs


# ---------------------------------------------------------------------------------------------
# Matching

# Whether a node is a weight expression does not change while a graph lives: passes replace operands
# of activations by other activations. One memo per graph keeps matching linear in graph size.
# It is kept on the graph, which its nodes refer to: a dictionary elsewhere would never let go of either.
_MEMO = "_normfuse_weights"


def is_weight(node: Any) -> bool:
    """:func:`ir.is_weight_expr`, remembered per graph."""
    if not isinstance(node, fx.Node):
        return False
    return ir.is_weight_expr(node, vars(node.graph).setdefault(_MEMO, {}))


def forget(graph: fx.Graph) -> None:
    """Which nodes are weights has changed."""
    vars(graph).pop(_MEMO, None)


def match_linear(node: Any) -> Linear | None:
    """The linear layer that ``node`` computes, or ``None``.

    Operands that are activations on both sides (attention scores) are not linear layers; for
    ``aten.linear``, ``addmm`` and convolutions the second operand is called the weight whatever it
    is, see :attr:`Linear.owned`.
    """
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    packet = getattr(node.target, "overloadpacket", None)
    rule = _MATCHERS.get(packet) or _BY_NAME.get(getattr(packet, "_qualified_op_name", None))
    if rule is None or node.meta.get("mutated") or not ir.is_tensor(node):
        return None
    if not ir.dtype(node).is_floating_point:
        return None
    return rule(node)


def match_features(node: Any, dims: Sequence[int]) -> Linear | None:
    """:func:`match_linear` for whoever follows the features in ``dims`` (negative).

    ``A @ x`` with features in the last dim of ``x`` mixes rows and treats all features alike: it is
    a linear layer of other features, not of these.
    """
    linear = match_linear(node)
    if linear is not None and linear.feature_in == -2 and "left" in linear.layout:
        return None if tuple(dims) == (-1,) else linear
    return linear


def _floats(*nodes: Any) -> bool:
    return all(ir.is_tensor(n) and ir.dtype(n).is_floating_point for n in nodes)


def _rank(node: fx.Node) -> int:
    return len(ir.shape(node))


def _match_linear(node: fx.Node) -> Linear | None:
    a = ir.bind(node)
    x, w = a["input"], a["weight"]
    if not _floats(x, w) or _rank(w) != 2:
        return None
    if a["bias"] is None and _rank(x) == 2 and is_weight(x) and not is_weight(w):
        return Linear(node, w, x, None, "left_linear", -1, -2, -1, -2)
    return Linear(node, x, w, a["bias"], "linear", -1, -2)


def _match_scaled_linear(node: fx.Node) -> Linear | None:
    a = ir.bind(node)
    return Linear(node, a["x"], a["weight"], a["bias"], "scaled_linear", -1, -2)


def _match_addmm(node: fx.Node) -> Linear | None:
    a = ir.bind(node)
    if node.target is not aten.addmm.default or a["beta"] != 1 or a["alpha"] != 1:
        return None
    if is_weight(a["mat1"]):
        return None
    return Linear(node, a["mat1"], a["mat2"], a["self"], "addmm", -2, -1)


def _match_baddbmm(node: fx.Node) -> Linear | None:
    a = ir.bind(node)
    if node.target is not aten.baddbmm.default or a["beta"] != 1 or a["alpha"] != 1:
        return None
    if not is_weight(a["batch2"]) or is_weight(a["batch1"]):
        return None
    return Linear(node, a["batch1"], a["batch2"], a["self"], "baddbmm", -2, -1)


def _match_product(layout: str) -> Any:
    def match(node: fx.Node) -> Linear | None:
        args: Any = node.args
        if len(args) < 2:
            return None
        x, w = args[:2]
        if _floats(x, w) and is_weight(x) and not is_weight(w):
            return left(node, x, w)
        if not _floats(x, w) or not is_weight(w) or is_weight(x) or _rank(w) < 2:
            return None
        if _rank(w) > 2 and _rank(x) < 2:
            return None  # the result of a vector times a stack has another rank
        return Linear(node, x, w, None, layout, -2, -1)

    def left(node: fx.Node, w: fx.Node, x: fx.Node) -> Linear | None:
        if _rank(x) == 1:
            return Linear(node, x, w, None, "mv", -1, -2) if _rank(w) == 2 else None
        if _rank(w) < 2 or layout == "mv":
            return None
        return Linear(node, x, w, None, f"left_{layout}", -1, -2, -2, -2)

    return match


def _match_grouped_mm(node: fx.Node) -> Linear | None:
    a = ir.bind(node)
    x: Any = a.get("self", a.get("input"))
    w: Any = a.get("mat2", a.get("weight"))
    if not is_weight(w) or is_weight(x) or _rank(x) != 2 or _rank(w) != 3:
        return None
    return Linear(node, x, w, a.get("bias"), "grouped_mm", -2, -1)


def _match_conv(node: fx.Node) -> Linear | None:
    a = ir.bind(node)
    x, w = a["input"], a["weight"]
    if not _floats(x, w):
        return None
    spatial = _rank(w) - 2
    transposed = a.get("transposed", "conv_transpose" in str(node.target))
    padding = a["padding"]
    if isinstance(padding, str):
        pads = padding != "valid" and any(k != 1 for k in ir.shape(w)[2:])
    else:
        padding = [padding] if isinstance(padding, int) else padding
        pads = any(not (isinstance(p, int) and p == 0) for p in padding)
    features = -spatial - 1
    dims = (features - 1, features) if transposed else (features, features - 1)
    return Linear(
        node,
        x,
        w,
        a["bias"],
        "conv_transpose" if transposed else "conv",
        *dims,
        features,
        features,
        a["groups"],
        bool(transposed) or pads,
    )


_MATCHERS: dict[Any, Any] = {
    aten.linear: _match_linear,
    nf.scaled_linear: _match_scaled_linear,
    aten.addmm: _match_addmm,
    aten.baddbmm: _match_baddbmm,
    aten.mm: _match_product("mm"),
    aten.mv: _match_product("mv"),
    aten.bmm: _match_product("bmm"),
    aten.matmul: _match_product("matmul"),
    aten.conv1d: _match_conv,
    aten.conv2d: _match_conv,
    aten.conv3d: _match_conv,
    aten.convolution: _match_conv,
    aten.conv_transpose1d: _match_conv,
    aten.conv_transpose2d: _match_conv,
    aten.conv_transpose3d: _match_conv,
}
if hasattr(aten, "_grouped_mm"):
    _MATCHERS[aten._grouped_mm] = _match_grouped_mm

#: ops of other libraries, known by name so that nothing is imported for them: the grouped product
#: that mixture-of-experts layers fall back to where ``aten._grouped_mm`` is missing
_BY_NAME: dict[Any, Any] = {"transformers::grouped_mm_fallback": _match_grouped_mm}


# ---------------------------------------------------------------------------------------------
# Weights

_VIEWS = (
    aten.t,
    aten.transpose,
    aten.permute,
    aten.view,
    aten.reshape,
    aten.detach,
    aten.alias,
    aten.to,
    aten._to_copy,
)


def leaf_of(weight: fx.Node) -> fx.Node:
    """The tensor behind views and casts of a weight (``weight`` itself if it is computed)."""
    leaf: Any = weight
    while ir.is_call(leaf, *_VIEWS):
        leaf = leaf.args[0]
    return leaf


def table_user(weight: fx.Node) -> fx.Node | None:
    """The embedding that reads the same parameter as ``weight`` (a tied head), if there is one."""
    stack = [leaf_of(weight)]
    while stack:
        node = stack.pop()
        for user in node.users:
            if ir.is_call(user, aten.embedding, aten.embedding_bag) and user.args[0] is node:
                return user
            if ir.is_call(user, *_VIEWS):
                stack.append(user)
    return None


def linear_names(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """A name for every linear layer of a graph: its module's path, ``path#1`` for a second call.

    Calibration stores its figures under these names; graphs of the same model share them.
    """
    seen: dict[str, int] = {}
    out: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        linear = match_linear(node)
        if linear is None or not ir.is_weight_expr(linear.weight):
            continue
        name = ir.module_path(node) or node.name
        n = seen.get(name, 0)
        seen[name] = n + 1
        out[node] = f"{name}#{n}" if n else name
    return out
