"""Numerical verification: the same graph in float64 before and after, and in the working dtype.

Random or example inputs cannot prove a rewrite, the identities do that; they catch a mistake in its
implementation. In float64 agreement is required to 1e-10 relative, with the graph as it was captured,
before anything was recognized in it. In the working dtype the rewritten graph's error against float64
may be :data:`FACTOR` times eager's own plus :data:`ULPS` units in the last place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from . import ir
from .autocast import explicit_casts
from .axis_base import dropout_is_active, is_dropout
from .errors import CaptureError

#: Largest accepted relative disagreement in float64.
TOLERANCE = 1e-10

#: The working dtype's error against float64 may be this many times eager's own ...
FACTOR = 2.0
#: ... plus this many units in the last place of the coarsest dtype of the graph.
ULPS = 2.0
#: A call and the captured graph may take other kernels (attention): so many times those two.
KERNELS = 8.0

#: ``(x, shape, weight, eps)``: the epsilon that is not given is the dtype's
_DEFAULT_EPS = (torch.ops.aten.rms_norm.default, torch.ops.aten._fused_rms_norm.default)

_LOW = (torch.float16, torch.bfloat16, torch.float32)


def to_double(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in _LOW:
        return value.detach().to(torch.float64)
    return value


class PlainInterpreter(fx.Interpreter):
    """Runs an IR graph as it is, but leaves the model's tensors alone.

    Graphs write into buffers (running statistics, caches). Those are copied first; parameters too if
    any operation of the graph writes into what it is given.
    """

    def __init__(self, gm: fx.GraphModule, graph: fx.Graph | None = None) -> None:
        super().__init__(gm, garbage_collect_values=True, graph=graph)
        self.gm = gm
        self._writes = any(
            isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable
            for n in self.graph.nodes
        )

    def run_node(self, n: fx.Node) -> Any:
        with contextlib.ExitStack() as stack:
            for setting in n.meta.get("autocast", ()):  # of an opaque op
                stack.enter_context(setting.context())
            return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = ir.attribute(self.gm, target)
        if not isinstance(value, torch.Tensor):
            return value
        if self._writes or not isinstance(value, torch.nn.Parameter):
            return value.detach().clone()
        return value


class DoubleInterpreter(PlainInterpreter):
    """Runs an IR graph in float64: weights and inputs are promoted, every cast becomes float64.

    Complex and integer values keep their dtype. Weights are promoted one at a time, as needed.
    """

    _node: fx.Node

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return super().run_node(n)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return to_double(super().placeholder(target, args, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, fx.GraphModule):  # the body of a higher-order op
            return _double_body(value)
        return to_double(value)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = _promoted(args, kwargs)
        if target in _DEFAULT_EPS and (len(args) < 4 or args[3] is None) and "eps" not in kwargs:
            # the default is that of the dtype the model computes in
            dtype = torch.promote_types(ir.dtype(self._node.args[0]), torch.float32)
            args = (*args, *(None,) * (3 - len(args)))[:3]
            args = (*args, torch.finfo(dtype).eps)
        result = super().call_function(target, args, kwargs)
        # factories and embeddings of constants may still produce the default dtype
        return pytree.tree_map(to_double, result)


def _promoted(args: Any, kwargs: Any) -> Any:
    def promote(a: Any) -> Any:
        return torch.float64 if isinstance(a, torch.dtype) and a in _LOW else a

    return pytree.tree_map(promote, (args, kwargs))


def _double_body(body: fx.GraphModule) -> fx.GraphModule:
    """The body of a higher-order op in float64. Bodies are written in torch, not only in ATen."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(body.graph, {}))
    double = fx.GraphModule(body, graph)
    for node in graph.nodes:
        if node.op == "get_attr":
            value = ir.attribute(body, node.target)
            name = node.target = node.target.replace(".", "_")
            if isinstance(value, fx.GraphModule):
                double.add_module(name, _double_body(value))
            else:
                double.register_buffer(name, to_double(value))
        elif node.op == "call_method" and node.target in ("float", "half", "bfloat16"):
            node.target = "double"
        elif node.op in ("call_function", "call_method"):
            node.args, node.kwargs = _promoted(node.args, dict(node.kwargs))
    double.recompile()
    return double


