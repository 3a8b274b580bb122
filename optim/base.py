"""``MatrixOptimizer``: what every member of the family shares.

A member is an :class:`Algorithm`: defaults, checks, and a function from a group to a
:class:`~.pipeline.Pipeline`. The base class owns everything else: routing (each group may name
another algorithm), state (stacked per bucket, created eagerly), the step (all checks first, then one
call per bucket), saving, loading, pickling and reports.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..passes.warn import warn
from . import threads
from .buckets import Bucket, Slot, make_slots
from .newton_schulz import DTYPES
from .pipeline import COMPILED, Pipeline
from .products import workspace

#: Scratch memory of one bucket's step before it is cut into several.
MAX_BUCKET_BYTES = 2 * 2**30


#: Numbers that schedules move.
_MOVING = ("lr", "weight_decay", "momentum", "betas", "beta2", "block_lr")

#: Group entries whose change never rebuilds anything.
_LIVE = frozenset((*_MOVING, "params", "param_names", "initial_lr", "block_step"))


@dataclass(frozen=True)
class Algorithm:
    """A member of the family: everything about it that is not shared.

    Attributes:
        name: what ``group["algorithm"]`` says.
        pipeline: group to :class:`Pipeline`; called again when a static entry changes.
        defaults: group entries filled in when a group names this algorithm.
        unit: entries that must lie in ``[0, 1)``; ``positive`` ones must be at least 0.
    """

    name: str
    pipeline: Callable[[Mapping[str, Any]], Pipeline]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unit: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()


#: Algorithms that a group may name, whatever the optimizer.
ALGORITHMS: dict[str, Algorithm] = {}


def register(algorithm: Algorithm) -> Algorithm:
    """Make ``algorithm`` available to groups of every optimizer by its name."""
    ALGORITHMS[algorithm.name] = algorithm
    return algorithm


def check_number(value: Any, what: str, low: float = 0.0, high: float = math.inf) -> None:
    """``low <= value < high`` and not NaN; tensors must have one element (their value is not read
    when they live on an accelerator)."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {what} must be 1-element")
        if value.device.type != "cpu":
            return
        value = float(value)
    if not isinstance(value, (int, float)) or not low <= value < high:
        bound = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g})"
        label = {"lr": "Learning rate", "weight_decay": "weight decay"}.get(what, what)
        raise ValueError(f"{label} should be {bound} but is: {value}")


def _check_numbers(algorithm: Algorithm, group: Mapping[str, Any]) -> None:
    check_number(group["lr"], "lr")
    check_number(group["weight_decay"], "weight_decay")
    for key in algorithm.positive:
        check_number(group[key], key)
    if "betas" in algorithm.unit:
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas!r}")
    for key in algorithm.unit:
        values = group[key] if isinstance(group[key], (tuple, list)) else [group[key]]
        for i, v in enumerate(values):
            check_number(v, f"{key}[{i}]" if len(values) > 1 else key, high=1.0)


def _check_live(group: Mapping[str, Any], number: int) -> None:
    """Numbers that schedules move must stay finite; those on accelerators are not read."""
    for key in _MOVING:
        value = group.get(key)
        for v in value if isinstance(value, (tuple, list)) else (value,):
            if v is None or (isinstance(v, Tensor) and v.device.type != "cpu"):
                continue
            if not math.isfinite(v):
                raise ValueError(f"{key} of group {number} is {v}")


