"""A pipeline: stages plus what surrounds them, run eagerly or traced once and compiled.

The step of one bucket is a function of stacked tensors: gradients, states, hyper-parameters and
constants in; the signed update (``-lr·direction``) out; states rewritten in place. ``CompiledStep``
traces it to one graph with fake tensors and hands it to Inductor: no Dynamo, hence no guards, no
recompilation when a learning rate moves, and nothing that depends on how many parameters there are.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.warn import warn
from . import kernel_products
from .decay import add_decayed, computing_dtype
from .products import scratch
from .stages import Batch, Stage, StateSpec, times

#: Elementwise work on large matrices on CPUs is done this many entries a thread at a time, so that
#: temporaries stay in cache and are not fresh pages: several times faster than whole matrices.
PIECE = 2**18

#: Hyper-parameters that every pipeline has as tensors.
COMMON_HYPER = ("lr", "weight_decay")


@dataclass(frozen=True)
class Pipeline:
    """What an algorithm does to one group.

    Attributes:
        stages: applied in order to the gradient.
        hyper: names of the group's entries, besides ``lr`` and ``weight_decay``, that stages read as
            0-d tensors; ``betas`` becomes ``beta1`` and ``beta2``.
        decay_order: ``"before"`` (``p·(1-lr·λ) - u``) or ``"after"`` (``(p - u)·(1-lr·λ)``).
        decay_factor: further factor on ``lr·λ`` (an algorithm that decays with a scaled rate).
        cautious: decay only entries where the update shrinks them.
        matrix: needs matrices; otherwise any shape.
    """

    stages: tuple[Stage, ...]
    hyper: tuple[str, ...] = ()
    decay_order: str = "before"
    decay_factor: float = 1.0
    cautious: bool = False
    matrix: bool = True

    @property
    def transposable(self) -> bool:
        return all(s.transposable for s in self.stages)

    @property
    def elementwise(self) -> bool:
        return all(s.elementwise for s in self.stages)

    @property
    def leading(self) -> tuple[Stage, ...]:
        """The elementwise stages that come first."""
        stages = self.stages
        count = next((i for i, s in enumerate(stages) if not s.elementwise), len(stages))
        return stages[:count]

    @property
    def reads_param(self) -> bool:
        return any(s.reads_param for s in self.stages)

    @property
    def counts_steps(self) -> bool:
        return any(s.counts_steps for s in self.stages)

    @property
    def periodic(self) -> bool:
        return any(s.period for s in self.stages)

    @property
    def reads_ndim(self) -> bool:
        return any(s.reads_ndim for s in self.stages)

    def keep(self, hyper: Mapping[str, Tensor], decay: Tensor | None = None) -> Tensor:
        """The factor ``1 - lr·λ`` on the parameters, ``decay`` being the batch's multiplier of λ."""
        rate = hyper["lr"] * hyper["weight_decay"] * self.decay_factor
        return 1 - (rate if decay is None else rate * decay)

    def move(self, target: Tensor, update: Tensor, keep: Any) -> None:
        """``target ← keep·target + update``, in this pipeline's way; see :func:`add_decayed`."""
        after = self.decay_order == "after"
        add_decayed(target, update, keep, after=after, cautious=self.cautious)

    def states(self, rows: int, cols: int) -> dict[str, StateSpec]:
        return {k: v for s in self.stages for k, v in s.states(rows, cols).items()}

    def flops(self, rows: int, cols: int) -> float:
        return sum(s.flops(rows, cols) for s in self.stages)

    def constants(self, rows: int, cols: int) -> dict[str, float]:
        return {k: v for s in self.stages for k, v in s.constants(rows, cols).items()}


