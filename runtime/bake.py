"""Baked rewriting: folded weights stored as the module's parameters, in place of the originals.

What rotation, quantization and serving tools want: plain weights, no norm affines, no weight program.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..passes import ir
from ..passes.autocast import disabled, restore
from ..passes.capture import capture, out_spec, set_attribute
from ..passes.errors import NormfuseError
from ..passes.in_turn import in_turn
from ..passes.report import Report
from ..passes.subgraphs import emit_eager, outline
from ..passes.weights import lift, split
from .likeness import address, found, resembling
from .signature import Signature
from .transform import Settings, transform


class BakedModule(nn.Module):
    """A rewritten model with folded weights as ordinary parameters.

    One graph: the mode (train or eval) of the captured model is part of it. Calling it with inputs
    the graph does not stand for raises.

    Attributes:
        graph_module: the flat graph, called as ``graph_module(*weights, *inputs, *folded)``.
        weight_names, folded_names: the parameters and buffers it reads, in that order.
    """

    graph_module: fx.GraphModule

    def __init__(
        self,
        gm: fx.GraphModule,
        weight_names: list[str],
        folded_names: list[str],
        specs: tuple[pytree.TreeSpec, pytree.TreeSpec],
        autocast: tuple,
        signature: Signature | None,
        model: tuple[str, str],
    ) -> None:
        super().__init__()
        self._model = model
        # not a submodule: it holds no state, and must not show up in named_modules()
        self.__dict__["graph_module"] = gm
        self.weight_names, self.folded_names = weight_names, folded_names
        self._in_spec, self._out_spec = specs
        self._autocast = autocast
        self._signature = signature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat, in_spec = pytree.tree_flatten((args, kwargs))
        if in_spec != self._in_spec:
            raise NormfuseError(
                f"this baked module was captured for inputs {self._in_spec}, got {in_spec}"
            )
        if self._signature is not None and not torch.compiler.is_compiling():
            if not self._signature.matches(flat):
                given = [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in flat]
                raise NormfuseError(
                    f"this baked module's graph does not stand for inputs {given}; rewrite the "
                    "original model again with such an example (or with dynamic=True)"
                )
        with ExitStack() as stack:
            for context in disabled(self._autocast):
                stack.enter_context(context)
            out = self.graph_module(
                *[ir.attribute(self, n) for n in self.weight_names],
                *flat,
                *[ir.attribute(self, n) for n in self.folded_names],
            )
        out = list(out) if isinstance(out, (tuple, list)) else [out]
        return pytree.tree_unflatten(out, self._out_spec)

    def __reduce__(self) -> tuple:  # its class is made on the way
        return _unpickled, self._model, self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        # fake tensors do not pickle; an unpickled module no longer checks its inputs
        return {**self.__dict__, "_signature": None}


def _unpickled(module: str, name: str) -> BakedModule:
    return object.__new__(found(BakedModule, module, name))


@in_turn
def bake(
    source: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], settings: Settings
) -> tuple[BakedModule, Report]:
    """Capture, rewrite and evaluate the weight program of ``source`` (already a private copy)."""
    start = time.perf_counter()
    gm = capture(
        source, tuple(args), dict(kwargs), dynamic=settings.dynamic, remember=settings.verify
    )
    flat, in_spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    report, _ = transform(gm, flat, settings, training=False)
    lifted, names = lift(gm)
    program = split(lifted)
    placeholders = lifted.graph.find_nodes(op="placeholder")
    read: list[str] = []
    for name, node in zip(names, placeholders, strict=False):
        if node.users:
            read.append(name)
        else:
            lifted.graph.erase_node(node)
    folded: dict[str, torch.Tensor] = {}
    trainable: set[str] = set()
    if program is not None:
        leaves = [ir.attribute(gm, names[i]) for i in program.leaves]
        with torch.no_grad():
            tensors = program.module(*leaves)
        made_of = _ingredients(program.module.graph)
        new = zip(placeholders[-len(tensors) :], tensors, made_of, strict=True)
        for node, tensor, used in new:
            name = node.meta["fqn"]
            # what was frozen stays so; a new bias trains if something it was made of does
            if ir.has_attribute(gm, name):
                trains = ir.attribute(gm, name).requires_grad
            else:
                trains = any(leaves[i].requires_grad for i in used)
            while name in read or name in folded:
                name += "_folded"
            folded[name] = tensor.clone()
            if trains:
                trainable.add(name)
    restore(lifted)
    if source.training:
        outline(lifted, emit_eager)
    lifted.recompile()
    module = resembling(BakedModule, type(source), source.forward)(
        lifted,
        read,
        list(folded),
        (in_spec, out_spec(gm)),
        gm.meta.get("autocast", ()),
        Signature(gm),
        address(type(source)),
    )
    for name in read:
        set_attribute(module, name, ir.attribute(gm, name))
    for name, tensor in folded.items():
        floating = tensor.is_floating_point()
        set_attribute(module, name, nn.Parameter(tensor, name in trainable) if floating else tensor)
    module.train(source.training)
    report.seconds = time.perf_counter() - start
    return module, report


def _ingredients(graph: fx.Graph) -> list[set[int]]:
    """For each output of a weight program, the inputs (by position) it is computed from."""
    known = {n: {i} for i, n in enumerate(graph.find_nodes(op="placeholder"))}
    for n in graph.nodes:
        known.setdefault(n, set()).update(*(known[m] for m in n.all_input_nodes))
    return [known[n] for n in graph.output_node().args[0]]  # type: ignore[index,union-attr]
