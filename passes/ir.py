"""The IR: a pre-dispatch ATen ``fx.GraphModule`` plus a few facts on its nodes, and its specification.

Facts, all in ``node.meta``:

``val``
    The fake tensor (or SymInt, …) the node produces. Every node that yields a tensor has it.
``kind``
    On ``placeholder`` and ``get_attr`` nodes: ``"param"``, ``"buffer"``, ``"constant"`` or
    ``"input"``. Only the first three may enter weight programs; a buffer the graph mutates is an
    ``"input"``.
``fqn``
    On the same nodes: the qualified name of the parameter or buffer, or the input's name.
``module``
    The path of the user's module that produced the node (``transformer.h.3.ln_1``), or ``""``.
``mutated``
    The node's storage is written in place somewhere (see ``functionalize.py``): leave it alone.
``where``
    ``file:line`` of the innermost frame of the user's own code.
``site``
    On nodes of the norm vocabulary: the site's key, stable through rewrites (see ``report.Site``).
``region``
    The id of the checkpointed region the node belongs to, if any (see ``subgraphs.py``).
``spelling``
    On the same nodes: how the norm was written (``"nn.LayerNorm"``, ``"x*rsqrt(mean(x²)+eps)"``…).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import ops
from .errors import SpecError

aten = torch.ops.aten
nf = torch.ops.normfuse

WEIGHT_KINDS = frozenset({"param", "buffer", "constant"})

#: Pure ops that may appear in an expression of weights.
_PURE_NAMESPACES = ("aten::", "normfuse::", "prims::")
#: Whether an op is pure, as far as its schema says: asked for every node, many times.
_pure_targets: dict[Any, bool] = {}


# ---------------------------------------------------------------------------------------------
# Reading nodes


def val(node: Any) -> Any:
    """The fake value of ``node`` (``None`` if it has none)."""
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def concrete(size: Any) -> Any:
    """A size as a number if it is known to be one (its symbol was specialized later)."""
    if isinstance(size, torch.SymInt):
        known = size.node.maybe_as_int()
    elif isinstance(size, torch.SymFloat):
        known = size.node.maybe_as_float()
    else:
        return size
    return size if known is None else known


def shape(node: fx.Node) -> tuple:
    return tuple(concrete(s) for s in val(node).shape)


def symbolic(value: torch.Tensor) -> bool:
    """True if the sizes or strides of a fake tensor are symbols."""
    return bool(value._has_symbolic_sizes_strides)


def dtype(node: fx.Node) -> torch.dtype:
    return val(node).dtype


def is_tensor(node: Any) -> bool:
    return isinstance(val(node), torch.Tensor)


def is_call(node: Any, *targets: Any) -> bool:
    """True if ``node`` calls one of ``targets`` (overloads, or packets standing for all overloads)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if node.target in targets:
        return True
    packet = getattr(node.target, "overloadpacket", None)
    return packet is not None and packet in targets


def same_dim(a: Any, b: Any) -> bool:
    """Static equality of two sizes; never adds a guard."""
    return bool(statically_known_true(a == b))


def same_shape(a: Sequence, b: Sequence) -> bool:
    return len(a) == len(b) and all(same_dim(x, y) for x, y in zip(a, b, strict=True))


def kind(node: fx.Node) -> str | None:
    return node.meta.get("kind")


def is_weight(node: Any) -> bool:
    """True for a parameter, buffer or constant leaf."""
    return (
        isinstance(node, fx.Node)
        and node.op in ("placeholder", "get_attr")
        and node.meta.get("kind") in WEIGHT_KINDS
    )


def bind(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by schema name, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in schema}
    given.update({a.name: v for a, v in zip(schema, node.args, strict=False)})
    return {**given, **node.kwargs}


def running_stats_written(node: fx.Node) -> list[fx.Node]:
    """Buffers that a batch or instance norm updates although its schema does not say so."""
    if not is_call(node, aten.batch_norm, aten.instance_norm):
        return []
    given = bind(node)
    if not given.get("training", given.get("use_input_stats")):
        return []
    return [b for b in (given["running_mean"], given["running_var"]) if b is not None]


