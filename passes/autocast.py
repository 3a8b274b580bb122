"""Make autocast visible: every cast it would do becomes a node, its regions disappear.

A pre-dispatch trace records ops before autocast acts on them, so inside an autocast region the
values claim float32 although the run returns bfloat16. Matchers read dtypes, hence the casts must be
in the graph. What autocast does to an op is not looked up in a table but observed: the op is run on
fake tensors under autocast, and the conversions of its arguments are recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import ir

aten = torch.ops.aten

_ENTER = torch.amp.autocast_mode._enter_autocast
_EXIT = torch.amp.autocast_mode._exit_autocast


@dataclass(frozen=True)
class Autocast:
    """One autocast setting: device type, dtype, on or off."""

    device_type: str
    dtype: torch.dtype
    enabled: bool = True

    def context(self) -> torch.autocast:
        return torch.autocast(
            self.device_type, self.dtype, enabled=self.enabled, cache_enabled=False
        )


def ambient(device_types: tuple[str, ...] = ("cpu", "cuda", "xpu")) -> tuple[Autocast, ...]:
    """The autocast settings in force around the caller (hashable: usable as a key)."""
    found = []
    for device in device_types:
        try:
            if torch.is_autocast_enabled(device):
                found.append(Autocast(device, torch.get_autocast_dtype(device)))
        except RuntimeError:  # device type unknown to this build
            continue
    return tuple(found)


def disabled(settings: tuple[Autocast, ...]) -> list[torch.autocast]:
    """Context managers that switch ``settings`` off, for running a graph whose casts are explicit."""
    return [torch.autocast(s.device_type, enabled=False) for s in settings]


@contextlib.contextmanager
def explicit_casts() -> Iterator[None]:
    """Graphs are worked on, and run, with autocast off: their casts are in them."""
    with contextlib.ExitStack() as stack:
        for setting in disabled(ambient()):
            stack.enter_context(setting)
        yield


class _Recorder(TorchDispatchMode):
    """Records dtype conversions of the watched tensors until the op itself is reached."""

    def __init__(self, watched: dict[int, int]) -> None:
        super().__init__()
        self.watched = watched
        self.casts: dict[int, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._to_copy.default and id(args[0]) in self.watched:
            to = kwargs.get("dtype")
            if to is not None:
                self.casts.setdefault(self.watched[id(args[0])], to)
        return func(*args, **kwargs)


def _observe(node: fx.Node, settings: list[Autocast]) -> dict[fx.Node, torch.dtype]:
    """Which arguments of ``node`` autocast converts, and to what."""
    inputs = [n for n in node.all_input_nodes if ir.is_tensor(n) and ir.dtype(n).is_floating_point]
    if not inputs:
        return {}
    values = {n: ir.val(n) for n in node.all_input_nodes}
    # ops such as `to` convert by themselves: only what changes with autocast counts
    try:
        without = _run_recorded(node, inputs, values, [])
    except RuntimeError:  # mixed dtypes that only autocast makes legal
        without = {}
    with_autocast = _run_recorded(node, inputs, values, settings)
    return {
        inputs[i]: d
        for i, d in with_autocast.items()
        if without.get(i) != d and inputs[i] in values
    }


def _run_recorded(
    node: fx.Node,
    inputs: list[fx.Node],
    values: dict[fx.Node, Any],
    settings: list[Autocast],
) -> dict[int, torch.dtype]:
    # distinct tensor objects per argument, so that identity tells them apart
    mode = ir.val(inputs[0]).fake_mode
    with mode:
        fresh = {n: ir.val(n).detach() for n in inputs}
    watched = {id(fresh[n]): i for i, n in enumerate(inputs)}
    args, kwargs = fx.node.map_arg(
        (node.args, node.kwargs), lambda n: fresh[n] if n in fresh else values[n]
    )
    recorder = _Recorder(watched)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(mode)
        if any(isinstance(v, torch.Tensor) and ir.symbolic(v) for v in values.values()):
            stack.enter_context(enable_python_dispatcher())
        for s in settings:
            stack.enter_context(s.context())
        stack.enter_context(recorder)
        node.target(*args, **kwargs)
    return recorder.casts


def make_explicit(gm: fx.GraphModule, settings: tuple[Autocast, ...] = ()) -> bool:
    """Insert the casts that autocast would do; remove autocast regions. Returns True if any.

    Args:
        settings: autocast in force around the whole graph, besides the regions inside it.
    """
    graph = gm.graph
    regions = any(n.op == "call_function" and n.target in (_ENTER, _EXIT) for n in graph.nodes)
    if not settings and not regions:
        return False
    stack: list[tuple[fx.Node | None, Autocast]] = [(None, s) for s in settings]
    casts: dict[tuple, fx.Node] = {}  # by source, dtype and checkpointed region
    memo: dict[tuple, dict[int, torch.dtype]] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _ENTER:
            device, dtype, enabled = (*node.args, None, None, None)[:3]
            if dtype is None:
                dtype = torch.get_autocast_dtype(device)
            stack.append((node, Autocast(device, dtype, bool(enabled))))
            continue
        if node.target is _EXIT:
            stack = [(owner, s) for owner, s in stack if owner is not node.args[0]]
            graph.erase_node(node)
            continue
        current = [s for _, s in stack]
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            if any(s.enabled for s in current):
                node.meta["autocast"] = tuple(current)  # whatever happens inside it
            continue
        if not isinstance(node.target, torch._ops.OpOverload) or "val" not in node.meta:
            continue
        if isinstance(node.meta["val"], (torch.SymInt, torch.SymFloat, torch.SymBool)):
            continue  # a number that dynamic shapes keep in a tensor: nothing is computed in a dtype
        if any(s.enabled for s in current):
            key = _memo_key(node, current)
            inputs = [
                n for n in node.all_input_nodes if ir.is_tensor(n) and ir.dtype(n).is_floating_point
            ]
            if key not in memo:
                observed = _observe(node, current)
                memo[key] = {i: observed[n] for i, n in enumerate(inputs) if n in observed}
            for i, to in memo[key].items():
                source = inputs[i]
                place = (source, to, node.meta.get("region"))
                cast = casts.get(place)
                if cast is None:
                    with graph.inserting_before(node):
                        cast = ir.emit(graph, aten.to.dtype, source, to, like=node)
                    casts[place] = cast
                node.replace_input_with(source, cast)
        if any(ir.is_tensor(a) for a in node.all_input_nodes):
            ir.set_val(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target is _ENTER:
            graph.erase_node(node)
    return True


def restore(gm: fx.GraphModule) -> None:
    """Put opaque ops back under the autocast they were under, right before the graph is run.

    Nothing may move afterwards: what stands between would be cast, too.
    """
    graph = gm.graph
    for node in list(graph.nodes):
        settings = node.meta.pop("autocast", ())
        if not settings:
            continue
        own = {k: node.meta[k] for k in ("region", "nn_module_stack", "stack_trace", "module")
               if k in node.meta}  # fmt: skip
        with graph.inserting_before(node):
            entered = [
                graph.call_function(_ENTER, (s.device_type, s.dtype, s.enabled, False))
                for s in settings
            ]
        at = node
        for region in reversed(entered):
            with graph.inserting_after(at):
                at = graph.call_function(_EXIT, (region,))
            region.meta.update(own)
            at.meta.update(own)


def _memo_key(node: fx.Node, settings: list[Autocast]) -> tuple:
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    description = tuple(
        (ir.dtype(a), ir.val(a).dim(), ir.val(a).device) if ir.is_tensor(a) else type(a)
        for a in leaves
    )
    same = tuple(leaves.index(a) for a in leaves if isinstance(a, fx.Node))
    return (node.target, description, same, tuple(settings))
