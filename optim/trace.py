"""``compile``: trace the step of any ``torch.optim.Optimizer`` and batch its Newton–Schulz chains.

The optimizer's own ``step`` runs once on fake tensors that stand for parameters, gradients and states;
what it does to them becomes one functional graph. Learning rates, Python counters in the state and
group entries that turn out to move (a cycled momentum) are inputs of the graph, on which it does the
same Python arithmetic: a schedule does not retrace. Whatever cannot be traced is refused with the
reason and runs as it was.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import sys
import time
import traceback
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

from ..passes.errors import NormfuseError
from ..passes.warn import warn
from .base import MatrixOptimizer, parameter_name
from .batching import batch_newton_schulz
from .delegate import Delegate
from .pipeline import tracing

#: Graphs kept, least recently used dropped; a group entry that moves but cannot be an input may make
#: as many, then the step is refused.
MAX_GRAPHS = 8
#: Twice as many are traced in so many steps; another is then not worth its seconds.
PATIENCE = 256
_CHANGING = (
    "which parameters have gradients, or its groups or states, change too often: "
    f"{2 * MAX_GRAPHS} graphs were traced in fewer than {PATIENCE} steps"
)


class TraceRefused(NormfuseError):
    """The optimizer's step cannot be represented as one graph; says why."""


class _NewState(Exception):
    """The step creates state lazily: run it once for real, then trace."""


class _Counts(Exception):
    """Python numbers in the state that the step changes: they must be inputs."""

    def __init__(self, keys: set[str]) -> None:
        self.keys = keys