def is_pure(node: fx.Node) -> bool:
    """True if the node computes a function of its arguments: no mutation, no randomness."""
    if node.op != "call_function" or node.meta.get("mutated"):
        return False
    if node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    pure = _pure_targets.get(target)
    if pure is None:
        pure = _pure_targets[target] = (
            target._schema.name.startswith(_PURE_NAMESPACES)
            and not target._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in target.tags
            and not node.is_impure()
        )
    if not pure:
        return False
    return not running_stats_written(node)


def is_weight_expr(node: Any, _memo: dict[fx.Node, bool] | None = None) -> bool:
    """True if ``node`` is a tensor that depends on weights alone, through pure ops.

    A leaf weight counts; an expression without any weight leaf (``aten.ones``) counts too.
    """
    memo = {} if _memo is None else _memo
    if not isinstance(node, fx.Node):
        return False
    stack = [node]
    while stack:
        n = stack[-1]
        if n in memo:
            stack.pop()
            continue
        if n.op in ("placeholder", "get_attr"):
            memo[n] = is_weight(n)
            stack.pop()
            continue
        if n.op != "call_function" or not is_pure(n):
            memo[n] = False
            stack.pop()
            continue
        pending = [a for a in n.all_input_nodes if a not in memo]
        if pending:
            stack.extend(pending)
            continue
        memo[n] = all(memo[a] for a in n.all_input_nodes)
        stack.pop()
    return memo[node]


def why_no_weight(*nodes: Any) -> str:
    """Why (one of) these tensors is no weight that could be folded, as the end of a sentence."""
    stack = [n for n in nodes if isinstance(n, fx.Node)]
    seen: set[fx.Node] = set()
    while stack:
        n = stack.pop()
        if "nonfinite" in n.meta:
            return f"is not finite: {n.meta.get('fqn', n.name)} holds Inf or NaN"
        if n not in seen and len(seen) < 64:
            seen.add(n)
            stack.extend(n.all_input_nodes)
    return "is computed from activations"


def module_path(node: fx.Node) -> str:
    return node.meta.get("module", "")


def where(node: fx.Node) -> str:
    return node.meta.get("where", "")


def describe(node: fx.Node) -> str:
    """One readable phrase for reports: what the node is, in whose module, at which line."""
    name = getattr(node.target, "__name__", str(node.target)) if node.op == "call_function" else ""
    name = name or node.meta.get("fqn", node.name)
    parts = [name.removesuffix(".default")]
    if module_path(node):
        parts.append(f"in {module_path(node)}")
    if where(node):
        parts.append(f"at {where(node)}")
    return " ".join(parts)


def norm_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The graph's recognized norms, in order (``layer_norm``, ``rms_norm``, ``crms_norm`` and the
    residual forms)."""
    targets = ops.NORM_OPS | {
        nf.add_rms_norm.default,
        nf.add_layer_norm.default,
        nf.gated_rms_norm.default,
        nf.seed_norm.default,
        nf.ada_rms_norm.default,
    }
    return [n for n in gm.graph.nodes if n.op == "call_function" and n.target in targets]


class NormArgs:
    """Named view of a vocabulary norm node's arguments: ``NormArgs(node).gain`` and so on."""

    def __init__(self, node: fx.Node) -> None:
        schema = node.target._schema
        self._values: dict[str, Any] = {}
        for i, arg in enumerate(schema.arguments):
            if i < len(node.args):
                self._values[arg.name] = node.args[i]
            elif arg.name in node.kwargs:
                self._values[arg.name] = node.kwargs[arg.name]
            else:
                self._values[arg.name] = arg.default_value
        if node.target is nf.crms_norm.default:
            self._values["dims"] = [-1]

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def casts(self) -> dict[str, Any]:
        """The cast order, as keywords."""
        return {name: self._values[name] for name in ("stat_dtype", "norm_dtype", "out_dtype")}

    @property
    def bounded(self) -> bool:
        """Whether the statistic is bounded from below (``floor``, which only some ops have)."""
        return self._values.get("floor", False)

    def replaced(self, **changes: Any) -> dict[str, Any]:
        """All arguments by name, with ``changes`` applied (for :func:`emit` as keywords)."""
        return {**self._values, **changes}