@dataclass
class Tensors:
    """The stacked tensors of one bucket's step; see :class:`~.stages.Batch` for the shapes."""

    grad: Tensor
    state: dict[str, Tensor]
    hyper: dict[str, Tensor]
    constants: dict[str, Tensor]
    step: Tensor | None
    param: Tensor | None

    def flatten(self) -> tuple[list[Tensor], tuple[Any, ...]]:
        optional = [t for t in (self.step, self.param) if t is not None]
        parts = [self.grad, *self.state.values(), *self.hyper.values(), *self.constants.values()]
        layout = (
            tuple(self.state),
            tuple(self.hyper),
            tuple(self.constants),
            self.step is not None,
            self.param is not None,
        )
        return parts + optional, layout

    @staticmethod
    def unflatten(flat: list[Tensor] | tuple[Tensor, ...], layout: tuple[Any, ...]) -> Tensors:
        items = iter(flat)
        grad = next(items)
        state, hyper, constants = ({k: next(items) for k in names} for names in layout[:3])
        step = next(items) if layout[3] else None
        return Tensors(grad, state, hyper, constants, step, next(items) if layout[4] else None)


def finite_mask(grad: Tensor) -> Tensor:
    """``[B, 1, 1]``: which matrices hold only finite numbers (one pass, no overflow)."""
    return torch.isfinite(grad.abs().amax((-2, -1), keepdim=True))


def make_batch(t: Tensors, ok: Tensor | None = None) -> Batch:
    """What the first stage sees; matrices outside the mask ``ok`` have zero gradients."""
    dtype = computing_dtype(t.grad)
    grad = t.grad.to(dtype)
    if ok is not None:
        grad = torch.where(ok, grad, 0.0)
    return Batch(
        direction=grad,
        grad=grad,
        param=None if t.param is None else t.param.to(dtype),
        state={k: v.to(computing_dtype(v)) for k, v in t.state.items()},
        hyper=t.hyper,
        constants=t.constants,
        step=None if t.step is None else t.step + 1,
    )


def factors_of(batch: Batch) -> list[Tensor]:
    """What ``batch.direction`` is multiplied by to be added to the parameters: one factor for each matrix
    (0-d or ``[B, 1, 1]``), ``-lr`` among it, or for its lines, or both."""
    rate, lines = -batch.hyper["lr"], []
    for factor in batch.factors:
        if isinstance(factor, Tensor) and factor.shape[-2:] != (1, 1):
            lines.append(factor)
        else:
            rate = rate * factor
    return [lines[0] * rate] if len(lines) == 1 else [rate, *lines]


def signed(batch: Batch) -> Tensor:
    """What is added to the parameters."""
    return times(batch.direction, factors_of(batch))


def pieces(
    t: Tensors, names: list[str], size: int | None = None
) -> Iterator[tuple[int, slice, Tensors]]:
    """``t`` in runs ``[1, 1, n]`` of up to ``size`` entries of one matrix (None: what caches hold);
    states other than ``names`` left out."""
    grads = t.grad.flatten(1)
    states = {k: t.state[k].flatten(1) for k in names}
    params = None if t.param is None else t.param.flatten(1)
    size = size or PIECE * torch.get_num_threads()
    for b in range(grads.shape[0]):
        row = slice(b, b + 1)
        constants = {k: v[row] for k, v in t.constants.items()}
        step = None if t.step is None else t.step[row]
        for low in range(0, grads.shape[1], size):
            span = slice(low, low + size)
            yield (
                b,
                span,
                Tensors(
                    grads[None, row, span],
                    {k: v[None, row, span] for k, v in states.items()},
                    t.hyper,
                    constants,
                    step,
                    None if params is None else params[None, row, span],
                ),
            )


def sliceable(pipeline: Pipeline, t: Tensors) -> list[str] | None:
    """Names of the leading stages' states, or None if these cannot run a piece at a time."""
    rows, cols = t.grad.shape[-2:]
    specs = {k: v for s in pipeline.leading for k, v in s.states(rows, cols).items()}
    tensors = [t.grad, *(t.state[k] for k in specs)]
    if not pipeline.leading or any(x.shape != t.grad.shape for x in tensors):
        return None
    return list(specs) if all(x.is_contiguous() for x in tensors) else None


def run_leading(pipeline: Pipeline, t: Tensors) -> Batch:
    """What the leading stages make of ``t``, whose states are rewritten."""
    batch = make_batch(t)
    for stage in pipeline.leading:
        batch = stage(batch)
    for name, old in t.state.items():
        old.copy_(batch.state[name])
    return batch