def compile(
    optimizer: Optimizer, *, ns_dtype: torch.dtype | None = None, strict: bool = False
) -> TracedOptimizer:
    """An optimizer that steps through one traced graph with batched Newton–Schulz.

    Args:
        optimizer: any optimizer whose step loops over parameters. It is used, not copied: states,
            groups, hooks, schedulers and checkpoints stay with it.
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
        self._graphs: OrderedDict[Any, _Traced | str] = OrderedDict()
        self._moves = _Moves()
        self._original = False  # the step is refused and wants its closure itself
        self._warned: set[str] = set()
        self._steps = 0
        self._traced_at: deque[int] = deque(maxlen=2 * MAX_GRAPHS)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_graphs": OrderedDict()}  # graphs are traced anew

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        # the inner optimizer's hooks run around whichever step is taken; schedulers see that it was
        self.inner._opt_called = True  # type: ignore[attr-defined]
        hooked = Optimizer.profile_hook_step(self._step)
        return hooked(self.inner) if closure is None else hooked(self.inner, closure)

    def _step(self, inner: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        plain = _unhooked(inner)
        if closure is not None and self._original:
            return plain(inner, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        traced = self._find()
        if traced is not None:
            with torch.no_grad():
                traced.run(inner)
        elif closure is not None and self.refused is not None:
            self._original = True
            return plain(inner, closure)
        else:
            plain(inner)
        return loss

    def _find(self) -> _Traced | None:
        if self._moves.given_up:
            return None
        self._moves.watch(self.inner)
        self._steps += 1
        key = self._moves.signature(self.inner)
        found = self._graphs.get(key)
        if found is not None:
            self._graphs.move_to_end(key)
        elif len(self._traced_at) == 2 * MAX_GRAPHS and self._steps - self._traced_at[0] < PATIENCE:
            found = _CHANGING  # of this step only
            self._report(found)
        else:
            began = time.perf_counter()
            self._traced_at.append(self._steps)
            try:
                with tracing():
                    found = self._trace()
                self.traces += 1
            except _NewState:
                return None  # this step creates the state; the next one is traced
            except Exception as error:  # whatever user code raises on fake tensors
                found = _reason(error)
            self.seconds += time.perf_counter() - began
            self._graphs[self._moves.signature(self.inner)] = found  # tracing taught what moves
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
            if isinstance(found, str):
                self._report(found)
        if isinstance(found, str):
            self.refused = found
            return None
        self.refused = None
        self.batches = found.batches
        return found

    def _report(self, reason: str) -> None:
        message = f"normfuse.optim.compile runs {type(self.inner).__name__}.step as it is: {reason}"
        if self.strict:
            self._graphs.clear()
            raise TraceRefused(message)
        if reason not in self._warned:
            self._warned.add(reason)
            warn(message)

    def _trace(self) -> _Traced:
        moves = self._moves
        if moves.misses > MAX_GRAPHS:
            moves.given_up = True
            names = sorted({key for _, key in moves.stuck})
            raise TraceRefused(
                f"its group's {', '.join(names)} moves and decides what the step does; it was traced "
                f"for {MAX_GRAPHS} values"
            )
        while True:
            try:
                return _Traced(self.inner, self.ns_dtype, moves)
            except _Counts as found:
                moves.counters |= found.keys
            except Exception as error:
                if not (moves.extra and _reads_a_value(error)):
                    raise
                # a moving entry decides what the step does (``if momentum != 0``): a graph for each
                moves.stuck |= moves.extra
                moves.extra = set()


class _Moves:
    """Which numbers are inputs of the graph: learning rates, and what was seen to change.

    Attributes:
        extra: entries ``(group, key)`` besides the learning rates.
        stuck: entries that moved but must stay constants.
        counters: names of Python numbers in the state that the step changes.
    """

    def __init__(self) -> None:
        self.extra: set[tuple[int, str]] = set()
        self.stuck: set[tuple[int, str]] = set()
        self.counters: set[str] = set()
        self.misses = 0  # steps at which a stuck entry had moved
        self.given_up = False
        self._seen: dict[tuple[int, str], Any] = {}

    def watch(self, opt: Optimizer) -> None:
        """Note which numeric group entries differ from the step before."""
        now = {
            (gi, k): v
            for gi, group in enumerate(opt.param_groups)
            for k, v in group.items()
            if k not in ("params", "lr") and _numeric(v)
        }
        moved = {k for k, v in now.items() if k in self._seen and self._seen[k] != v}
        self._seen = now
        self.misses += bool(moved & self.stuck)
        self.extra |= moved - self.stuck

    def inputs(self, opt: Optimizer) -> list[tuple[int, str]]:
        groups = range(len(opt.param_groups))
        return [(gi, "lr") for gi in groups if "lr" in opt.param_groups[gi]] + sorted(self.extra)

    def signature(self, opt: Optimizer) -> Any:
        """Everything a graph depends on but its inputs' values."""
        moving = set(self.inputs(opt))
        out: list[Any] = []
        for gi, group in enumerate(opt.param_groups):
            for k, v in group.items():
                if k not in ("params", "param_names", "initial_lr"):
                    out.append(
                        (k, len(v) if isinstance(v, (tuple, list)) else 0)
                        if (gi, k) in moving
                        else (k, repr(v))
                    )
            for p in group["params"]:
                g = p.grad
                grad = None if g is None else (g.layout, g.shape, g.dtype)
                state = tuple(
                    (k, v.shape, v.dtype)
                    if isinstance(v, Tensor)
                    else (k, type(v) if k in self.counters else repr(v))
                    for k, v in opt.state.get(p, {}).items()
                )
                out.append((id(p), p.shape, p.dtype, p.device, grad, state))
        return tuple(out)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numeric(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(_number(v) for v in value)
    return _number(value)


def _unhooked(opt: Optimizer) -> Callable[..., Any]:
    """The class's step without the wrapper that runs hooks."""
    step: Any = type(opt).step
    return getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step


class _Traced:
    """One graph and how to feed it.

    ``slots`` are its tensors ``(group, parameter, key)``, the key being None for the parameter and
    "" for its gradient; ``numbers`` are ``(group, parameter or None, key)``.
    """

    def __init__(self, opt: Optimizer, ns_dtype: torch.dtype | None, moves: _Moves) -> None:
        self._collect(opt, moves)
        self.gm = self._trace(opt)
        self._check_attributes()
        self.batches = [len(b) for b in batch_newton_schulz(self.gm, ns_dtype)]
        self._open_numbers()

    # -- inputs ------------------------------------------------------------------------------------

    def _collect(self, opt: Optimizer, moves: _Moves) -> None:
        if isinstance(opt, MatrixOptimizer):
            raise TraceRefused(
                f"{type(opt).__name__} batches and compiles its own step: give it compile=True"
            )
        if any(group.get("fused") for group in opt.param_groups):
            raise TraceRefused("fused=True is one kernel already; there is nothing to batch in it")
        self.slots: list[tuple[int, int, str | None]] = []
        self.numbers: list[tuple[int, int | None, str]] = [
            (gi, None, k) for gi, k in moves.inputs(opt)
        ]
        owners: dict[tuple[Any, ...], str] = {}
        for gi, group in enumerate(opt.param_groups):
            for pi, p in enumerate(group["params"]):
                name = parameter_name(group, gi, pi)
                state = opt.state.get(p, {})
                tensors = {None: p, "": p.grad, **state}
                for key, value in tensors.items():
                    if isinstance(value, Tensor):
                        what = (
                            name
                            if key is None
                            else f"{'the gradient' if key == '' else key} of {name}"
                        )
                        _check_tensor(value, what)
                        self.slots.append((gi, pi, key))
                        place = (value.device, value.data_ptr(), value.dtype)
                        if value.numel() and owners.setdefault(place, what) != what:
                            raise TraceRefused(f"{what} and {owners[place]} share memory")
                    elif key in moves.counters and _number(value):
                        self.numbers.append((gi, pi, key))  # type: ignore[arg-type]
                    elif not isinstance(value, (int, float, str, type(None), torch.dtype)):
                        raise TraceRefused(
                            f"state {key!r} of {name} is a {type(value).__name__}; tensors and "
                            "numbers can be traced"
                        )
        if not any(key == "" for *_, key in self.slots):
            raise _NewState

    def _inputs(self, opt: Optimizer) -> list[Tensor]:
        out = []
        for gi, pi, key in self.slots:
            p = opt.param_groups[gi]["params"][pi]
            value = p if key is None else p.grad if key == "" else opt.state[p][key]
            out.append(value.detach())
        return out

    def _values(self, opt: Optimizer) -> list[float]:
        """The numbers that move, tuples spread out."""
        out: list[float] = []
        for gi, pi, key in self.numbers:
            group = opt.param_groups[gi]
            value = group[key] if pi is None else opt.state[group["params"][pi]][key]
            out += map(float, value if isinstance(value, (tuple, list)) else (value,))
        return out

    # -- tracing -----------------------------------------------------------------------------------

    def _trace(self, opt: Optimizer) -> fx.GraphModule:
        from torch.fx.experimental.proxy_tensor import make_fx

        step = inspect.unwrap(type(opt).step)

        def run(*flat: Tensor) -> list[Any]:
            shadow, tensors = self._shadow(opt, flat)
            with _NoForeignWrites():
                step(shadow)
            return self._outcome(opt, shadow, tensors)

        held = {k: v for k, v in vars(opt).items() if k not in ("state", "param_groups")}
        self._held = [(k, v, tree_map(_scalar_copy, v)) for k, v in held.items()]
        functional = torch.func.functionalize(run, remove="mutations")
        numbers = [torch.tensor(v, dtype=torch.float64) for v in self._values(opt)]
        with torch.no_grad(), _python_math():
            return make_fx(functional, tracing_mode="fake")(*self._inputs(opt), *numbers)

    def _shadow(
        self, opt: Optimizer, flat: tuple[Tensor, ...]
    ) -> tuple[Optimizer, dict[tuple[int, int], Tensor]]:
        """A second optimizer object around the traced tensors; the real one is never touched."""
        shadow = object.__new__(type(opt))
        shadow.__dict__.update({key: copy for key, _, copy in self._held})
        groups = [dict(group) for group in opt.param_groups]
        params: dict[tuple[int, int], Tensor] = {}
        states: dict[tuple[int, int], dict[str, Any]] = {}
        for (gi, pi, key), t in zip(self.slots, flat, strict=False):
            if key is None:
                params[gi, pi] = t
                states[gi, pi] = dict(opt.state.get(opt.param_groups[gi]["params"][pi], {}))
            elif key == "":
                params[gi, pi].grad = t
            else:
                states[gi, pi][key] = t
        numbers = iter(t.item() for t in flat[len(self.slots) :])
        for gi, at, key in self.numbers:
            if at is not None:
                states[gi, at][key] = next(numbers)
            elif isinstance(groups[gi][key], (tuple, list)):
                groups[gi][key] = type(groups[gi][key])(next(numbers) for _ in groups[gi][key])
            else:
                groups[gi][key] = next(numbers)
        for gi, group in enumerate(groups):
            group["params"] = [params[gi, pi] for pi in range(len(group["params"]))]
        shadow.param_groups = groups
        shadow.state = defaultdict(dict)
        for k, p in params.items():
            if states[k]:
                shadow.state[p] = states[k]
        self._before = [dict(g) for g in groups]
        return shadow, params

    def _outcome(
        self, opt: Optimizer, shadow: Optimizer, params: dict[tuple[int, int], Tensor]
    ) -> list[Any]:
        """The states after the step; refuses Python state that would be lost."""
        outputs: list[Any] = []
        counted: set[str] = set()
        self.replaced: list[tuple[int, int, str]] = []
        for (gi, pi), p in params.items():
            real = opt.state.get(opt.param_groups[gi]["params"][pi], {})
            new = shadow.state.get(p, {})
            if set(new) - set(real):
                raise _NewState
            if set(real) - set(new):
                raise TraceRefused(f"the step removes state {min(set(real) - set(new))!r}")
            for key, value in new.items():
                old = real[key]
                if isinstance(value, Tensor) != isinstance(old, Tensor):
                    raise TraceRefused(f"state {key!r} turns from {_kind(old)} into {_kind(value)}")
                if isinstance(value, Tensor):
                    if value.shape != old.shape or value.dtype != old.dtype:
                        raise TraceRefused(f"the step changes the shape or dtype of state {key!r}")
                elif (gi, pi, key) not in self.numbers:
                    if value is old or value == old:
                        continue
                    if not _number(value) or not _number(old):
                        raise TraceRefused(
                            f"state {key!r} is a Python {type(value).__name__} that changes every "
                            "step; make it a tensor or a number"
                        )
                    counted.add(key)
                    continue
                outputs.append(value)
                self.replaced.append((gi, pi, key))
        if counted:
            raise _Counts(counted)
        for group, before in zip(shadow.param_groups, self._before, strict=True):
            for key, value in group.items():
                if value is not before.get(key) and repr(value) != repr(before.get(key)):
                    raise TraceRefused(f"the step changes its group's {key!r}")
        new = set(vars(shadow)) - {"state", "param_groups"}
        for key, _, copy in self._held:
            new.discard(key)
            if vars(shadow).get(key) is not copy:
                raise TraceRefused(f"the step replaces its attribute {key!r}")
        if new:
            raise TraceRefused(f"the step makes an attribute {min(new)!r}")
        return outputs

    def _check_attributes(self) -> None:
        """Attributes must not have changed, nor 0-d tensors in them become constants of the graph."""
        for key, before, copy in self._held:
            if not _alike(before, copy):
                raise TraceRefused(f"the step changes its attribute {key!r}")
        kept = {
            t.data_ptr(): key
            for key, _, copy in self._held
            for t in tree_leaves(copy)
            if isinstance(t, Tensor)
        }
        for node in self.gm.graph.nodes:
            if node.op == "get_attr":
                value = getattr(self.gm, str(node.target), None)
                if isinstance(value, Tensor) and value.data_ptr() in kept:
                    raise TraceRefused(
                        f"the step reads a tensor in its attribute {kept[value.data_ptr()]!r}; keep "
                        "it in the state"
                    )

    def _open_numbers(self) -> None:
        """Let the placeholders of numbers be numbers, not tensors that are read."""
        graph = self.gm.graph
        places = [n for n in graph.nodes if n.op == "placeholder"][len(self.slots) :]
        for place in places:
            for user in list(place.users):
                if user.target == torch.ops.aten._local_scalar_dense.default:
                    user.replace_all_uses_with(place)
                    graph.erase_node(user)
        graph.lint()
        self.gm.recompile()

    # -- running -------------------------------------------------------------------------------------

    def run(self, opt: Optimizer) -> None:
        inputs = self._inputs(opt)
        outputs = self.gm(*inputs, *self._values(opt))
        known = {id(t) for t in inputs}
        for (gi, pi, key), value in zip(self.replaced, outputs, strict=True):
            state = opt.state[opt.param_groups[gi]["params"][pi]]
            if not isinstance(value, Tensor):
                whole = isinstance(state[key], int) and float(value).is_integer()
                state[key] = int(value) if whole else value
            elif id(value) not in known and state[key].data_ptr() != value.data_ptr():
                state[key].copy_(value)


def _check_tensor(t: Tensor, what: str) -> None:
    if is_traceable_wrapper_subclass(t):
        kind = type(t).__name__
        hint = "; members of normfuse.optim step sharded parameters" if kind == "DTensor" else ""
        raise TraceRefused(f"{what} is a {kind}, and plain tensors are traced{hint}")
    if t.layout != torch.strided:
        raise TraceRefused(f"{what} is sparse ({t.layout})")


def _kind(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else f"a Python {type(value).__name__}"


class _NoForeignWrites(TorchDispatchMode):
    """Stops a step before it writes into a real tensor: tracing changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for i, spec in enumerate(func._schema.arguments):
                written = args[i] if i < len(args) else kwargs.get(spec.name)
                if spec.is_write:
                    for t in tree_leaves(written):
                        if type(t) in (Tensor, torch.nn.Parameter):
                            raise RuntimeError("mutating a non-functional tensor")
        return func(*args, **kwargs)


def _scalar_copy(leaf: Any) -> Any:
    """0-d CPU tensors are computed with for real while tracing; larger ones are refused."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.ndim == 0 else leaf


def _alike(before: Any, after: Any) -> bool:
    """Whether containers rebuilt by ``tree_map`` still hold the same leaves."""
    old, new = tree_leaves(before), tree_leaves(after)
    return len(old) == len(new) and all(
        a is b
        or (_number(a) and a == b)
        or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
        for a, b in zip(old, new, strict=True)
    )


@contextlib.contextmanager
def _python_math() -> Iterator[None]:
    """Let ``math.sqrt`` take numbers that move, and compiled helper functions run as written."""
    real = math.sqrt

    def sqrt(x: Any) -> Any:
        return torch.sym_sqrt(x) if isinstance(x, torch.SymFloat) else real(x)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(math, "sqrt", sqrt))
        if "torch._dynamo" in sys.modules:
            config = sys.modules["torch._dynamo"].config
            stack.enter_context(config.patch(error_on_nested_fx_trace=False))
        yield


# -- reasons ---------------------------------------------------------------------------------------


def _reads_a_value(error: BaseException) -> bool:
    from torch._subclasses.fake_tensor import DataDependentOutputException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    if isinstance(error, (GuardOnDataDependentSymNode, DataDependentOutputException)):
        return True
    return isinstance(error, (TypeError, AttributeError)) and "SymFloat" in str(error)


#: What PyTorch says when traced code meets a tensor it was not given.
_FOREIGN = ("convert all Tensors to FakeTensors", "mutating a non-functional tensor")


def _reason(error: BaseException) -> str:
    """One sentence, with the user's line where user code raised."""
    if isinstance(error, TraceRefused):
        return str(error)
    if _reads_a_value(error):
        what = "it decides or computes in Python by a tensor's value or by a number that moves"
    elif any(text in str(error) for text in _FOREIGN):
        what = "it uses a tensor that is no parameter, gradient or state of its own"
    else:
        what = f"{type(error).__name__}: {error}".split("\n")[0]
    return what + _where(error)


def _where(error: BaseException) -> str:
    own, library = os.path.dirname(__file__), os.path.dirname(torch.__file__)
    optimizers = os.path.join(library, "optim")
    line = ""
    for frame in traceback.extract_tb(error.__traceback__):
        file = frame.filename
        if file.startswith(optimizers) or not file.startswith((own, library)):
            if frame.line:
                line = f" ({os.path.basename(file)}:{frame.lineno}: {frame.line})"
    return line
