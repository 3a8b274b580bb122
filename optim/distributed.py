"""Sharded parameters (FSDP2, tensor parallel, HSDP): the same step, whole matrices on one rank each.

For a bucket of ``DTensor`` parameters the leading elementwise stages (momentum, all of AdamW) run on
the local shards, where their states live. What follows needs whole matrices: each is sent to one rank
of the mesh, worked on there and nowhere else, and its update sent back. On a line of ranks that is one
all-to-all each way; on other meshes matrices are gathered one by one and updates gathered by all.
States of those later stages are small for the common members (NorMuon: one number per row) and are
kept equal on every rank. The result does not depend on the world size or the placements beyond rounding.

Replicated parameters (DDP) are plain tensors and need nothing from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .buckets import Bucket, Slot
from .pipeline import COMPILED, Pipeline, Tensors, run_stages
from .stages import Stage, StateSpec


def _shard(full: Tensor, like: DTensor) -> Tensor:
    """This rank's shard of ``full`` (equal on all ranks), without communication."""
    mesh = like.device_mesh
    whole = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(mesh, like.placements).to_local()


@dataclass(frozen=True)
class _Part:
    """The matrices of whole parameters that the later stages see: all, or one part of a split.

    Attributes:
        slot: how the part is cut from a whole parameter; None for all of it.
        states: names of the later stages' states, without and with the part's suffix.
        constants: of the part's shape; None for the bucket's own.
    """

    slot: Slot | None
    states: Mapping[str, str]
    constants: Mapping[str, Tensor] | None

    def cut(self, whole: Tensor) -> Tensor:
        """``[count, r, c]`` of one whole parameter, given as ``[count, rows, cols]``."""
        return whole if self.slot is None else self.slot.gather(whole.view(self.slot.param.shape))

    def put(self, update: Tensor, out: Tensor) -> None:
        """Inverse of :meth:`cut` for ``out [n·count, r, c]``, into ``update [n·count, rows, cols]``."""
        if self.slot is None:
            update.copy_(out)
            return
        for one, piece in zip(
            update.split(self.slot.count), out.split(self.slot.count), strict=True
        ):
            target = self.slot.target(one.view(self.slot.param.shape))
            target.copy_(piece.reshape(target.shape))


