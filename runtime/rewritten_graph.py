"""One rewritten graph of a model, and what decides whether it stands for a call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.fx.traceback
from torch import fx, nn

from ..passes import ir
from ..passes.autocast import ambient, disabled, restore
from ..passes.capture import out_spec
from ..passes.errors import Unsupported
from ..passes.snapshot import copy_graph
from ..passes.subgraphs import emit_eager, has_regions, outline
from ..passes.warn import warn
from ..passes.weights import WeightCache, lift, split
from .signature import Signature, Weights


class Graph:
    """One captured and rewritten graph, for one module mode and input signature.

    With gradients on, the weight program runs inline; without, it is split off and cached.
    """

    def __init__(self, gm: fx.GraphModule, owner: nn.Module, source: nn.Module) -> None:
        # of the two modules over the same weights, the owner must not be kept alive by its graph
        self.inline, self.names = lift(gm)
        self.inline.recompile()
        self._train = self._with_regions()
        self.signature = Signature(gm)
        self.out_spec = out_spec(gm)
        self.autocast = gm.meta.get("autocast", ())
        #: custom functions whose backward the capture could not see
        self.functions: list[str] = gm.meta.get("functions", [])
        # constants that the capture lifted out of the code are not the model's
        self.constants = {
            name: ir.attribute(gm, name) for name in self.names if not ir.has_attribute(owner, name)
        }
        self.weights = Weights(
            source, {n: ir.attribute(owner, n) for n in self.names if n not in self.constants}
        )
        self._split: fx.GraphModule | None = None
        self.cache: WeightCache | None = None

    def moved(self, source: nn.Module) -> Graph:
        """The same graph for a copy of the model, which has modules and weights of its own."""
        new = copy.copy(self)
        new.weights = self.weights.moved(source)
        new._split = new.cache = None
        return new

    def prepare_inference(self) -> WeightCache | None:
        """Split off the weight program (once); returns its cache, if there is a program."""
        if self._split is None:
            module = fx.GraphModule(self.inline, copy_graph(self.inline.graph))
            program = split(module)
            restore(module)
            module.recompile()
            self.cache = WeightCache(program) if program is not None else None
            self._split = module
        return self.cache

    def _with_regions(self) -> fx.GraphModule:
        """The graph with its checkpointed regions gathered and opaque ops under their autocast."""
        plain = self._runnable()
        if not has_regions(self.inline):
            return plain
        module = fx.GraphModule(self.inline, copy_graph(plain.graph))
        module.meta["regions"] = self.inline.meta["regions"]
        try:
            outline(module, emit_eager, weights_inside=True)
        except Unsupported as refusal:
            warn(f"activations will be kept: {refusal}")
            return plain
        module.recompile()
        return module

    def _runnable(self) -> fx.GraphModule:
        if not any("autocast" in n.meta for n in self.inline.graph.nodes):
            return self.inline
        module = fx.GraphModule(self.inline, copy_graph(self.inline.graph))
        restore(module)
        module.recompile()
        return module

    def _weights(self, owner: nn.Module, captured: bool) -> list[torch.Tensor]:
        """What the graph reads; ``captured``: ``owner`` holds the very modules of the capture."""
        names = [n for n in self.names if n not in self.constants]
        own = self.weights.read() if captured else [ir.attribute(owner, n) for n in names]
        if not self.constants:
            return own
        found = {**self.constants, **dict(zip(names, own, strict=True))}
        return [found[n] for n in self.names]

    def matches(self, flat: Sequence[Any]) -> bool:
        """True if the graph stands for these inputs and for the weights as they are now.

        ``.to(dtype)``, ``.to(device)``, resized and untied parameters call for a new graph.
        """
        return self.signature.matches(flat) and self.weights.unchanged()

    def traces(self, owner: nn.Module, flat: Sequence[Any]) -> bool:
        """:meth:`matches` and more, while Dynamo or ``torch.export`` is watching."""
        return (
            self.autocast == ambient()
            and self.signature.traces(flat)
            and self.weights.same_modules(owner)
            and self.weights.unchanged()
        )

    def run(
        self, owner: nn.Module, flat: Sequence[Any], *, inline: bool, captured: bool = False
    ) -> list[Any]:
        weights = self._weights(owner, captured)
        gm: Any = self._train
        folded: Sequence[torch.Tensor] = ()
        if not inline:
            cache = self.prepare_inference()
            gm = self._split
            if cache is not None:
                folded = cache([weights[i] for i in cache.program.leaves])
        with ExitStack() as stack:
            for context in disabled(self.autocast):
                stack.enter_context(context)
            if not torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting():
                # node by node, so that the new graph knows each node's module
                stack.enter_context(fx.traceback.preserve_node_meta())
                gm = fx.Interpreter(gm).run
            out = gm(*weights, *flat, *folded)
        return list(out) if isinstance(out, (tuple, list)) else [out]