def run_in_pieces(
    pipeline: Pipeline, t: Tensors, sink: Callable[[int, slice, Tensor, Tensor | None], None]
) -> bool:
    """The whole step of an elementwise pipeline, a piece at a time; False if it cannot be.

    Args:
        sink: given matrix, span of its flat entries, signed update ``[n]`` and factor on the parameter
            (or None, as in :func:`run`) of each piece.
    """
    names = sliceable(pipeline, t)
    if names is None or pipeline.leading != pipeline.stages:
        return False
    for b, span, piece in pieces(t, names):
        batch = run_leading(pipeline, piece)
        keep = None if batch.decay is None else pipeline.keep(t.hyper, batch.decay)
        sink(b, span, signed(batch).to(t.grad.dtype).flatten(), keep)
    if t.step is not None:
        t.step.add_(1)
    return True


def run_unscaled(
    pipeline: Pipeline,
    t: Tensors,
    lead: Callable[[Tensors, Tensor], Tensor | None] | None = None,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """:func:`run` for large matrices on a CPU: the leading stages run a piece at a time.

    Args:
        lead: does what the leading stages do to one whole matrix; see ``fused.lead``.

    Returns:
        ``(direction, factors, decay)``: the update is their product (see :func:`factors_of`), not yet
        multiplied and in the computing dtype; good until the next step.
    """
    names = sliceable(pipeline, t)
    stages = pipeline.stages
    if names is None:
        names, batch = [], make_batch(t)
    else:
        stages = stages[len(pipeline.leading) :]
        like = t.grad.new_empty(0, dtype=computing_dtype(t.grad))
        update = scratch("direction", t.grad.shape, like)
        flat, decays = update.flatten(1), {}
        size = t.grad[0].numel() if lead is not None else None
        for b, span, piece in pieces(t, names, size):
            if lead is not None:
                decays[b] = lead(piece, flat[b])
                continue
            part = run_leading(pipeline, piece)
            flat[b, span] = part.update.flatten()
            decays[b] = part.decay
        decay = torch.cat(list(decays.values())) if decays[0] is not None else None
        batch = replace(make_batch(t), direction=update, decay=decay)
    for stage in stages:
        batch = stage(batch)
    for key, old in t.state.items():
        if key not in names:
            old.copy_(batch.state[key])
    if t.step is not None:
        t.step.add_(1)
    keep = None if batch.decay is None else pipeline.keep(t.hyper, batch.decay)
    return batch.direction, factors_of(batch), keep


def run(pipeline: Pipeline, t: Tensors, masked: bool) -> tuple[Tensor, Tensor | None]:
    """One step of a bucket: rewrites ``t.state`` and ``t.step`` in place.

    Args:
        masked: matrices with non-finite gradients are left alone, by selection inside the graph.

    Returns:
        ``(update, decay)``: ``[B, r, c]`` to be added to the parameters, in their dtype, and the
        factors ``[B, 1, 1]`` to multiply them by, or None when all decay alike.
    """
    ok = finite_mask(t.grad) if masked else None
    batch = make_batch(t, ok)
    for stage in pipeline.stages:
        batch = stage(batch)
    update = signed(batch)
    decay = batch.decay
    if decay is not None or ok is not None:
        decay = pipeline.keep(t.hyper, decay)
    if ok is not None:
        update = torch.where(ok, update, 0.0)
        assert decay is not None
        decay = torch.where(ok, decay, 1.0)
    for key, old in t.state.items():
        new = batch.state[key].to(old.dtype)
        old.copy_(new if ok is None else torch.where(ok, new, old))
    if t.step is not None:
        t.step.add_(1 if ok is None else ok.to(t.step.dtype))
    return update.to(t.grad.dtype), decay


def tracing() -> Any:
    """The lock held while a step is traced, the one of captures; imported late: only what compiles needs
    Dynamo, whose lock it is."""
    from ..passes.in_turn import compile_lock

    return compile_lock


def _compiled(step: Callable[..., Any], flat: list[Tensor]) -> tuple[fx.GraphModule, Any]:
    """The traced graph and what calls it; without our kernels in it if it does not compile with them."""
    from torch._inductor.compile_fx import compile_fx
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(step, tracing_mode="fake")(*flat)
    try:
        return graph, compile_fx(graph, flat)
    except Exception as error:
        if not kernel_products.are_in(graph) or kernel_products.policy() == "never":
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warn(
            "normfuse's kernels did not compile inside an optimizer step, which calls its "
            f"orthogonalization as one operator instead: {reason}"
        )
    with kernel_products.kernels("never"):
        graph = make_fx(step, tracing_mode="fake")(*flat)
        return graph, compile_fx(graph, flat)


def run_stages(stages: tuple[Stage, ...], t: Tensors) -> tuple[Tensor, Tensor | None]:
    """``(update, decay)`` of some of a pipeline's stages; rewrites ``t.state``, not ``t.step``."""
    batch = make_batch(t)
    for stage in stages:
        batch = stage(batch)
    for key, old in t.state.items():
        old.copy_(batch.state[key].to(old.dtype))
    return batch.update, batch.decay


class CompiledStep:
    """A function of :class:`Tensors` like :func:`run`, for one signature, traced and compiled."""

    def __init__(
        self, function: Callable[[Tensors], tuple[Tensor, Tensor | None]], example: Tensors
    ) -> None:
        began = time.perf_counter()
        flat, self.layout = example.flatten()
        layout = self.layout

        def traced(*args: Tensor) -> tuple[Tensor, ...]:
            update, decay = function(Tensors.unflatten(args, layout))
            return (update,) if decay is None else (update, decay)

        with torch.no_grad():
            self.graph, self._call = _compiled(traced, flat)
        self.seconds = time.perf_counter() - began

    def __call__(self, t: Tensors) -> tuple[Tensor, Tensor | None]:
        flat, _ = t.flatten()
        out = self._call(*flat)
        return out[0], (out[1] if len(out) > 1 else None)


def _meta(t: Tensors) -> tuple[Any, ...]:
    """What a graph depends on but its function."""
    flat, layout = t.flatten()
    meta = tuple((x.shape, x.stride(), x.dtype, x.device) for x in flat)
    return layout, meta, kernel_products.policy()


class CompileCache:
    """Compiled steps by signature, least recently used dropped; shared by a process's optimizers."""

    def __init__(self, size: int = 256) -> None:
        self.size = size
        self._entries: OrderedDict[Any, Any] = OrderedDict()
        self._dropped: set[int] = set()
        self._lock = threading.Lock()  # of lookups, which wait for no compilation
        self.misses = 0

    def get(self, pipeline: Pipeline, t: Tensors, masked: bool) -> CompiledStep:
        """The whole step of one bucket."""
        key = (pipeline, masked, *_meta(t))
        return self.fetch(key, lambda: CompiledStep(lambda x: run(pipeline, x, masked), t))

    def stages(self, stages: tuple[Stage, ...], t: Tensors) -> CompiledStep:
        """Some of a pipeline's stages."""
        return self.fetch(
            (stages, *_meta(t)), lambda: CompiledStep(lambda x: run_stages(stages, x), t)
        )

    def fetch(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` made for ``key``: it has ``seconds``, what compiling took."""
        found = self._renewed(key)
        if found is None:
            with tracing():
                found = self._renewed(key)  # another thread may have made it
                if found is None:
                    found = make()
                    self._keep(key, found)
        return found

    def _renewed(self, key: Any) -> Any:
        """The entry of ``key``, now the last used one, or None."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found

    def _keep(self, key: Any, made: Any) -> None:
        with self._lock:
            self.misses += 1
            if hash(key) in self._dropped:  # too small for what is in use
                self.size *= 2
                self._dropped.clear()
            self._entries[key] = made
            if len(self._entries) > self.size:
                self._dropped.add(hash(self._entries.popitem(last=False)[0]))


COMPILED = CompileCache()