def attribute(module: torch.nn.Module, path: str) -> Any:
    """The object behind a ``get_attr`` target or a parameter's qualified name."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def has_attribute(module: torch.nn.Module, path: str) -> bool:
    try:
        attribute(module, path)
    except AttributeError:
        return False
    return True


# ---------------------------------------------------------------------------------------------
# Writing nodes


def fake_mode(gm: fx.GraphModule) -> Any:
    """The fake mode of the graph's values (``None`` for a graph without tensors)."""
    for node in gm.graph.nodes:
        v = node.meta.get("val")
        if isinstance(v, torch._subclasses.FakeTensor):
            return v.fake_mode
    return None


def emit(
    graph: fx.Graph,
    target: Any,
    *args: Any,
    like: fx.Node | None = None,
    weight: bool = False,
    **kwargs: Any,
) -> fx.Node:
    """Append a call at the graph's insertion point and compute its fake value.

    Args:
        like: node whose provenance (module, where, stack trace, site…) the new node inherits.
        weight: mark the node as part of the weight program.
    """
    node = graph.call_function(target, args, kwargs)
    if like is not None:
        inherit(node, like)
    if weight:
        node.meta["weight_program"] = True
    set_val(node)
    return node


_PROVENANCE = (
    *("module", "where", "nn_module_stack", "stack_trace", "seq_nr", "custom", "recompute"),
    "region",
)


def inherit(node: fx.Node, like: fx.Node, *, site: bool = False) -> None:
    """Copy provenance from ``like``; with ``site=True`` also the norm site and spelling."""
    for key in (*_PROVENANCE, *(("site", "spelling") if site else ())):
        if key in like.meta and key not in node.meta:
            node.meta[key] = like.meta[key]


#: Fake values by what they depend on: computing them is what costs, and layers are mostly alike. Kept on
#: the graph: they refer to their mode, so that a dictionary elsewhere would never let go of either.
_FAKE_VALUES = "_normfuse_values"


def set_val(node: fx.Node) -> None:
    """(Re)compute ``meta['val']`` of a call node from its arguments' fake values."""
    inputs = node.all_input_nodes
    missing = [a for a in inputs if "val" not in a.meta]
    if missing:
        raise SpecError(f"{node.format_node()} reads {missing[0].name}, which has no value")
    values = [a.meta["val"] for a in inputs]
    fakes = [v for v in values if isinstance(v, torch._subclasses.FakeTensor)]
    key = value_key(node.target, node.args, node.kwargs) if fakes and is_pure(node) else None
    if key is None:
        _compute_val(node, fakes)
        return
    known = vars(node.graph).setdefault(_FAKE_VALUES, {})
    if key in known:
        node.meta.pop("tensor_meta", None)
        node.meta["val"] = known[key]
    else:
        _compute_val(node, fakes)
        known[key] = node.meta["val"]


def _compute_val(node: fx.Node, fakes: list[Any]) -> None:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    shape_of = ops.SHAPES.get(node.target)
    node.meta.pop("tensor_meta", None)
    if not fakes:
        node.meta["val"] = node.target(*args, **kwargs)
        return
    with fakes[0].fake_mode, torch.no_grad(), ExitStack() as stack:
        if any(symbolic(v) for v in fakes):
            # the dispatcher in Python is what lets composite and meta kernels see symbolic sizes
            stack.enter_context(enable_python_dispatcher())
        result = shape_of(*args, **kwargs) if shape_of is not None else None
        node.meta["val"] = node.target(*args, **kwargs) if result is None else result


def frozen(value: Any, of_node: Callable[[fx.Node], Any] | None = None) -> Any:
    """A hashable stand-in for op arguments (``1`` and ``1.0`` and ``True`` stay different).

    Nodes stand for themselves, or are replaced by what ``of_node`` says of them.
    """
    kind = type(value)
    if kind is fx.Node:
        return value if of_node is None else of_node(value)
    if kind in (bool, int, float):
        return (kind, value)
    if isinstance(value, (list, tuple)):
        return tuple([frozen(v, of_node) for v in value])
    if isinstance(value, dict):
        return tuple(sorted((k, frozen(v, of_node)) for k, v in value.items()))
    return value


def _looks(node: fx.Node) -> Any:
    v = node.meta.get("val")
    if not isinstance(v, torch.Tensor):
        raise TypeError
    return (v.shape, v.stride(), v.dtype, v.device)


def value_key(target: Any, args: Any, kwargs: Any) -> Any:
    """What the fake value of a call depends on; ``None`` where sizes are symbolic."""
    try:
        key = (target, frozen(args, _looks), frozen(kwargs, _looks))
        hash(key)
    except TypeError:  # a symbolic size has no hash
        return None
    return key


