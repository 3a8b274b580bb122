"""Numerical verification: the same graph in float64 before and after, and in the working dtype.

Random or example inputs cannot prove a rewrite, the identities do that; they catch a mistake in its
implementation. Agreement is required to 1e-10 relative in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from . import ir

#: Largest accepted relative disagreement in float64.
TOLERANCE = 1e-10

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

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return to_double(super().placeholder(target, args, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, fx.GraphModule):  # the body of a higher-order op
            return _double_body(value)
        return to_double(value)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = _promoted(args, kwargs)
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