def flat_double(gm: fx.GraphModule, inputs: Sequence[Any], graph: fx.Graph | None = None) -> list:
    """The graph's flat outputs in float64 for flat ``inputs`` (one per placeholder)."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = DoubleInterpreter(gm, graph).run(*_copies(inputs), enable_io_processing=False)
    return pytree.tree_leaves(out)


def flat_plain(gm: fx.GraphModule, inputs: Sequence[Any], graph: fx.Graph | None = None) -> list:
    """The graph's flat outputs in its own dtypes."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = PlainInterpreter(gm, graph).run(*_copies(inputs), enable_io_processing=False)
    return pytree.tree_leaves(out)


def _copies(inputs: Sequence[Any]) -> list[Any]:
    """Inputs are cloned: a graph may write into them (caches, running statistics)."""
    return [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in inputs]


def relative_error(actual: Any, expected: Any) -> float:
    """``max|a − e| / max|e|`` over finite entries; inf where NaN/Inf patterns or shapes differ."""
    if not isinstance(actual, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return 0.0
    if actual.shape != expected.shape:
        return float("inf")
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(actual, expected) else float("inf")
    a, e = actual.to(torch.float64), expected.to(torch.float64)
    finite = torch.isfinite(e)
    if not torch.equal(finite, torch.isfinite(a)) or not torch.equal(e.isnan(), a.isnan()):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = e[finite].abs().max().item()
    return ((a[finite] - e[finite]).abs().max() / max(scale, 1e-30)).item()


def max_error(actual: Sequence[Any], expected: Sequence[Any]) -> float:
    if len(actual) != len(expected):
        return float("inf")
    return max((relative_error(a, e) for a, e in zip(actual, expected, strict=True)), default=0.0)


def check_recognition(gm: fx.GraphModule, context: Any) -> str | None:
    """Compare ``gm`` with the graph its norms were recognized in; ``None`` if they agree.

    Needs ``gm.meta["example_inputs"]`` and ``gm.meta["captured"]`` (``capture(remember=True)``). That
    graph's float64 results are what every pass is compared with from now on.

    Returns:
        A sentence that names the first wrong site.
    """
    inputs, captured = gm.meta.get("example_inputs"), gm.meta.get("captured")
    if inputs is None or captured is None:
        return None
    graph = captured.graph()
    with explicit_casts():
        truth = context.facts["double"] = flat_double(gm, inputs, graph)
        recognized = flat_double(gm, inputs)
        error = max_error(recognized, truth)
        allowed = max(TOLERANCE, 8 * _rounded_constants(graph))
        if error > allowed:
            where = _first_wrong(gm, graph, inputs, allowed)
            return (
                f"float64 results differ by {error:.1e} relative from the model's as it was captured "
                f"(allowed {allowed:.0e}), before any pass ran{where}"
            )
        if error > TOLERANCE:  # constants were rounded, and are taken for what was meant
            context.facts["double"] = recognized
        else:
            context.errors.append(error)
        plain = context.facts["plain"] = flat_plain(gm, inputs, graph)
        _check_called(gm, graph, plain, truth)
    return None


def _check_called(gm: fx.GraphModule, graph: fx.Graph, plain: list, truth: list) -> None:
    """Refuse a graph that is not what the model computes when it is called.

    Code may ask whether it is being exported, or read Python state that a trace does not see.

    Args:
        graph: as it was captured; ``plain`` and ``truth`` are its results, in its own dtypes and in
            float64.
    """
    called, plain, truth = (
        [x for x in xs if isinstance(x, torch.Tensor) and x.is_floating_point()]
        for xs in (gm.meta.get("called") or (), plain, truth)
    )
    if len(called) != len(plain) or any(map(_draws, graph.nodes)):
        return
    allowed = KERNELS * (FACTOR * max_error(plain, truth) + ULPS * _ulp(gm))
    error = max_error(called, plain)
    if error > allowed:
        raise CaptureError(
            f"the captured graph is not what the model computes when it is called: results differ by "
            f"{error:.1e} relative, which is no rounding (allowed {allowed:.1e}). Code that asks "
            "whether it is being exported or traced goes another way there (inputs that are given, such "
            "as a mask, may settle it); verify=False takes the graph as it is"
        )


def _draws(node: fx.Node) -> bool:
    """True for an op that draws random numbers, as it is called here."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded not in tags:
        return False
    if is_dropout(node):
        return dropout_is_active(node)
    return ir.bind(node).get("dropout_p", 1.0) != 0.0  # of attention


def _rounded_constants(graph: fx.Graph) -> float:
    """The rounding of numbers that the model holds as tensors (``1/d`` in float32).

    Recognition takes one for ``1/d`` if it is that to rounding.
    """
    values = (
        n.meta.get("val")
        for n in graph.nodes
        if n.op in ("get_attr", "call_function") and not _reads_data(n)
    )
    dtypes = {v.dtype for v in values if isinstance(v, torch.Tensor) and v.dim() == 0}
    return max((torch.finfo(d).eps for d in dtypes if d in _LOW), default=0.0)


def _reads_data(node: fx.Node) -> bool:
    return bool(node.all_input_nodes) or node.meta.get("kind") in ("param", "buffer")


class _Norms(DoubleInterpreter):
    """Keeps the float64 results of the nodes with the given names."""

    def __init__(self, gm: fx.GraphModule, graph: fx.Graph, names: Iterable[str]) -> None:
        super().__init__(gm, graph)
        self.names = frozenset(names)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.seen[n.name] = value
        return value


def _first_wrong(
    gm: fx.GraphModule, captured: fx.Graph, inputs: Sequence[Any], allowed: float
) -> str:
    """Where the two graphs part: the first norm whose result is not that of what it replaced."""
    norms = [n for n in ir.norm_nodes(gm) if "replaced" in n.meta]
    runs = []
    for graph, names in (
        (captured, [n.meta["replaced"] for n in norms]),
        (gm.graph, [n.name for n in norms]),
    ):
        run = _Norms(gm, graph, names)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            run.run(*_copies(inputs), enable_io_processing=False)
        runs.append(run.seen)
    old, new = runs
    for n in norms:
        if relative_error(new.get(n.name), old.get(n.meta["replaced"])) > allowed:
            return f"; first at {n.meta.get('site')} [{ir.describe(n)}]"
    return ""


def check_working(gm: fx.GraphModule, context: Any, report: Any) -> str | None:
    """Compare ``gm``'s error in the working dtype with eager's own; ``None`` if it is no larger.

    Both are against float64 and end up in ``report.working_error``. Needs what
    :func:`check_recognition` found; a pass that changes the function leaves nothing to compare.
    """
    before, truth = context.facts.get("plain"), context.facts.get("double")
    if before is None or truth is None or context.facts.get("rebased"):
        return None
    with explicit_casts():
        now = flat_plain(gm, gm.meta["example_inputs"])
    eager, rewritten = max_error(before, truth), max_error(now, truth)
    report.working_error = {"eager": eager, "rewritten": rewritten}
    ulp = _ulp(gm)
    # a model in float64 is compared with itself, and eager's "error" is none
    exact = ulp <= torch.finfo(torch.float64).eps
    allowed = TOLERANCE if exact else FACTOR * eager + ULPS * ulp
    if rewritten <= allowed:
        return None
    return (
        f"the error against float64 is {rewritten:.1e}, eager's own is {eager:.1e} "
        f"(allowed {allowed:.1e})"
    )


def _ulp(gm: fx.GraphModule) -> float:
    """The relative spacing of the coarsest floating dtype that the graph computes in."""
    values = (n.meta.get("val") for n in gm.graph.nodes)
    dtypes = {v.dtype for v in values if isinstance(v, torch.Tensor)}
    return max((torch.finfo(d).eps for d in dtypes if d.is_floating_point), default=0.0)


def check_pass(before: fx.Graph, gm: fx.GraphModule, context: Any) -> str | None:
    """Compare ``gm`` after a pass with its graph before; ``None`` if they agree, else a sentence.

    Needs ``gm.meta["example_inputs"]`` (flat, one per placeholder); without them nothing can be run
    and nothing is claimed.
    """
    inputs = gm.meta.get("example_inputs")
    if inputs is None:
        return None
    expected = context.facts.get("double")
    if expected is None:
        expected = context.facts["double"] = flat_double(gm, inputs, before)
    error = max_error(flat_double(gm, inputs), expected)
    if error <= TOLERANCE:
        context.errors.append(error)
        return None
    return f"float64 results differ by {error:.1e} relative (allowed {TOLERANCE:.0e})"


def rebase(gm: fx.GraphModule, context: Any, before: fx.Graph) -> float | None:
    """Later passes are compared with ``gm`` as it is now: a pass has changed the function.

    Returns:
        How much (relative, float64), or ``None`` without example inputs.
    """
    context.facts["rebased"] = True
    inputs = gm.meta.get("example_inputs")
    if inputs is None:
        return None
    expected = context.facts.get("double")
    if expected is None:
        expected = flat_double(gm, inputs, before)
    now = context.facts["double"] = flat_double(gm, inputs)
    return max_error(now, expected)
