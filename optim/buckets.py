"""Buckets: parameters of one group and shape, with their states stacked in one tensor each.

The states that a user sees in ``optimizer.state[p]`` (and saves, and loads) are views into the
stacks. Whoever replaces such a view — ``load_state_dict``, ``deepcopy``, unpickling, a user — is
noticed by identity at the next step, and the stacks are rebuilt from what is there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..passes.warn import warn
from . import fused
from . import newton_schulz as ns
from .decay import computing_dtype
from .pipeline import (
    COMMON_HYPER,
    COMPILED,
    PIECE,
    Pipeline,
    Tensors,
    finite_mask,
    make_batch,
    run,
    run_in_pieces,
    run_unscaled,
)
from .stages import StateSpec, times
from .threads import Task

VIEWS = ("matrix", "flatten", "batch")

#: On a CPU matrices above this size are worked on one by one, their elementwise stages a piece at a time.
CACHE_BYTES = 2**20

#: Eager steps on smaller ones take this many bytes of them per thread at a time.
PORTION_BYTES = 2**20


@dataclass(frozen=True)
class Slot:
    """One parameter's place in a bucket, or one piece of a parameter that is split.

    ``count`` consecutive matrices ``[rows, cols]``; ``turned`` ones are stored transposed.
    """

    param: Tensor
    name: str
    suffix: str
    dim: int | None
    start: int
    length: int
    count: int
    rows: int
    cols: int
    turned: bool
    #: A sharded parameter that is split: how its whole comes apart.
    parts: tuple[Slot, ...] = ()

    def target(self, t: Tensor) -> Tensor:
        """The part of ``t`` (the parameter, its gradient, …) this slot stands for: a view."""
        return t if self.dim is None else t.narrow(self.dim, self.start, self.length)

    def gather(self, t: Tensor) -> Tensor:
        """``[count, r, c]`` as the bucket stacks it; a view where strides allow."""
        part = self.target(t).reshape(self.count, self.rows, self.cols)
        return part.mT if self.turned else part

    def view(self, stacked: Tensor, spec: StateSpec | None = None) -> Tensor:
        """Inverse of :meth:`gather` for ``stacked[count, …]``: shaped like the target."""
        shape = self.target(self.param).shape
        if spec is not None and spec.shape != self.stacked_shape:
            return stacked[0] if self.count == 1 else stacked
        return stacked[0].mT if self.turned else stacked.view(shape)

    @property
    def stacked_shape(self) -> tuple[int, int]:
        return (self.cols, self.rows) if self.turned else (self.rows, self.cols)

    def key(self, state: str) -> str:
        return state + self.suffix


def make_slots(p: Tensor, name: str, group: Mapping[str, Any], pipeline: Pipeline) -> list[Slot]:
    """How a parameter becomes matrices, by the group's ``view`` and ``split``.

    ``view``: ``"matrix"`` (2-D), ``"flatten"`` (``[out, everything else]``: convolutions) or
    ``"batch"`` (leading dimensions count matrices: expert stacks). ``split``: number of equal
    parts, or their sizes, along dimension 0; or ``(dim, parts)``.

    Raises:
        ValueError: the parameter is not what the group says, by name.
    """
    if not pipeline.matrix and pipeline.elementwise:
        return [Slot(p, name, "", None, 0, 0, 1, 1, p.numel(), False)]
    view = group.get("view", "matrix")
    if view not in VIEWS:
        raise ValueError(f"view must be one of {VIEWS}, got {view!r}")
    if not pipeline.matrix:
        rows = p.shape[0] if p.ndim > 1 else 1
        return [Slot(p, name, "", None, 0, 0, 1, rows, p.numel() // max(rows, 1), False)]
    if p.ndim < 2 or (p.ndim > 2 and view == "matrix"):
        raise ValueError(
            f"{group['algorithm']} only supports 2D parameters, but {name} has shape "
            f"{tuple(p.shape)}; give its group view='flatten' (convolutions) or view='batch' "
            "(stacks of matrices), or algorithm='adamw' (see normfuse.optim.param_groups)"
        )
    out: list[Slot] = []
    pieces = _pieces(p, name, group.get("split"))
    sharded = hasattr(p, "placements") and len(pieces) > 1
    if sharded and view != "batch" and all((d, n) == (0, pieces[0][2]) for d, _, n in pieces):
        # equal parts along dimension 0 are consecutive matrices of one slot
        rows, cols = pieces[0][2], math.prod(p.shape[1:])
        return [Slot(p, name, "", None, 0, 0, len(pieces), rows, cols, False)]
    for i, (dim, start, length) in enumerate(pieces):
        shape = list(p.shape)
        if dim is not None:
            shape[dim] = length
        if view == "batch":
            count, rows, cols = math.prod(shape[:-2]), shape[-2], shape[-1]
        else:
            count, rows, cols = 1, shape[0], math.prod(shape[1:])
        turned = (
            pipeline.transposable
            and rows > cols
            and len(shape) == 2
            and not hasattr(p, "placements")
            and (rows * cols <= ns.TURN_UP_TO or p.device.type != "cpu")
        )
        suffix = "" if i == 0 else f".{i}"
        out.append(Slot(p, name, suffix, dim, start, length, count, rows, cols, turned))
    if not sharded:
        return out
    (whole,) = make_slots(p, name, {**group, "split": None}, pipeline)
    if any(part.count != whole.count for part in out):
        raise ValueError(
            f"{name} is a DTensor whose split would cut dimension {pieces[0][0]}, which counts its "
            "matrices: it leaves them whole, and is not needed"
        )
    return [replace(whole, parts=tuple(out))]


def _pieces(p: Tensor, name: str, split: Any) -> list[tuple[int | None, int, int]]:
    if split is None:
        return [(None, 0, 0)]
    dim, parts = 0, split
    if isinstance(split, (tuple, list)) and len(split) == 2 and isinstance(split[1], (tuple, list)):
        dim, parts = int(split[0]), split[1]
    size = p.shape[dim]
    if isinstance(parts, int) and not isinstance(parts, bool):
        if parts < 1 or size % parts:
            raise ValueError(f"split={split}: {name} has {size} entries along dim {dim}")
        parts = [size // parts] * parts
    sizes = [int(v) for v in parts]
    if any(v < 1 for v in sizes) or sum(sizes) != size:
        raise ValueError(
            f"split={split}: the sizes must be positive and add up to {size}, the length of {name} "
            f"{tuple(p.shape)} along dim {dim}"
        )
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [(dim, s, v) for s, v in zip(starts, sizes, strict=True)]


class Bucket:
    """Matrices of one group and stacked shape: states, constants and the step over them."""

    sharded = False

    def __init__(
        self,
        slots: Sequence[Slot],
        pipeline: Pipeline,
        group: Mapping[str, Any],
        state: Mapping[Tensor, dict[str, Any]],
    ) -> None:
        self.slots = list(slots)
        self.pipeline = pipeline
        self.group = group
        first = self.slots[0]
        self.rows, self.cols = first.stacked_shape
        self.dtype, self.device = first.param.dtype, first.param.device
        self.computing = computing_dtype(first.param)
        self.total = sum(s.count for s in self.slots)
        self.offsets = [sum(s.count for s in self.slots[:i]) for i in range(len(self.slots))]
        self.specs = self._specs()
        self.stacks = self._make_stacks()
        self.step = (
            torch.zeros(self.total, 1, 1, dtype=torch.float32, device=self.device)
            if pipeline.counts_steps
            else None
        )
        self._handed: list[tuple[Tensor, str, Tensor]] = []
        self._bind(state)
        self._host_steps = [0] * len(self.slots)
        self._compiled = False
        if self.periodic and self.step is not None:
            self._host_steps = [int(self.step[o]) for o in self.offsets]
        per_slot = [pipeline.constants(s.rows, s.cols) for s in self.slots for _ in range(s.count)]
        self.constants = {
            k: torch.tensor([c[k] for c in per_slot], dtype=torch.float64)
            .to(device=self.device, dtype=self.computing)
            .view(-1, 1, 1)
            for k in (per_slot[0] if per_slot else {})
        }
        if pipeline.reads_ndim:
            flags = [float(s.param.ndim < 2) for s in self.slots for _ in range(s.count)]
            self.constants["is_vector"] = torch.tensor(
                flags, device=self.device, dtype=self.computing
            ).view(-1, 1, 1)
        scalar = torch.float64 if self.device.type in ("cpu", "cuda") else torch.float32
        names = (*COMMON_HYPER, *pipeline.hyper)
        self.hyper = {k: torch.zeros((), dtype=scalar, device=self.device) for k in _expand(names)}

    @property
    def periodic(self) -> bool:
        return self.pipeline.periodic

    def _specs(self) -> dict[str, StateSpec]:
        return self.pipeline.states(self.rows, self.cols)

    def _state_dtype(self, spec: StateSpec) -> torch.dtype:
        if spec.dtype is None or self.dtype == torch.float64:
            return self.dtype
        return spec.dtype

    def _make_stacks(self) -> dict[str, Tensor]:
        return {k: self._new(spec) for k, spec in self.specs.items()}

    def _new(self, spec: StateSpec) -> Tensor:
        shape = (self.total, *spec.shape)
        dtype = self._state_dtype(spec)
        if spec.fill == "eye":
            eye = torch.eye(*spec.shape, dtype=dtype, device=self.device)
            return eye.expand(shape).contiguous()
        return torch.full(shape, float(spec.fill), dtype=dtype, device=self.device)

    # -- states as the user sees them --------------------------------------------------------------

    def _bind(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Copy what the optimizer's state already holds into the stacks, and hand out views."""
        for i, (slot, offset) in enumerate(zip(self.slots, self.offsets, strict=True)):
            span = slice(offset, offset + slot.count)
            for name, spec in self.specs.items():
                view = self._view_of(slot, i, offset, name, spec)
                self._bind_one(slot, slot.key(name), view, state)
            if self.step is not None:
                view = self.step[offset].view(())
                old = state[slot.param].get("step") if slot.param in state else None
                if old is not None:
                    self.step[span] = float(old)
                if not slot.suffix:
                    state[slot.param]["step"] = view
                    self._handed.append((slot.param, "step", view))

    def _view_of(self, slot: Slot, index: int, offset: int, name: str, spec: StateSpec) -> Tensor:
        return slot.view(self.stacks[name][offset : offset + slot.count], spec)

    def _copy_into(self, view: Tensor, old: Tensor) -> None:
        view.copy_(old.reshape(view.shape))

    def _bind_one(
        self, slot: Slot, key: str, view: Tensor, state: Mapping[Tensor, dict[str, Any]]
    ) -> None:
        old = state[slot.param].get(key) if slot.param in state else None
        if isinstance(old, Tensor):
            if old.numel() == view.numel():
                self._copy_into(view, old)
            else:
                warn(
                    f"{slot.name}: its state {key!r} has shape {tuple(old.shape)}, but "
                    f"{tuple(view.shape)} is needed now; it starts afresh"
                )
        state[slot.param][key] = view
        self._handed.append((slot.param, key, view))

    def intact(self, state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether every view handed out is still the state the optimizer holds."""
        return all(p in state and state[p].get(k) is v for p, k, v in self._handed)

    # -- the step ------------------------------------------------------------------------------------

    def finite(self, active: Sequence[int], grads: Callable[[Slot], Tensor]) -> list[bool]:
        """Whether the gradient of each active slot holds finite numbers only."""
        return [_all_finite(s.target(grads(s))) for s in (self.slots[i] for i in active)]

    def finite_in_part(self, index: int, grads: Callable[[Slot], Tensor]) -> bool:
        """Whether some of a slot's several matrices hold finite numbers only."""
        slot = self.slots[index]
        if self.sharded or slot.count == 1:
            return False
        return bool(finite_mask(slot.gather(grads(slot))).any())

    def fill_hyper(self) -> None:
        """Copy the group's current numbers into the tensors the step reads."""
        for name in (*COMMON_HYPER, *self.pipeline.hyper):
            value = self.group[name]
            if name == "betas":
                self.hyper["beta1"].fill_(value[0])
                self.hyper["beta2"].fill_(value[1])
            elif isinstance(value, Tensor):
                self.hyper[name].copy_(value.reshape(()))
            else:
                self.hyper[name].fill_(float(value))

    def tasks(
        self,
        active: Sequence[int],
        *,
        compile: bool,
        masked: bool,
        grads: Callable[[Slot], Tensor],
    ) -> list[Task]:
        """One step for the slots ``active``, in tasks that do not touch the others."""
        if not active or self.rows * self.cols == 0:
            return []
        self.fill_hyper()
        step = functools.partial(self._update, compile=compile, masked=masked, grads=grads)
        if self.sharded or self.device.type != "cpu" or (compile and not self._large):
            return [Task(functools.partial(step, active))]
        # threads take turns at starting operations: on small matrices these are too short for that
        apart = self._large and not self.pipeline.elementwise
        each, scratch = self.pipeline.flops(self.rows, self.cols), 6 * self._matrix_bytes()
        tasks: list[Task] = []
        # matrices are independent: a few at a time, all stages in a row, temporaries in cache
        for part in self._portions(active):
            count = sum(self.slots[i].count for i in part)
            flops = each * count if apart else None
            compiles = compile and not self._compiled and not tasks
            tasks.append(Task(functools.partial(step, part), flops, scratch * count, compiles))
        return tasks

    def _portions(self, active: Sequence[int]) -> list[list[int]]:
        """``active`` in runs of neighbours whose matrices fill the caches; large ones stay apart."""
        if self._large:
            return [[i] for i in active]
        threads = torch.get_num_threads()
        each = max(1, self._matrix_bytes())
        limit = max(1, PORTION_BYTES // each) * threads
        out: list[list[int]] = []
        count = 0
        for i in active:
            size = self.slots[i].count
            if not out or count + size > limit or i != out[-1][-1] + 1:
                out.append([])
                count = 0
            out[-1].append(i)
            count += size
        return out

    def _update(
        self,
        active: Sequence[int],
        *,
        compile: bool,
        masked: bool,
        grads: Callable[[Slot], Tensor],
    ) -> None:
        slots = [self.slots[i] for i in active]
        grad = _stack([s.gather(grads(s)) for s in slots])
        whole = len(slots) == len(self.slots)
        index = None
        if active[-1] - active[0] + 1 == len(active):
            low = self.offsets[active[0]]
            span = slice(low, self.offsets[active[-1]] + slots[-1].count)
            states = {k: v[span] for k, v in self.stacks.items()}
            step = None if self.step is None else self.step[span]
            constants = {k: v[span] for k, v in self.constants.items()}
        else:
            rows = [self.offsets[i] + k for i in active for k in range(self.slots[i].count)]
            index = torch.tensor(rows, device=self.device)
            states = {k: v[index] for k, v in self.stacks.items()}
            step = None if self.step is None else self.step[index]
            constants = {k: v[index] for k, v in self.constants.items()}
        param = None
        if self.pipeline.reads_param:
            param = _stack([s.gather(s.param) for s in slots])
        tensors = Tensors(grad, states, self.hyper, constants, step, param)
        if self.periodic:
            self._refresh(active, tensors)
            self._count(active)
        factors = None
        if self._large and not masked and self._stream(slots, tensors, compile):
            update = None
        elif self._large and not masked:
            lead = functools.partial(fused.lead, self.pipeline) if compile else None
            update, factors, decay = run_unscaled(self.pipeline, tensors, lead)
        elif compile and whole:
            update, decay = COMPILED.get(self.pipeline, tensors, masked)(tensors)
        else:
            # a part of a bucket is a rare step of a changing size: it is not worth a compilation
            update, decay = run(self.pipeline, tensors, masked)
        if index is not None:
            for k, v in self.stacks.items():
                v[index] = states[k]
            if self.step is not None and step is not None:
                self.step[index] = step
        if update is not None:
            self._apply(slots, update, decay, factors, compile)
        self._compiled = self._compiled or compile

    def _refresh(self, active: Sequence[int], t: Tensors) -> None:
        """Run the stages' rare work on the matrices for which it is due."""
        for stage in self.pipeline.stages:
            if not stage.period:
                continue
            due: list[int] = []
            row = 0
            for i in active:
                count = self.slots[i].count
                if self._host_steps[i] % stage.period == 0:
                    due += range(row, row + count)
                row += count
            if due:
                index = torch.tensor(due, device=self.device)
                part = Tensors(
                    t.grad[index],
                    {k: v[index] for k, v in t.state.items()},
                    t.hyper,
                    {k: v[index] for k, v in t.constants.items()},
                    None if t.step is None else t.step[index],
                    None if t.param is None else t.param[index],
                )
                ok = finite_mask(part.grad)  # a mask, not a flag: nothing waits for a device
                for key, value in stage.refresh(make_batch(part, ok)).items():
                    old = part.state[key]
                    t.state[key][index] = torch.where(ok, value.to(old.dtype), old)

    def _count(self, active: Sequence[int]) -> None:
        for i in active:
            self._host_steps[i] += 1

    def _keep(self) -> Any:
        """The factor ``1 - lr·λ`` on all parameters: a number on CPUs, where reading it costs nothing,
        else a 0-d tensor; None for 1."""
        if _is_zero(self.group["weight_decay"]):
            return None
        keep = self.pipeline.keep(self.hyper)
        return float(keep) if self.device.type == "cpu" else keep

    def _stream(self, slots: Sequence[Slot], t: Tensors, compile: bool) -> bool:
        """Every entry's step from gradient to parameter, a piece at a time or, compiled, in one loop
        a matrix; False if not possible."""
        targets = [s.target(s.param) for s in slots]
        if not all(p.is_contiguous() for p in targets):
            return False
        flat = [m for s, p in zip(slots, targets, strict=True) for m in p.view(s.count, -1)]
        if compile:
            return fused.run(self.pipeline, t, flat)
        alike = self._keep()

        def sink(b: int, span: slice, update: Tensor, decay: Tensor | None) -> None:
            self.pipeline.move(flat[b][span], update, alike if decay is None else float(decay))

        return run_in_pieces(self.pipeline, t, sink)

    def _apply(
        self,
        slots: Sequence[Slot],
        update: Tensor,
        decay: Tensor | None,
        factors: Sequence[Tensor] | None = None,
        compile: bool = False,
    ) -> None:
        """``p ← p·decay + update·factors``, reading and writing each parameter once.

        ``factors`` are given for large matrices on CPUs: they are multiplied a piece at a time or,
        compiled, in one loop a matrix.
        """
        targets = [s.target(s.param) for s in slots]
        counts = [s.count for s in slots]
        alike = None if decay is not None else self._keep()
        keeps: list[Any] = [alike] * len(slots)
        if decay is not None:
            per = decay.to(self.computing).flatten().split(counts)
            keeps = [
                f.view(*t.shape[:-2], 1, 1)  # a stack: each of its matrices decays by itself
                if s.count > 1
                else (float(f[0]) if f.device.type == "cpu" else f[0])
                for f, s, t in zip(per, slots, targets, strict=True)
            ]
        pieces = update.split(counts)
        if factors is None:
            for s, t, u, keep in zip(slots, targets, pieces, keeps, strict=True):
                self.pipeline.move(t, s.view(u), keep)
            return
        number = 0
        for s, t, u, keep in zip(slots, targets, pieces, keeps, strict=True):
            span = slice(number, number + s.count)
            own = [f[span] if f.ndim == 3 else f for f in factors]
            if s.turned or not t.is_contiguous() or not u.is_contiguous():
                self.pipeline.move(t, s.view(times(u, own).to(t.dtype)), keep)
            else:
                for k, matrix in enumerate(t.view(s.count, s.rows, s.cols)):
                    each = [f[k] if f.ndim == 3 else f for f in own]
                    by = keep.view(-1)[k] if isinstance(keep, Tensor) and keep.ndim else keep
                    if compile:
                        fused.move(self.pipeline, matrix, u[k], each, 1.0 if by is None else by)
                    else:
                        self._move(matrix, u[k], each, by)
            number += s.count

    def _move(self, target: Tensor, update: Tensor, factors: Sequence[Tensor], keep: Any) -> None:
        """``target ← keep·target + update·factors`` for ``[r, c]`` a few rows at a time."""
        rows = max(1, PIECE * torch.get_num_threads() // max(1, target.shape[1]))
        for low in range(0, target.shape[0], rows):
            span = slice(low, low + rows)
            own = [f[span] if f.ndim == 2 and f.shape[0] > 1 else f for f in factors]
            self.pipeline.move(target[span], times(update[span], own).to(target.dtype), keep)

    # -- bookkeeping -----------------------------------------------------------------------------------

    @property
    def _large(self) -> bool:
        """Matrices so large that each is worked on by itself, its elementwise stages in cache."""
        return self.device.type == "cpu" and self._matrix_bytes() > CACHE_BYTES

    def _matrix_bytes(self) -> int:
        return self.rows * self.cols * self.computing.itemsize

    def state_bytes(self) -> int:
        own = sum(v.numel() * v.element_size() for v in self.stacks.values())
        return own + (0 if self.step is None else 4 * self.total)

    def scratch_bytes(self) -> int:
        """Estimated peak of one step besides parameters, gradients and states."""
        size = self.computing.itemsize
        return 4 * self.total * self.rows * self.cols * size


def _all_finite(grad: Tensor) -> bool:
    if grad.numel() == 0:
        return True
    low, high = torch.aminmax(grad)  # one pass; NaN reaches both, an infinity one of them
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _is_zero(value: Any) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _expand(names: Sequence[str]) -> list[str]:
    out: list[str] = []
    for n in names:
        out += ["beta1", "beta2"] if n == "betas" else [n]
    return out


def _stack(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0].contiguous()
    return torch.cat(parts)