def replace(old: fx.Node, new: fx.Node) -> None:
    """Redirect all users of ``old`` to ``new`` and erase ``old``."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def erase_dead(gm: fx.GraphModule) -> None:
    """Remove pure nodes nobody reads. Inputs, mutations, randomness and asserts stay."""
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and (is_pure(node) or node.op == "get_attr"):
            gm.graph.erase_node(node)


def stable_sort(graph: fx.Graph) -> None:
    """Re-sort topologically, keeping the present order where the edges allow it."""
    order: list[fx.Node] = list(graph.nodes)
    done: set[fx.Node] = set()
    anchor: fx.Node | None = None

    def place(node: fx.Node) -> None:
        nonlocal anchor
        stack = [node]
        while stack:
            n = stack[-1]
            if n in done:
                stack.pop()
                continue
            pending = [a for a in n.all_input_nodes if a not in done]
            if pending:
                stack.extend(pending)
                continue
            if anchor is not None:
                anchor.append(n)
            anchor = n
            done.add(n)
            stack.pop()

    ordered = True
    seen: set[fx.Node] = set()
    for n in order:
        if any(a not in seen for a in n.all_input_nodes):
            ordered = False
            break
        seen.add(n)
    if ordered:
        return
    for n in order:
        if n.op == "placeholder":
            place(n)
    for n in order:
        if n.op != "output":
            place(n)
    for n in order:
        if n.op == "output":
            place(n)


# ---------------------------------------------------------------------------------------------
# The specification

_ALLOWED_OPS = {"placeholder", "get_attr", "call_function", "output"}


def check(gm: fx.GraphModule) -> None:
    """Check that ``gm`` is legal IR; raise :class:`SpecError` naming the node that is not.

    Checked: node kinds; topological order; every tensor-producing call has a fake ``val``; leaves
    have a ``kind`` and ``fqn``; vocabulary ops have well-formed dims, broadcastable affine tensors
    and a site; weight-program nodes depend on weights alone; output is last and unique.
    """
    seen: set[fx.Node] = set()
    memo: dict[fx.Node, bool] = {}
    nodes = list(gm.graph.nodes)
    if not nodes or nodes[-1].op != "output":
        raise SpecError("the graph does not end with its output")
    placeholders_over = False
    for node in nodes:
        if node.op not in _ALLOWED_OPS:
            raise SpecError(f"illegal node kind {node.op}: {node.format_node()}")
        if node.op == "placeholder":
            if placeholders_over:
                raise SpecError(f"placeholder {node.name} after the first computation")
        elif node.op == "call_function":
            placeholders_over = True
        for arg in node.all_input_nodes:
            if arg not in seen:
                raise SpecError(f"{node.name} uses {arg.name} before it is defined")
        seen.add(node)
        if node.op in ("placeholder", "get_attr"):
            v = node.meta.get("val")
            if isinstance(v, torch.Tensor) and node.meta.get("kind") not in (
                *WEIGHT_KINDS,
                "input",
            ):
                raise SpecError(f"leaf {node.name} has no kind")
            continue
        if node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.OpOverload):
            if node.target._schema.returns and "val" not in node.meta:
                raise SpecError(f"{node.format_node()} has no fake value")
            if node.target.namespace == "normfuse":
                _check_vocabulary(node)
        if node.meta.get("weight_program") and not is_weight_expr(node, memo):
            raise SpecError(f"{node.format_node()} is in the weight program but reads activations")
    gm.graph.lint()


def _check_vocabulary(node: fx.Node) -> None:
    args = NormArgs(node)
    values = args._values
    if "dims" in values:
        dims = list(values["dims"])
        if not dims or any(d >= 0 for d in dims) or dims != sorted(dims):
            raise SpecError(f"{node.name}: dims must be negative and ascending, got {dims}")
    if node.target in ops.NORM_OPS:
        if "site" not in node.meta:
            raise SpecError(f"norm {node.name} has no site")
        x = val(args.x)
        for name in ("gain", "bias"):
            t = values.get(name)
            if t is None:
                continue
            if not is_tensor(t):
                raise SpecError(f"{node.name}: {name} is not a tensor")
            if val(t).dim() > x.dim():
                raise SpecError(f"{node.name}: {name} has more dims than the input")
