"""What ``torch.export`` forgets while it traces: checkpoints, and backwards of custom functions."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .subgraphs import Region, provenance_of

_MARK = "normfuse_region"


@contextlib.contextmanager
def recorded_checkpoints() -> Iterator[dict[int, Region]]:
    """While active, ``torch.utils.checkpoint`` in this thread marks the nodes traced inside it.

    ``torch.export`` runs the checkpointed function like any other and forgets that it was one.
    """
    from torch._higher_order_ops.wrap import tag_activation_checkpoint  # noqa: F401  (loads SAC)
    from torch.utils import checkpoint as module

    regions: dict[int, Region] = {}
    stack: list[int] = []
    original = module._checkpoint_without_reentrant_generator
    reentrant = module.CheckpointFunction
    names = list(inspect.signature(original).parameters)
    owner = threading.get_ident()

    def marked(*args: Any, **kwargs: Any) -> Iterator[None]:
        given = dict(zip(names, args, strict=False))
        if threading.get_ident() != owner or not torch.is_grad_enabled():
            yield from original(*args, **kwargs)
            return
        context_fn = given.get("context_fn", module.noop_context_fn)
        forward = context_fn()[0]
        selective = isinstance(forward, module._CachingTorchDispatchMode)
        key = len(regions)
        regions[key] = Region(
            stack[-1] if stack else None,
            {
                "preserve_rng_state": given.get("preserve_rng_state", True),
                **({} if context_fn is module.noop_context_fn else {"context_fn": context_fn}),
                "determinism_check": given.get("determinism_check", "default"),
            },
        )
        stack.append(key)
        try:
            # a selective policy decides what is kept, not what is computed: nothing to trace
            with contextlib.nullcontext() if selective else forward, _marking(key):
                yield
        finally:
            stack.pop()

    class Marked:
        """In place of the reentrant form, which runs without gradients and so loses them here."""

        @staticmethod
        def apply(function: Callable, preserve_rng_state: bool, *args: Any) -> Any:
            if threading.get_ident() != owner:
                return reentrant.apply(function, preserve_rng_state, *args)
            region = marked(function, preserve_rng_state)
            next(region)
            result = function(*args)
            next(region, None)
            return result

    module._checkpoint_without_reentrant_generator = marked  # type: ignore[assignment]
    module.CheckpointFunction = Marked  # type: ignore[assignment,misc]
    try:
        yield regions
    finally:
        module._checkpoint_without_reentrant_generator = original
        module.CheckpointFunction = reentrant  # type: ignore[misc]


@contextlib.contextmanager
def recorded_functions() -> Iterator[list[str]]:
    """While active, collects the names of ``autograd.Function`` classes that this thread calls.

    Tracing without Dynamo sees what their forward computes and forgets their backward.
    """
    found: list[str] = []
    owner = threading.get_ident()
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        # a higher-order op stays one node, which PyTorch differentiates by itself
        whole = cls.__module__.startswith("torch._higher_order_ops.")
        if threading.get_ident() == owner and torch.is_grad_enabled() and not whole:
            if cls.__name__ not in found:
                found.append(cls.__name__)
        return original.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment,method-assign]
    try:
        yield found
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _marking(key: int) -> Iterator[None]:
    """Mark the nodes traced inside, but for those of inner regions."""
    mode = get_proxy_mode()
    if mode is None:  # a call outside of tracing
        yield
        return
    graph = mode.tracer.graph
    before = len(graph.nodes)
    yield
    for node in itertools.islice(reversed(graph.nodes), len(graph.nodes) - before):
        custom = node.meta.get("custom", {})
        if _MARK not in custom:
            node.meta["custom"] = {**custom, _MARK: key}


def read_marks(gm: fx.GraphModule, regions: dict[int, Region]) -> None:
    """Turn the marks of :func:`recorded_checkpoints` into region tags."""
    for node in gm.graph.nodes:
        custom = node.meta.get("custom")
        if not isinstance(custom, dict) or _MARK not in custom:
            continue
        key = custom[_MARK]
        node.meta["custom"] = {k: v for k, v in custom.items() if k != _MARK}
        if key in regions and node.op == "call_function":
            node.meta["region"] = key
            if not regions[key].provenance:
                regions[key].provenance = provenance_of(node.meta)
    gm.meta["regions"] = regions
