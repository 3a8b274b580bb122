"""``compile``: trace the step of any ``torch.optim.Optimizer`` and batch its Newton–Schulz chains.

The optimizer's own ``step`` runs once per learning-rate group (plus two) on fake tensors that stand
for parameters, gradients and states; what it does to them becomes one functional graph. Constants
of the graph that move with a learning rate are found by tracing at several rates: each must be an
affine function of them, which is checked, and is evaluated anew every step. A schedule therefore
never retraces. Whatever cannot be traced is refused with the reason and runs as it was.
"""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.optim import Optimizer

from ..passes.errors import NormfuseError
from .batching import batch_newton_schulz
from .delegate import Delegate


class TraceRefused(NormfuseError):
    """The optimizer's step cannot be represented as one graph; says why."""


class _NewState(Exception):
    """The step creates state lazily: run it once for real, then trace."""


def compile(
    optimizer: Optimizer, *, ns_dtype: torch.dtype | None = None, strict: bool = False
) -> TracedOptimizer:
    """An optimizer that steps through one traced graph with batched Newton–Schulz.

    Args:
        optimizer: any optimizer whose step loops over parameters. It is used, not copied: states,
            groups, schedulers and checkpoints stay with it.
        ns_dtype: dtype inside recognized Newton–Schulz chains; None keeps the optimizer's.
        strict: raise :class:`TraceRefused` instead of warning once and running the original step.
    """
    return TracedOptimizer(optimizer, ns_dtype, strict)