class ShardedBucket(Bucket):
    """A bucket of DTensor parameters of one shape, mesh and placements."""

    sharded = True

    def __init__(
        self,
        slots: Sequence[Slot],
        pipeline: Pipeline,
        group: Mapping[str, Any],
        state: Mapping[Tensor, dict[str, Any]],
    ) -> None:
        self.mesh = slots[0].param.device_mesh  # type: ignore[attr-defined]
        parts, rows, cols = slots[0].parts, slots[0].rows, slots[0].cols
        split = 0
        if not pipeline.reads_param and not pipeline.periodic:
            for stage in pipeline.stages:
                # (what depends on the shape depends on the part's)
                if not stage.elementwise or (parts and stage.constants(rows, cols)):
                    break
                split += 1
        self.local_stages: tuple[Stage, ...] = pipeline.stages[:split]
        self.whole_stages: tuple[Stage, ...] = pipeline.stages[split:]
        self.local_names = {k for s in self.local_stages for k in s.states(rows, cols)}
        self.local_shape = tuple(_local(slots[0].param).shape)
        super().__init__(slots, pipeline, group, state)
        later = [k for s in self.whole_stages for k in s.states(rows, cols)]
        self.parts = [
            _Part(part, {k: part.key(k) for k in later}, self._constants(part.rows, part.cols))
            for part in parts
        ] or [_Part(None, {k: k for k in later}, None)]

    # -- states ------------------------------------------------------------------------------------

    def _specs(self) -> dict[str, StateSpec]:
        whole = super()._specs()
        parts = self.slots[0].parts
        if not parts:
            return whole
        out = {k: v for k, v in whole.items() if k in self.local_names}
        for part in parts:
            specs = self.pipeline.states(part.rows, part.cols)
            out.update({part.key(k): v for k, v in specs.items() if k not in self.local_names})
        return out

    def _constants(self, rows: int, cols: int) -> dict[str, Tensor]:
        return {
            k: torch.tensor(v, dtype=self.computing, device=self.device)
            for k, v in self.pipeline.constants(rows, cols).items()
        }

    def _make_stacks(self) -> dict[str, Tensor]:
        out = {}
        for name, spec in self.specs.items():
            if name in self.local_names:
                shape = (len(self.slots), *self.local_shape)
                fill = float(spec.fill)
                out[name] = torch.full(
                    shape, fill, dtype=self._state_dtype(spec), device=self.device
                )
            else:
                out[name] = self._new(spec)
        return out

    def _view_of(self, slot: Slot, index: int, offset: int, name: str, spec: StateSpec) -> Tensor:
        if name not in self.local_names:
            return slot.view(self.stacks[name][offset : offset + slot.count], spec)
        p = slot.param
        return DTensor.from_local(
            self.stacks[name][index],
            p.device_mesh,  # type: ignore[attr-defined]
            p.placements,  # type: ignore[attr-defined]
            run_check=False,
            shape=p.shape,
            stride=p.stride(),
        )

    def _copy_into(self, view: Tensor, old: Tensor) -> None:
        if isinstance(view, DTensor):
            if isinstance(old, DTensor):
                same = old.device_mesh == view.device_mesh
                old = old.redistribute(placements=view.placements) if same else old.full_tensor()
            shard = old.to_local() if isinstance(old, DTensor) else _shard(old, view)
            view.to_local().copy_(shard)
        else:
            view.copy_(old.full_tensor() if isinstance(old, DTensor) else old.reshape(view.shape))

    # -- the step ------------------------------------------------------------------------------------

    def finite(self, active: Sequence[int], grads: Callable[[Slot], Tensor]) -> list[bool]:
        flags = [torch.isfinite(_local_grad(self.slots[i], grads)).all() for i in active]
        if not flags:
            return []
        both = torch.stack(flags).to(torch.int32)
        for d in range(self.mesh.ndim):
            dist.all_reduce(both, op=dist.ReduceOp.MIN, group=self.mesh.get_group(d))
        return [bool(v) for v in both]

    def _update(
        self,
        active: Sequence[int],
        *,
        compile: bool,
        masked: bool,
        grads: Callable[[Slot], Tensor],
    ) -> None:
        """One step; every rank of the mesh must take it with the same ``active``."""
        del masked  # non-finite matrices were taken out by :meth:`finite`
        slots = [self.slots[i] for i in active]
        self._compiling = compile and len(slots) == len(self.slots)
        local, decay = self._local_part(active, slots, grads)
        period = self.group.get("block_period", 1)
        if self.whole_stages and period > 1 and self.group.get("block_step", 0) % period:
            update = self._block_part(local)
        elif self.whole_stages:
            update, later = self._whole_part(active, slots, local)
            if later is not None:
                decay = later if decay is None else decay * later
        else:
            update = [(u * -self.hyper["lr"]).to(self.dtype) for u in local]
        self._apply_local(slots, update, decay)

    def _run(self, stages: tuple[Stage, ...], t: Tensors) -> tuple[Tensor, Tensor | None]:
        """Stages on stacked tensors, as one compiled graph if that was asked for."""
        return COMPILED.stages(stages, t)(t) if self._compiling else run_stages(stages, t)

    def _local_part(
        self, active: Sequence[int], slots: Sequence[Slot], grads: Callable[[Slot], Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Elementwise stages on the shards: the direction so far, one local tensor per slot, and the
        multipliers of the decay, ``[n, 1, 1]``."""
        grad = torch.stack([_local_grad(s, grads) for s in slots])
        if not self.local_stages:
            return list(grad.to(self.computing).unbind()), None
        index = torch.tensor(list(active), device=self.device)
        flat = {k: self.stacks[k][index].reshape(len(slots), 1, -1) for k in self.local_names}
        rows = self._matrix_rows(active)
        t = Tensors(
            grad.reshape(len(slots), 1, -1),
            flat,
            self.hyper,
            {k: v[rows[:: slots[0].count]] for k, v in self.constants.items()},
            None if self.step is None else self.step[rows[:: slots[0].count]],
            None,
        )
        update, decay = self._run(self.local_stages, t)
        for k in self.local_names:
            self.stacks[k][index] = flat[k].reshape(len(slots), *self.local_shape)
        if self.step is not None and not self.whole_stages:
            self.step[rows] += 1
        return [u.reshape(self.local_shape) for u in update.unbind()], decay

    def _block_part(self, local: Sequence[Tensor]) -> list[Tensor]:
        """The later stages on this rank's shards as matrices of their own; no communication."""
        shape = self.local_shape
        if not local or local[0].numel() == 0:
            return [u.to(self.dtype) for u in local]
        if self.group.get("view") == "batch":
            rows, cols = shape[-2:]
        else:
            rows, cols = shape[0], local[0].numel() // shape[0]
        stack = torch.stack([u.reshape(-1, rows, cols) for u in local])
        grad = stack.flatten(0, 1)
        t = Tensors(grad, {}, self.hyper, self._constants(rows, cols), None, None)
        direction, _ = self._run(self.whole_stages, t)
        update = direction * (-self.hyper["lr"] * self.group["block_lr"])
        return list(update.to(self.dtype).reshape(len(local), *shape).unbind())

    def _matrix_rows(self, active: Sequence[int]) -> Tensor:
        rows = [self.offsets[i] + k for i in active for k in range(self.slots[i].count)]
        return torch.tensor(rows, device=self.device)

    def _whole_part(
        self, active: Sequence[int], slots: Sequence[Slot], local: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Whole matrices to their owners, each owner's work, the updates back; and the multipliers of
        the decay, ``[n, 1, 1]``, of stages that read parameters."""
        world, rank = self.mesh.size(), _linear_rank(self.mesh)
        share = -(-len(slots) // world)
        mine = range(rank * share, min(len(slots), (rank + 1) * share))
        count = slots[0].count
        whole = self._to_owners(slots, local, share)
        params: list[Tensor] = []
        if self.pipeline.reads_param:
            params = self._to_owners(slots, [_local(s.param) for s in slots], share)
        names = [k for k in self.specs if k not in self.local_names]
        shape = (share * count, self.rows, self.cols)
        update = torch.zeros(shape, dtype=self.dtype, device=self.device)
        rows = self._matrix_rows(active)
        new = {k: self.stacks[k].new_zeros((share * count, *self.specs[k].shape)) for k in names}
        decay = torch.ones(share * count, 1, 1, dtype=torch.float64, device=self.device)
        size = len(whole) * count
        own = rows[mine[0] * count :][:size] if whole else rows[:0]
        for part in self.parts if whole else ():
            if part.constants is None:
                constants = {k: v[own] for k, v in self.constants.items()}
            else:
                constants = {k: v.expand(size, 1, 1) for k, v in part.constants.items()}
            t = Tensors(
                torch.cat([part.cut(w) for w in whole]),
                {k: self.stacks[full][own] for k, full in part.states.items()},
                self.hyper,
                constants,
                None if self.step is None else self.step[own],
                torch.cat(params) if params else None,
            )
            if self.periodic:
                self._refresh([active[k] for k in mine], t)
            direction, factor = self._run(self.whole_stages, t)
            part.put(update[:size], (direction * -self.hyper["lr"]).to(self.dtype))
            for k, full in part.states.items():
                new[full][:size] = t.state[k]
            if factor is not None:
                decay[:size] = factor
        if self.periodic:
            self._count(active)
        total = len(slots) * count
        pieces = self._from_owners(slots, update, share)
        for name in names:
            self.stacks[name][rows] = _gather_first(new[name], self.mesh)[:total]
        if self.step is not None:
            self.step[rows] += 1
        if not self.pipeline.reads_param:
            return pieces, None
        factors = _gather_first(decay, self.mesh)[:total]
        return pieces, factors[::count]

    def _shard_dim(self) -> int | None:
        """The sharded dimension where one all-to-all moves everything: a line of ranks, one Shard."""
        placements = self.slots[0].param.placements  # type: ignore[attr-defined]
        if self.mesh.ndim == 1 and type(placements[0]) is Shard:
            return int(placements[0].dim)
        return None

    def _to_owners(
        self, slots: Sequence[Slot], local: Sequence[Tensor], share: int
    ) -> list[Tensor]:
        """Whole matrices ``[count, r, c]`` owned by this rank, from every rank's shards."""
        world, rank = self.mesh.size(), _linear_rank(self.mesh)
        mine = range(rank * share, min(len(slots), (rank + 1) * share))
        view = (slots[0].count, self.rows, self.cols)
        dim = self._shard_dim()
        if dim is None:
            # a collective for each: every rank takes part, only the owner keeps the result
            fulls = (_full(u, s.param) for s, u in zip(slots, local, strict=True))
            return [f.reshape(view) for k, f in enumerate(fulls) if k in mine]
        # [matrix, shard rows, rest], padded to whole groups of matrices and to equal shards
        size = slots[0].param.shape[dim]
        packed = torch.stack(list(local)).movedim(dim + 1, 1)
        each = -(-size // world)
        send = packed.new_zeros(world * share, each, *packed.shape[2:])
        send[: len(slots), : packed.shape[1]] = packed
        got = torch.empty_like(send)
        dist.all_to_all_single(got, send, group=self.mesh.get_group())
        parts = got.view(world, share, each, *packed.shape[2:]).movedim(0, 1)
        fulls = parts.reshape(share, world * each, *packed.shape[2:])[: len(mine), :size]
        return [f.reshape(view) for f in fulls.movedim(1, dim + 1).unbind()]

    def _from_owners(self, slots: Sequence[Slot], update: Tensor, share: int) -> list[Tensor]:
        """This rank's shards of all updates, from each owner's ``update[share·count, r, c]``."""
        world, rank = self.mesh.size(), _linear_rank(self.mesh)
        like = slots[0].param
        dim = self._shard_dim()
        if dim is None:
            every = _gather_first(update, self.mesh)[: len(slots) * slots[0].count]
            return [
                _shard(u.reshape(s.param.shape), s.param)  # type: ignore[arg-type]
                for s, u in zip(slots, every.split(slots[0].count), strict=True)
            ]
        size = like.shape[dim]
        each = -(-size // world)
        whole = update.reshape(share, *like.shape).movedim(dim + 1, 1)
        padded = whole.new_zeros(share, world * each, *whole.shape[2:])
        padded[:, :size] = whole
        send = padded.view(share, world, each, *whole.shape[2:]).movedim(1, 0).contiguous()
        got = torch.empty_like(send)
        dist.all_to_all_single(got, send, group=self.mesh.get_group())
        low = min(rank * each, size)
        here = got.flatten(0, 1)[: len(slots), : min(each, size - low)]
        return [u.contiguous() for u in here.movedim(1, dim + 1).unbind()]

    def _apply_local(
        self, slots: Sequence[Slot], update: Sequence[Tensor], decay: Tensor | None
    ) -> None:
        keeps = self.pipeline.keep(self.hyper, decay).expand(len(slots), 1, 1)
        for slot, u, keep in zip(slots, update, keeps, strict=True):
            self.pipeline.move(_local(slot.param), u, keep.view(()))


def _local(p: Tensor) -> Tensor:
    assert isinstance(p, DTensor)
    return p.to_local()


def _local_grad(slot: Slot, grads: Callable[[Slot], Tensor]) -> Tensor:
    g, p = grads(slot), slot.param
    assert isinstance(p, DTensor)
    if not isinstance(g, DTensor):
        raise RuntimeError(f"{slot.name}: its gradient is a plain tensor, the parameter a DTensor")
    if g.placements != p.placements:
        g = g.redistribute(placements=p.placements)
    return g.to_local()


def _full(local: Tensor, like: Tensor) -> Tensor:
    assert isinstance(like, DTensor)
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    ).full_tensor()


def _linear_rank(mesh: Any) -> int:
    rank = 0
    for size, coordinate in zip(mesh.shape, mesh.get_coordinate(), strict=True):
        rank = rank * size + coordinate
    return rank


def _gather_first(x: Tensor, mesh: Any) -> Tensor:
    """Concatenate over all ranks of the mesh, in the order of :func:`_linear_rank`."""
    for d in reversed(range(mesh.ndim)):
        parts = [torch.empty_like(x) for _ in range(mesh.size(d))]
        dist.all_gather(parts, x.contiguous(), group=mesh.get_group(d))
        x = torch.cat(parts)
    return x
