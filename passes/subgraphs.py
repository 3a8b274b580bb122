"""Graphs inside graphs: the bodies of higher-order ops.

Three treatments, by what the op means:

- *Checkpointed regions* (``torch.utils.checkpoint``) compute the same function whether or not their
  activations are kept, so their bodies are laid out in the graph itself, every node tagged with its
  region. Passes and the residual stream see one flat graph. :func:`outline` gathers each region again
  afterwards: recomputation, selective policies and the handling of random numbers stay PyTorch's own.
- *Regions that only organise compilation* (``nested_compile_region``) are laid out for good.
- *Everything else* (control flow, flex attention, ``autograd.Function``, user kernels, sections under
  a transform of ``torch.func``, see ``func_transforms.py``) stays one opaque node: what it reads is read
  raw, what it may write is left alone, norms inside are not looked at and the report says so.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    track_tensor_tree,
)
from torch.utils import _pytree as pytree

from . import ir
from .errors import Unsupported
from .func_transforms import enclose
from .paths import clean_path
from .weights import program_nodes

aten = torch.ops.aten
hops = torch.ops.higher_order

#: Ops whose body may be laid out where they stand, and how many operands come before the body's own.
_LAID_OUT = {hops.tag_activation_checkpoint: 1, hops.invoke_subgraph: 2}


@dataclass
class Region:
    """One checkpointed region.

    Attributes:
        parent: id of the region around it, if any.
        kwargs: options of the checkpoint call.
        body_meta: ``meta`` of Dynamo's body (it carries the selective policy's context function).
        provenance: ``stack_trace``, ``nn_module_stack`` and so on of the call.
    """

    parent: int | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    body_meta: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------
# Laying bodies out


class Retrace(fx.Interpreter):
    """Runs a Dynamo graph under ``make_fx``: provenance of each source node is kept, bodies of
    checkpoints are laid out and tagged, other higher-order ops become opaque nodes.

    Args:
        regions: filled with the checkpointed regions by id.
        fake_mode: the mode of the traced values.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        regions: dict[int, Region],
        fake_mode: Any,
        parent: int | None = None,
    ) -> None:
        super().__init__(enclose(gm))
        self._regions, self._mode, self._parent = regions, fake_mode, parent
        self._node: fx.Node | None = None
        self._first_names: dict[int, list[str]] = {}  # operands of the first call, by body

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        node = self._node
        assert node is not None
        if not isinstance(target, torch._ops.HigherOrderOperator):
            return super().call_function(target, args, kwargs)
        skip = _LAID_OUT.get(target)
        if skip is None or not isinstance(args[0], fx.GraphModule):
            return self._opaque(node, target, args, kwargs)
        if target is hops.invoke_subgraph:
            return self._nested(node, args[0], args[skip:])
        return self._checkpointed(node, args[0], args[skip:], kwargs)

    def _nested(self, node: fx.Node, body: fx.GraphModule, args: tuple) -> Any:
        graph = get_proxy_mode().tracer.graph  # type: ignore[union-attr]
        before = len(graph.nodes)
        result = Retrace(body, self._regions, self._mode, self._parent).run(*args)
        # one body stands for several calls, with the module paths of the first
        names = [_fqn(a) for a in node.args[2:]]
        paths = _path_change(self._first_names.setdefault(id(body), names), names)
        if paths is not None:
            for new in itertools.islice(reversed(graph.nodes), len(graph.nodes) - before):
                stack = new.meta.get("nn_module_stack")
                if stack:
                    new.meta["nn_module_stack"] = {
                        k: (_renamed(path, *paths), kind) for k, (path, kind) in stack.items()
                    }
        return result

    def _checkpointed(
        self, node: fx.Node, body: fx.GraphModule, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        key = len(self._regions)
        self._regions[key] = Region(
            self._parent, dict(kwargs), dict(body.meta), provenance_of(node.meta)
        )
        graph = get_proxy_mode().tracer.graph  # type: ignore[union-attr]
        before = len(graph.nodes)
        result = Retrace(body, self._regions, self._mode, key).run(*args)
        for new in itertools.islice(reversed(graph.nodes), len(graph.nodes) - before):
            new.meta.setdefault("region", key)  # nodes of an inner region have theirs already
        return result

    def _opaque(self, node: fx.Node, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Emit the call as it is; its results are the ones Dynamo computed."""
        if "example_value" not in node.meta:
            raise Unsupported(f"the results of the higher-order op {target} are not known")
        tracer = get_proxy_mode().tracer  # type: ignore[union-attr]

        def proxy(value: Any) -> Any:
            if isinstance(value, nn.Module):
                name = tracer.get_fresh_qualname("body")
                tracer.root.register_module(name, value)
                return tracer.create_proxy("get_attr", name, (), {})
            return tracer.unwrap_proxy(value)

        proxies = pytree.tree_map(proxy, (args, kwargs))
        result = pytree.tree_map(self._fresh, node.meta["example_value"])
        call = tracer.create_proxy("call_function", target, *proxies)
        return track_tensor_tree(result, call, constant=None, tracer=tracer)

    def _fresh(self, value: Any) -> Any:
        """A fake tensor like ``value`` that this trace owns."""
        if not isinstance(value, torch.Tensor):
            return value
        if type(value) is not torch._subclasses.FakeTensor:
            raise Unsupported(f"a higher-order op returns a {type(value).__name__}")
        with disable_proxy_modes_tracing(), self._mode:
            fresh = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=value.device
            )
            return fresh.requires_grad_(value.requires_grad)


def _fqn(node: Any) -> str:
    """The qualified name of the weight behind a placeholder of Dynamo, else ``""``."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return clean_path(name() if callable(name) else name)


def _path_change(old: list[str], new: list[str]) -> tuple[str, str] | None:
    """``("blocks.0", "blocks.1")`` if these prefixes tell two lists of weight names apart."""
    for a, b in zip(old, new, strict=True):
        if a == b or not a or not b:
            continue
        first, second = a.split("."), b.split(".")
        while first and second and first[-1] == second[-1]:
            first.pop()
            second.pop()
        if first and second:
            return ".".join(first), ".".join(second)
    return None


def _renamed(path: str, old: str, new: str) -> str:
    path = clean_path(path)
    return new + path[len(old) :] if f"{path}.".startswith(f"{old}.") else path


def provenance_of(meta: dict[str, Any]) -> dict[str, Any]:
    return {k: meta[k] for k in ("nn_module_stack", "stack_trace") if k in meta}


# ---------------------------------------------------------------------------------------------
# Gathering regions again


def dissolve(gm: fx.GraphModule) -> None:
    """Forget regions: without gradients a checkpoint is a plain call."""
    gm.meta.pop("regions", None)
    for node in gm.graph.nodes:
        node.meta.pop("region", None)


def has_regions(gm: fx.GraphModule) -> bool:
    return any("region" in n.meta for n in gm.graph.nodes)


Emit = Callable[[fx.GraphModule, fx.Graph, fx.GraphModule, Region, list], fx.Node]


def emit_dynamo(
    gm: fx.GraphModule, graph: fx.Graph, body: fx.GraphModule, region: Region, args: list
) -> fx.Node:
    """A region as Dynamo hands it to AOTAutograd."""
    body.meta.update(region.body_meta)
    name = _fresh_attribute(gm, "wrap_body")
    gm.add_module(name, body)
    return graph.call_function(
        hops.tag_activation_checkpoint, (graph.get_attr(name), *args), dict(region.kwargs)
    )


class Checkpointed(nn.Module):
    """A graph that keeps its inputs only and runs again in the backward pass."""

    def __init__(self, body: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        options = dict(options)
        self.body, self.context_fn, self.options = body, options.pop("context_fn", None), options

    def forward(self, *args: Any) -> Any:
        from torch.utils.checkpoint import checkpoint

        if self.context_fn is None:
            return checkpoint(self.body, *args, use_reentrant=False, **self.options)
        # Dynamo takes a partial where it does not take an attribute
        context_fn = functools.partial(self.context_fn)
        return checkpoint(
            self.body, *args, use_reentrant=False, context_fn=context_fn, **self.options
        )


def emit_eager(
    gm: fx.GraphModule, graph: fx.Graph, body: fx.GraphModule, region: Region, args: list
) -> fx.Node:
    """A region for a graph that runs eagerly."""
    name = _fresh_attribute(gm, "checkpointed")
    gm.add_module(name, Checkpointed(body, region.kwargs))
    return graph.call_module(name, tuple(args))


def outline(gm: fx.GraphModule, emit: Emit, *, weights_inside: bool = False) -> int:
    """Gather the nodes of each region into a body of its own, in place; returns how many there were.

    Nodes on a path from a region into itself join it.

    Args:
        emit: :func:`emit_dynamo` or :func:`emit_eager`.
        weights_inside: compute folded weights inside the one region that reads them, so that they
            are not kept for the backward pass either. Otherwise they leave their regions: compiled,
            they are marked for recomputation by themselves, whatever a region's policy keeps.

    Raises:
        Unsupported: a rewrite tied two regions together, so that neither can be run as a whole.
    """
    regions: dict[int, Region] = gm.meta.get("regions", {})
    for node in reversed(program_nodes(gm)):
        node.meta.pop("region", None)
        readers = {u.meta.get("region") for u in node.users}
        if weights_inside and len(readers) == 1 and None not in readers:
            node.meta["region"] = readers.pop()
    count = 0
    for key in sorted(regions, reverse=True):  # inner regions have higher numbers
        count += _outline_one(gm, key, regions[key], emit)
    if count:
        gm.graph.lint()
    return count


def _outline_one(gm: fx.GraphModule, key: int, region: Region, emit: Emit) -> int:
    graph = gm.graph
    inside = {n for n in graph.nodes if n.meta.get("region") == key and n.op != "get_attr"}
    if not any(n.op == "call_function" for n in inside):
        return 0
    order = list(graph.nodes)
    _close(order, inside, key, region)
    position = {n: i for i, n in enumerate(order)}
    members = sorted(inside, key=position.__getitem__)
    effects = [n for n in order if _has_effect(n)]
    own = [n for n in effects if n in inside]

    root = nn.Module()
    body = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inputs: list[fx.Node] = []
    for n in members:
        for a in n.all_input_nodes:
            if a in inside or a in env:
                continue
            value = ir.attribute(gm, a.target) if a.op == "get_attr" else None
            if not isinstance(value, nn.Module):
                env[a] = body.placeholder(a.name)
                env[a].meta = {k: v for k, v in a.meta.items() if k in ("val", "tensor_meta")}
                inputs.append(a)
    for n in members:
        for a in n.all_input_nodes:
            if a not in inside and a not in env:
                name = _fresh_attribute(root, "body")
                root.add_module(name, ir.attribute(gm, a.target))
                env[a] = body.get_attr(name)
        env[n] = body.node_copy(n, lambda m: env[m])
        if n.op == "call_module":
            root.add_module(str(n.target), gm.get_submodule(str(n.target)))
    outputs = [n for n in members if any(u not in inside for u in n.users)]
    body.output(tuple(env[n] for n in outputs))
    with graph.inserting_after((own or members)[-1]):
        anchor = graph.call_function(operator.getitem, ((), 0))
    with graph.inserting_before(anchor):
        call = emit(gm, graph, fx.GraphModule(root, body), region, inputs)
        call.meta.update(region.provenance)
        call.meta["val"] = tuple(n.meta.get("val") for n in outputs)
        around = [call]
        for i, n in enumerate(outputs):
            out = graph.call_function(operator.getitem, (call, i))
            out.meta = {k: v for k, v in n.meta.items() if k not in ("region", "recompute")}
            n.replace_all_uses_with(out, delete_user_cb=lambda u: u not in inside)
            around.append(out)
    graph.erase_node(anchor)
    if region.parent is not None:
        for n in around:
            n.meta["region"] = region.parent
    for n in reversed(members):
        graph.erase_node(n)
    for n in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        graph.erase_node(n)
    ir.stable_sort(graph)
    # random numbers and writes happen in the order they were written in
    expected = [call if n in inside else n for n in effects if n not in own[1:]]
    kept = set(expected)
    if [n for n in graph.nodes if n in kept] != expected or not _adjacent(effects, own):
        raise Unsupported("gathering a checkpointed region would reorder random numbers or writes")
    return 1


def _adjacent(effects: list[fx.Node], own: list[fx.Node]) -> bool:
    """True if ``own`` are neighbours in ``effects``."""
    start = effects.index(own[0]) if own else 0
    return effects[start : start + len(own)] == own


def _close(order: list[fx.Node], inside: set[fx.Node], key: int, region: Region) -> None:
    """Add to ``inside`` what lies on a path from it into itself, and parts of tuples it makes."""
    for n in order:
        if n.op == "call_function" and n.target is operator.getitem and n.args[0] in inside:
            inside.add(n)
    after: set[fx.Node] = set()
    for n in order:
        if any(a in inside or a in after for a in n.all_input_nodes):
            after.add(n)
    before: set[fx.Node] = set()
    for n in reversed(order):
        if any(u in inside or u in before for u in n.users):
            before.add(n)
    for n in order:
        if n in after and n in before and n not in inside:
            if n.meta.get("region", region.parent) != region.parent:
                raise Unsupported(f"{ir.describe(n)} ties two checkpointed regions together")
            inside.add(n)


def _has_effect(node: fx.Node) -> bool:
    """True if the order of ``node`` and its like matters beyond its operands."""
    if node.op == "call_module":
        return True
    if node.op != "call_function" or node.target is operator.getitem or ir.is_pure(node):
        return False
    numbers = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    return not isinstance(node.meta.get("val"), numbers)


def _fresh_attribute(module: nn.Module, prefix: str) -> str:
    return next(f"{prefix}_{i}" for i in itertools.count() if not hasattr(module, f"{prefix}_{i}"))