class TracedOptimizer(Delegate):
    """Steps the wrapped optimizer through a traced graph; everything else is the wrapped one's.

    Attributes:
        refused: why the last step ran the original code, or None.
        batches: sizes of the Newton–Schulz batches of the current graph.
        traces: number of graphs traced so far; seconds: time spent on them.
    """

    def __init__(self, inner: Optimizer, ns_dtype: torch.dtype | None, strict: bool) -> None:
        super().__init__(inner)
        self.ns_dtype, self.strict = ns_dtype, strict
        self.refused: str | None = None
        self.batches: list[int] = []
        self.traces = 0
        self.seconds = 0.0
        self._graphs: dict[Any, _Traced | str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_graphs": {}}  # graphs are traced anew

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        traced = self._find()
        if traced is None:
            self.inner.step()
        else:
            with torch.no_grad():
                traced.run(self.inner)
        return loss

    def _find(self) -> _Traced | None:
        key = _signature(self.inner)
        found = self._graphs.get(key)
        if found is None:
            began = time.perf_counter()
            try:
                found = _Traced(self.inner, self.ns_dtype)
                self.traces += 1
            except _NewState:
                return None  # this step creates the state; the next one is traced
            except TraceRefused as error:
                found = str(error)
            except Exception as error:  # whatever user code raises on fake tensors
                found = f"{type(error).__name__}: {error}".split("\n")[0]
            self.seconds += time.perf_counter() - began
            self._graphs[key] = found
            if isinstance(found, str):
                name = type(self.inner).__name__
                message = f"normfuse.optim.compile runs {name}.step as it is: {found}"
                if self.strict:
                    del self._graphs[key]
                    raise TraceRefused(message)
                warnings.warn(message, stacklevel=3)
        if isinstance(found, str):
            self.refused = found
            return None
        self.refused = None
        self.batches = found.batches
        return found


def _signature(opt: Optimizer) -> Any:
    """Everything a graph depends on but learning rates."""
    out: list[Any] = []
    for group in opt.param_groups:
        out.append(
            tuple(
                (k, repr(v)) for k, v in group.items() if k not in ("params", "lr", "param_names")
            )
        )
        for p in group["params"]:
            g = p.grad
            grad = None if g is None else (g.layout, g.shape, g.dtype)
            state = tuple(
                (k, v.shape, v.dtype) if isinstance(v, Tensor) else (k, repr(v))
                for k, v in opt.state.get(p, {}).items()
            )
            out.append((id(p), p.shape, p.dtype, p.device, grad, state))
    return tuple(out)


class _Traced:
    """One graph and how to feed it."""

    def __init__(self, opt: Optimizer, ns_dtype: torch.dtype | None) -> None:
        self._collect(opt)
        rates = [0.0123 * (i + 1) for i in range(len(opt.param_groups))]
        self.gm = self._trace(opt, rates)
        self._fit_rates(opt, rates)
        self.batches = [len(b) for b in batch_newton_schulz(self.gm, ns_dtype)]
        self._open_constants()

    # -- inputs ------------------------------------------------------------------------------------

    def _collect(self, opt: Optimizer) -> None:
        self.slots: list[
            tuple[int, int, str | None]
        ] = []  # (group, index, key): None param, "" grad
        for gi, group in enumerate(opt.param_groups):
            for pi, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided:
                    raise TraceRefused(f"parameter {pi} of group {gi} has a sparse gradient")
                self.slots += [(gi, pi, None), (gi, pi, "")]
                state = opt.state.get(p, {})
                self.slots += [(gi, pi, k) for k, v in state.items() if isinstance(v, Tensor)]
        if not self.slots:
            raise _NewState

    def _inputs(self, opt: Optimizer) -> list[Tensor]:
        out = []
        for gi, pi, key in self.slots:
            p = opt.param_groups[gi]["params"][pi]
            value = p if key is None else p.grad if key == "" else opt.state[p][key]
            out.append(value.detach())
        return out

    # -- tracing -----------------------------------------------------------------------------------

    def _trace(self, opt: Optimizer, rates: list[float]) -> fx.GraphModule:
        from torch.fx.experimental.proxy_tensor import make_fx

        self.replaced: list[tuple[int, int, str]] = []
        step = inspect.unwrap(type(opt).step)

        def run(*flat: Tensor) -> list[Tensor]:
            shadow, tensors = self._shadow(opt, rates, flat)
            with torch.no_grad():
                step(shadow)
            return self._outcome(opt, shadow, tensors)

        functional = torch.func.functionalize(run, remove="mutations")
        with torch.no_grad():
            return make_fx(functional, tracing_mode="fake")(*self._inputs(opt))

    def _shadow(
        self, opt: Optimizer, rates: list[float], flat: tuple[Tensor, ...]
    ) -> tuple[Optimizer, dict[tuple[int, int], Tensor]]:
        """A second optimizer object around the traced tensors; the real one is never touched."""
        shadow = object.__new__(type(opt))
        shadow.__dict__.update(opt.__dict__)
        params: dict[tuple[int, int], Tensor] = {}
        states: dict[tuple[int, int], dict[str, Any]] = {}
        for (gi, pi, key), t in zip(self.slots, flat, strict=True):
            real = opt.param_groups[gi]["params"][pi]
            if key is None:
                params[gi, pi] = t
                states[gi, pi] = dict(opt.state.get(real, {}))
            elif key == "":
                params[gi, pi].grad = t
            else:
                states[gi, pi][key] = t
        shadow.param_groups = [
            {
                **group,
                "lr": rates[gi],
                "params": [params[k] for k in params if k[0] == gi],
            }
            for gi, group in enumerate(opt.param_groups)
        ]
        shadow.state = defaultdict(dict)
        for k, p in params.items():
            if states[k]:
                shadow.state[p] = states[k]
        return shadow, params

    def _outcome(
        self, opt: Optimizer, shadow: Optimizer, params: dict[tuple[int, int], Tensor]
    ) -> list[Tensor]:
        """States that were replaced rather than changed in place; refuses hidden Python state."""
        outputs: list[Tensor] = []
        self.replaced = []
        for (gi, pi), p in params.items():
            real = opt.state.get(opt.param_groups[gi]["params"][pi], {})
            new = shadow.state.get(p, {})
            if set(new) - set(real):
                raise _NewState
            for key, value in new.items():
                if isinstance(value, Tensor):
                    outputs.append(value)
                    self.replaced.append((gi, pi, key))
                elif value is not real[key] and value != real[key]:
                    raise TraceRefused(
                        f"state {key!r} is a Python {type(value).__name__} that changes every step; "
                        "make it a 0-d tensor"
                    )
        for group, real_group in zip(shadow.param_groups, opt.param_groups, strict=True):
            for key, value in group.items():
                if key not in ("params", "lr") and value is not real_group.get(key):
                    if repr(value) != repr(real_group.get(key)):
                        raise TraceRefused(f"the step changes its group's {key!r}")
        return outputs

    # -- learning rates ------------------------------------------------------------------------------

    def _fit_rates(self, opt: Optimizer, rates: list[float]) -> None:
        """Find the constants that move with a rate and their affine dependence."""
        base = _constants(self.gm.graph)
        self.affine: dict[Any, tuple[float, list[float]]] = {}
        slopes: dict[Any, list[float]] = {k: [0.0] * len(rates) for k in base}
        for g in range(len(rates)):
            moved = list(rates)
            moved[g] = rates[g] * 1.5
            other = self._same_graph(opt, moved, base)
            for k in base:
                slopes[k][g] = (other[k] - base[k]) / (moved[g] - rates[g])
        check = [r * 0.3 for r in rates]
        third = self._same_graph(opt, check, base)
        for k, value in base.items():
            predicted = value + sum(
                s * (c - r) for s, c, r in zip(slopes[k], check, rates, strict=True)
            )
            if not math.isclose(predicted, third[k], rel_tol=1e-9, abs_tol=1e-12):
                raise TraceRefused(
                    f"a constant of the step ({value:g} at lr {rates}) is not an affine function of "
                    "the learning rates"
                )
            if any(slopes[k]):
                offset = value - sum(s * r for s, r in zip(slopes[k], rates, strict=True))
                self.affine[k] = (offset, slopes[k])

    def _same_graph(self, opt: Optimizer, rates: list[float], base: dict[Any, float]) -> Any:
        other = self._trace(opt, rates)
        same = [str(n.target) for n in other.graph.nodes] == [
            str(n.target) for n in self.gm.graph.nodes
        ]
        constants = _constants(other.graph)
        if not same or constants.keys() != base.keys():
            raise TraceRefused("the step does different operations at different learning rates")
        return constants

    def _open_constants(self) -> None:
        """Turn the constants that move into inputs of the graph."""
        graph = self.gm.graph
        by_name = {n.name: n for n in graph.nodes}
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        self.moving: list[tuple[float, list[float]]] = []
        for (name, where), fit in self.affine.items():
            node = by_name.get(name)
            if node is None:
                raise TraceRefused("a learning rate enters a Newton–Schulz iteration")
            with graph.inserting_after(last):
                last = graph.placeholder(f"rate_{len(self.moving)}")
            self.moving.append(fit)
            if isinstance(where, int):
                args = list(node.args)
                args[where] = last
                node.args = tuple(args)
            else:
                node.kwargs = {**node.kwargs, where: last}
        graph.lint()
        self.gm.recompile()

    # -- running -------------------------------------------------------------------------------------

    def run(self, opt: Optimizer) -> None:
        rates = [float(g["lr"]) for g in opt.param_groups]
        moving = [c + sum(s * r for s, r in zip(k, rates, strict=True)) for c, k in self.moving]
        inputs = self._inputs(opt)
        outputs = self.gm(*inputs, *moving)
        known = {id(t) for t in inputs}
        for (gi, pi, key), value in zip(self.replaced, outputs, strict=True):
            p = opt.param_groups[gi]["params"][pi]
            if id(value) not in known and opt.state[p][key].data_ptr() != value.data_ptr():
                opt.state[p][key].copy_(value)


def _constants(graph: fx.Graph) -> dict[tuple[str, int | str], float]:
    out: dict[tuple[str, int | str], float] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        for where, value in [*enumerate(node.args), *node.kwargs.items()]:
            if isinstance(value, float):
                out[node.name, where] = value
    return out