class MatrixOptimizer(Optimizer):
    """Base of the family; subclasses set ``algorithm`` and a constructor.

    Args:
        params: parameters, named parameters, or groups. A group may set ``algorithm`` (any
            registered name), ``view`` (``"matrix"``, ``"flatten"``, ``"batch"``) and ``split``.
        defaults: defaults of this optimizer's own algorithm.
        compile: compile each bucket's step with Inductor, once per signature.
        non_finite: what to do about matrices whose gradient holds NaN or Inf: ``"skip"`` leaves
            the matrix and its state alone this step, ``"raise"`` raises before anything is changed,
            ``"propagate"`` does not look.
    """

    algorithm: ClassVar[Algorithm]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "algorithm" in cls.__dict__:
            register(cls.algorithm)

    _buckets: list[Bucket] | None = None
    _layout: Any = None
    _options: dict[str, Any]

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        compile: bool = False,
        non_finite: str = "skip",
    ) -> None:
        if non_finite not in ("skip", "raise", "propagate"):
            raise ValueError(
                f"non_finite must be 'skip', 'raise' or 'propagate', got {non_finite!r}"
            )
        self._options = {"compile": bool(compile), "non_finite": non_finite}
        defaults = {**self._own_defaults(), **defaults}
        _check_numbers(self.algorithm, defaults)  # before the parameters are looked at
        super().__init__(params, defaults)
        self._prepare()

    @classmethod
    def _own_defaults(cls) -> dict[str, Any]:
        return {"lr": 1e-3, "weight_decay": 0.0, **cls.algorithm.defaults}

    # -- groups ------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; entries it does not set come from its algorithm's defaults."""
        param_group = dict(param_group)
        name = param_group.setdefault("algorithm", self.algorithm.name)
        _algorithm(name)
        if name != self.algorithm.name:
            for key, value in {"lr": 1e-3, **ALGORITHMS[name].defaults}.items():
                param_group.setdefault(key, value)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group, len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise
        if self._buckets is not None:
            self._prepare()

    def _check_group(self, group: dict[str, Any], number: int) -> None:
        algorithm = _algorithm(group["algorithm"])
        _check_numbers(algorithm, group)
        pipeline = algorithm.pipeline(group)
        for i, p in enumerate(group["params"]):
            name = parameter_name(group, number, i)
            if torch.is_complex(p):
                raise ValueError(f"{name} is complex; {algorithm.name} needs real parameters")
            if p.dtype not in DTYPES:
                raise ValueError(
                    f"{name} has dtype {p.dtype}; a floating dtype from float16 to float64 is needed"
                )
            if p.layout != torch.strided:
                raise ValueError(f"{name} is {p.layout}; a dense parameter is needed")
            slots = make_slots(p, name, group, pipeline)
            fused = (slots[0].count > 1 and group.get("split") is not None) or slots[0].parts
            if _shards(p) is not None and fused and group.get("block_period", 1) > 1:
                raise ValueError(
                    f"{name} is a sharded parameter with split: in block steps a shard is one "
                    "matrix, which may hold rows of several parts; use block_period=1"
                )
            if slots[0].parts and pipeline.reads_param:
                raise ValueError(f"{name} is a DTensor, and {algorithm.name} does not split those")

    # -- buckets -----------------------------------------------------------------------------------

    def _layout_now(self) -> Any:
        """What the buckets depend on; cheap enough to compare at every step."""
        out: list[Any] = []
        for group in self.param_groups:
            out.append([(k, repr(v)) for k, v in group.items() if k not in _LIVE])
            out.append([(id(p), p.shape, p.dtype, p.device) for p in group["params"]])
        return out

    def _prepare(self) -> list[Bucket]:
        """Build or rebuild the buckets, keeping the values of existing states."""
        buckets: list[Bucket] = []
        for number, group in enumerate(self.param_groups):
            pipeline = _algorithm(group["algorithm"]).pipeline(group)
            sorted_slots: dict[Any, list[Slot]] = {}
            seen: set[int] = set()
            for i, p in enumerate(group["params"]):
                if id(p) in seen:  # torch warned about it; one state serves one update
                    continue
                seen.add(id(p))
                for slot in make_slots(p, parameter_name(group, number, i), group, pipeline):
                    key = (slot.stacked_shape, p.dtype, p.device, _shards(p))
                    sorted_slots.setdefault(key, []).append(slot)
            for slots in sorted_slots.values():
                for part in _cut(slots):
                    buckets.append(_bucket_class(part[0].param)(part, pipeline, group, self.state))
        self._buckets, self._layout = buckets, self._layout_now()
        return buckets

    def _current(self) -> list[Bucket]:
        if (
            self._buckets is None
            or self._layout != self._layout_now()
            or not all(b.intact(self.state) for b in self._buckets)
        ):
            return self._prepare()
        return self._buckets

    # -- the step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One optimization step. Every check comes before the first change.

        Args:
            closure: re-evaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            _check_live(group, number)
        buckets = self._current()
        work = [(b, [i for i, s in enumerate(b.slots) if _usable(s)]) for b in buckets]
        policy, compile = self._options["non_finite"], self._options["compile"]
        parts = [(b, *self._finite(b, active, policy)) for b, active in work]
        tasks: list[threads.Task] = []
        for bucket, active, partly in parts:
            mask = policy == "skip" and bucket.device.type != "cpu"
            tasks += bucket.tasks(active, compile=compile, masked=mask, grads=_grad)
            # too rare a step to compile one
            tasks += bucket.tasks(partly, compile=False, masked=True, grads=_grad)
        with workspace(), contextlib.ExitStack() as plain:
            for device in {b.device.type for b in buckets}:  # a forward's precision is not a step's
                if torch.amp.is_autocast_available(device):
                    plain.enter_context(torch.autocast(device, enabled=False))
            threads.run(tasks)
        for group in self.param_groups:
            if group.get("block_period", 1) > 1:  # saved with the group: a resumed run keeps time
                group["block_step"] = group.get("block_step", 0) + 1
        return loss

    def _finite(
        self, bucket: Bucket, active: list[int], policy: str
    ) -> tuple[list[int], list[int]]:
        """On CPUs non-finite matrices leave the batch here, whole parameters (not in the first list)
        or some of a parameter's matrices (in the second, to be masked); elsewhere the graph masks
        them, because reading a flag would wait for the device."""
        if policy == "propagate":
            return active, []
        if bucket.device.type != "cpu" and policy == "skip" and not bucket.sharded:
            return active, []
        flags = dict(zip(active, bucket.finite(active, _grad), strict=True))
        bad = [i for i in active if not flags[i]]
        if policy == "raise":
            for i in bad:
                raise ValueError(f"the gradient of {bucket.slots[i].name} holds NaN or Inf")
        good = [i for i in active if flags[i]]
        return good, [i for i in bad if bucket.finite_in_part(i, _grad)]

    # -- saving, loading, copying ------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": dict(self._options)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buckets = None
        # older files and files of torch.optim classes lack entries that came later
        for group in self.param_groups:
            name = group.setdefault("algorithm", self.algorithm.name)
            defaults = dict(_algorithm(name).defaults)
            if name == self.algorithm.name:
                defaults = {**defaults, **self.defaults}
            for key, value in defaults.items():
                group.setdefault(key, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load; states keep the dtype they were saved in, bit for bit."""
        before = [g["algorithm"] for g in self.param_groups]
        super().load_state_dict(state_dict)
        for number, (old, group) in enumerate(zip(before, self.param_groups, strict=True)):
            if group["algorithm"] != old:
                warn(
                    f"group {number} was saved by {group['algorithm']!r} and is stepped by it from "
                    f"now on, not by {old!r}; set its 'algorithm' to change that"
                )
        # torch casts every state to its parameter's dtype: put back those that lose by it
        ids = [i for g in state_dict["param_groups"] for i in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        for number, p in zip(ids, params, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and key in self.state.get(p, {}):
                    if self.state[p][key].dtype != value.dtype:
                        self.state[p][key] = value.detach().to(p.device, copy=True)
        self._prepare()

    # -- reports -----------------------------------------------------------------------------------

    def memory(self) -> dict[str, int]:
        """Bytes of parameters, states, and the peak scratch of one step (estimated)."""
        buckets = self._current()
        params = {id(p): p for g in self.param_groups for p in g["params"]}
        return {
            "parameters": sum(p.numel() * p.element_size() for p in params.values()),
            "state": sum(b.state_bytes() for b in buckets),
            "scratch": max((b.scratch_bytes() for b in buckets), default=0),
        }

    def compile_report(self) -> dict[str, Any]:
        """Compiled graphs in this process and the seconds they took."""
        entries = COMPILED._entries.values()
        return {"graphs": len(entries), "seconds": sum(e.seconds for e in entries)}


def _algorithm(name: str) -> Algorithm:
    if name not in ALGORITHMS:
        from . import adaptive, muon, normalized, rotated  # noqa: F401  (they register)
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}; known: {', '.join(sorted(ALGORITHMS))}")
    return ALGORITHMS[name]


def _shards(p: Tensor) -> Any:
    """Mesh and placements of a DTensor; None for plain tensors, without importing DTensor."""
    placements = getattr(p, "placements", None)
    return None if placements is None else (getattr(p, "device_mesh", None), placements, p.shape)


def _bucket_class(p: Tensor) -> type[Bucket]:
    if _shards(p) is None:
        return Bucket
    from .distributed import ShardedBucket

    return ShardedBucket


def parameter_name(group: Mapping[str, Any], number: int, index: int) -> str:
    names = group.get("param_names")
    return str(names[index]) if names else f"parameter {index} of group {number}"


def _grad(slot: Slot) -> Tensor:
    assert slot.param.grad is not None
    return slot.param.grad


def _usable(slot: Slot) -> bool:
    """Whether this slot has a gradient; raises, by name, for one that cannot be used."""
    p, g = slot.param, slot.param.grad
    if g is None:
        return False
    if g.layout != torch.strided:
        raise RuntimeError(f"{slot.name}: sparse gradients are not supported ({g.layout})")
    if g.shape != p.shape or g.device != p.device:
        raise RuntimeError(
            f"{slot.name}: the gradient is {tuple(g.shape)} on {g.device}, the parameter "
            f"{tuple(p.shape)} on {p.device}"
        )
    if g.dtype != p.dtype:
        raise RuntimeError(f"{slot.name}: gradient in {g.dtype}, parameter in {p.dtype}")
    return True


def _cut(slots: list[Slot]) -> Iterable[list[Slot]]:
    """Slots in runs whose scratch stays below the cap, all but the last of one length."""
    r, c = slots[0].stacked_shape
    size = 8 if slots[0].param.dtype == torch.float64 else 4
    each = max(s.count for s in slots) * r * c * size * 4
    length = max(1, MAX_BUCKET_BYTES // max(each, 1))
    return [slots[i : i + length] for i in range(0, len(slots), length)]
