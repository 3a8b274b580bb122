"""Elementwise parts of a compiled step on large matrices: one loop over memory each.

Products of large matrices gain nothing from a compiler, and in one graph over a whole bucket everything
elementwise would go through fresh stacks. So on CPUs matrices stay where they are and only what is
elementwise is compiled: what comes before the first product, and the parameters' decay and update.
Sizes are symbolic: a pipeline needs one compilation of each, whatever the shapes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from .decay import computing_dtype
from .pipeline import (
    COMPILED,
    Pipeline,
    Tensors,
    pieces,
    run_leading,
    signed,
    sliceable,
    tracing,
)
from .stages import times


class Loop:
    """A function of flat tensors that writes its results into some of them, compiled."""

    def __init__(self, function: Callable[..., Any], example: Sequence[Tensor]) -> None:
        began = time.perf_counter()
        graph = make_fx(function, tracing_mode="symbolic")(*example)
        self._call = torch.compile(graph, dynamic=True, fullgraph=True)
        self.seconds = time.perf_counter() - began
        self._first = True

    def __call__(self, *args: Tensor) -> Any:
        if not self._first:
            return self._call(*args)
        with tracing():
            began = time.perf_counter()
            out = self._call(*args)
            self.seconds += time.perf_counter() - began
            self._first = False
            return out


def _signature(tensors: Sequence[Tensor]) -> tuple:
    # sizes are symbolic, but for 1, which broadcasts; the number of threads is in the code
    threads = torch.get_num_threads()
    return (threads, *((t.dtype, t.device, tuple(n == 1 for n in t.shape)) for t in tensors))


def lead(pipeline: Pipeline, t: Tensors, out: Tensor) -> Tensor | None:
    """The leading stages on one matrix ``[1, 1, n]``: rewrites its states and ``out`` ``[n]``.

    Returns:
        The multiplier of the weight decay, if a stage gave one.
    """
    flat, layout = t.flatten()

    def function(*args: Tensor) -> Tensor | None:
        batch = run_leading(pipeline, Tensors.unflatten(args[:-1], layout))
        args[-1].copy_(batch.update.flatten())
        return batch.decay

    args = (*flat, out)
    key = (lead, pipeline, layout, _signature(args))
    return COMPILED.fetch(key, lambda: Loop(function, args))(*args)


def run(pipeline: Pipeline, t: Tensors, targets: Sequence[Tensor]) -> bool:
    """The whole step of an elementwise pipeline, parameters (``targets``, ``[n]`` each) included;
    False if it cannot be done in one loop."""
    names = sliceable(pipeline, t)
    if names is None or pipeline.leading != pipeline.stages:
        return False
    for b, _, piece in pieces(t, names, t.grad[0].numel()):
        flat, layout = piece.flatten()
        args = (*flat, targets[b])
        key = (run, pipeline, layout, _signature(args))
        COMPILED.fetch(key, functools.partial(Loop, _whole(pipeline, layout), args))(*args)
    if t.step is not None:
        t.step.add_(1)
    return True


def _whole(pipeline: Pipeline, layout: tuple) -> Callable[..., None]:
    def function(*args: Tensor) -> None:
        piece = Tensors.unflatten(args[:-1], layout)
        batch = run_leading(pipeline, piece)
        update = signed(batch).to(piece.grad.dtype).flatten()
        keep = pipeline.keep(piece.hyper, batch.decay)
        pipeline.move(args[-1], update, keep.reshape(()))

    return function


def move(
    pipeline: Pipeline, target: Tensor, update: Tensor, factors: Sequence[Tensor], keep: Any
) -> None:
    """``target ← keep·target + update·factors``, both ``[r, c]``; factors broadcast."""
    keep = torch.as_tensor(keep, dtype=torch.float64).to(target.device, computing_dtype(target))

    def function(target: Tensor, update: Tensor, keep: Tensor, *factors: Tensor) -> None:
        pipeline.move(target, times(update, factors).to(target.dtype), keep)

    args = (target, update, keep, *factors)
    flags = (pipeline.decay_order, pipeline.cautious)
    COMPILED.fetch((move, flags, _signature(args)), lambda: Loop(function, args))(*args)
