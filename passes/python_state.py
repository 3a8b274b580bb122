"""Python values that a forward changes: attributes, globals, closures. A graph would freeze them.

``torch.export`` runs the Python code once and keeps what it did to tensors. A counter in an attribute
would stay at its first value for good, without a word. So everything the forward's code can name is
looked at before and after the trace; where something changed, a second trace tells a memo (it settles,
and the graph stays the same) from state (it goes on changing, or the graph depends on it).
"""

from __future__ import annotations

import contextlib
import copy as copying
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .errors import CaptureError

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_CONTAINERS = (list, dict, set, deque, bytearray)
#: What a trace leaves under new names; anything else there is an import's or a library's.
_LEFT_BEHIND = (*_PLAIN, *_SYMBOLIC, *_CONTAINERS, tuple, torch.Tensor)
#: Larger containers are known by their length.
_LONG = 2048
_DEPTH = 3


class ChangesState(CaptureError):
    """The forward has Python state that a graph cannot carry."""


class _Cell(MutableMapping):
    """A closure cell as a namespace with one name."""

    def __init__(self, name: str, cell: Any) -> None:
        self.name, self.cell = name, cell

    def __iter__(self) -> Iterator[str]:
        try:
            _ = self.cell.cell_contents
        except ValueError:  # not filled yet
            return
        yield self.name

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, name: str) -> Any:
        return self.cell.cell_contents

    def __setitem__(self, name: str, value: Any) -> None:
        self.cell.cell_contents = value

    def __delitem__(self, name: str) -> None:
        del self.cell.cell_contents


class _Class(MutableMapping):
    """A class's own attributes."""

    def __init__(self, cls: type) -> None:
        self.cls = cls

    def __iter__(self) -> Iterator[str]:
        return (k for k in vars(self.cls) if not k.startswith("__"))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, name: str) -> Any:
        return vars(self.cls)[name]

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self.cls, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self.cls, name)


class _Room:
    """A namespace to watch: all of its names but ``hidden``, or only ``names``."""

    def __init__(
        self,
        owner: str,
        space: Any,
        names: tuple[str, ...] | None = None,
        hidden: frozenset[str] = frozenset(),
    ) -> None:
        self.owner, self.space, self.names, self.hidden = owner, space, names, hidden

    def values(self) -> dict[str, Any]:
        names = self.names if self.names is not None else tuple(self.space)
        return {n: self.space[n] for n in names if n in self.space and n not in self.hidden}


#: What every module has: hooks, dictionaries, mode.
_EVERY_MODULE = frozenset(nn.Module().__dict__)


def _ours_to_watch(module: str | None) -> bool:
    """False for code whose state is its own business: PyTorch's and the standard library's."""
    root = (module or "").split(".")[0]
    return root not in ("torch", "numpy", "builtins") and root not in sys.stdlib_module_names


def _rooms(model: nn.Module) -> Iterator[_Room]:
    """Every namespace that the forwards of ``model`` and its submodules can name."""
    code = _Reach()
    for path, module in model.named_modules():
        where = f"module {path!r}" if path else "the model"
        yield _Room(where, module.__dict__, hidden=_EVERY_MODULE)
        for value in module.__dict__.values():
            code.add(value)
        cls = type(module)
        if _ours_to_watch(cls.__module__):
            code.enter(getattr(cls, "forward", None), cls)
    yield from code.rooms()


class _Reach:
    """The functions that forwards reach by name, and the namespaces those functions read."""

    def __init__(self) -> None:
        self._seen: set[Any] = set()
        self._found: dict[int, tuple[str, Any, set[str] | None]] = {}

    def rooms(self) -> Iterator[_Room]:
        for owner, space, names in self._found.values():
            yield _Room(owner, space, None if names is None else tuple(sorted(names)))

    def add(self, value: Any) -> None:
        """A function that is at hand as a value."""
        if isinstance(value, (FunctionType, MethodType)):
            self.enter(value, None)

    def enter(self, function: Any, cls: type | None) -> None:
        work = [(function, cls)]
        while work:
            f, owner = work.pop()
            f = getattr(f, "__func__", f)
            while hasattr(f, "__wrapped__") and not isinstance(f, FunctionType):
                f = f.__wrapped__
            if not isinstance(f, FunctionType) or (f, owner) in self._seen:
                continue
            self._seen.add((f, owner))
            if owner is not None and _ours_to_watch(owner.__module__):
                self._note(f"class {owner.__name__}", id(owner), _Class(owner), None)
            if _ours_to_watch(f.__module__):
                work += self._look(f, owner)

    def _look(self, f: FunctionType, cls: type | None) -> Iterator[tuple[Any, type | None]]:
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            space = _Cell(name, cell)
            if name in space and name != "__class__":
                value = space[name]
                if isinstance(value, (*_PLAIN, *_CONTAINERS)):
                    self._note(f"the closure of {f.__qualname__}", id(cell), space, None)
                yield value, None
        defaults = {f"default {i}": v for i, v in enumerate(f.__defaults__ or ())}
        if any(isinstance(v, _CONTAINERS) for v in defaults.values()):
            self._note(f"the arguments of {f.__qualname__}", id(f), defaults, None)
        if wrapped := getattr(f, "__wrapped__", None):
            yield wrapped, cls
        names = set(_names(f.__code__))
        yield from self._globals(f.__globals__, str(f.__module__), names)
        for name in names if cls is not None else ():
            member = getattr(cls, name, None)
            yield from ((g, cls) for g in (member, getattr(member, "fget", None)) if g)

    def _globals(
        self, space: dict[str, Any], module: str, names: set[str]
    ) -> Iterator[tuple[Any, type | None]]:
        for name in names & space.keys():
            value = space[name]
            if isinstance(value, FunctionType):
                yield value, None
            elif isinstance(value, ModuleType):
                if _ours_to_watch(value.__name__) and value.__dict__ is not space:
                    inner = value.__dict__
                    yield from (
                        (inner[n], None)
                        for n in names & inner.keys()
                        if isinstance(inner[n], FunctionType)
                    )
                    for n in names & inner.keys():
                        if isinstance(inner[n], (*_PLAIN, *_CONTAINERS)):
                            self._note(f"module {value.__name__}", id(inner), inner, n)
            elif isinstance(value, type):
                if _ours_to_watch(value.__module__) and not issubclass(value, nn.Module):
                    self._note(f"class {value.__name__}", id(value), _Class(value), None)
            elif isinstance(value, (*_PLAIN, *_CONTAINERS)) or type(value).__module__ == module:
                self._note(f"{module}", id(space), space, name)

    def _note(self, owner: str, key: int, space: Any, name: str | None) -> None:
        known = self._found.setdefault(key, (owner, space, None if name is None else set()))
        if name is not None and known[2] is not None:
            known[2].add(name)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _print(value: Any, depth: int = _DEPTH, known: dict[tuple[int, int], Any] | None = None) -> Any:
    """A comparable picture of a value. Tensors are all alike (``torch.export`` guards those itself)."""
    if isinstance(value, _PLAIN):
        return type(value).__name__, repr(value)
    if isinstance(value, _SYMBOLIC):  # comparing the value itself would add a guard
        try:
            hint = value.node.hint
        except Exception:  # a size that depends on data
            return "symbolic", str(value)
        return type(hint).__name__, repr(hint)
    if isinstance(value, torch.Tensor):
        return "tensor"
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, (*_CONTAINERS, tuple)):
        if depth == 0 or len(value) > _LONG:
            return name, len(value)
        if isinstance(value, dict):
            items = [(_key(k), _print(v, depth - 1)) for k, v in list(value.items())]
            return name, items
        if isinstance(value, (set, bytearray)):
            return name, sorted(str(_key(k)) for k in value)
        return name, [_print(v, depth - 1) for v in list(value)]
    if depth and _has_state(value):
        known = {} if known is None else known
        at = id(value), depth
        if at not in known:  # a configuration is an attribute of every submodule
            inside = list(vars(value).items())
            known[at] = [(k, _print(v, depth - 1, known)) for k, v in inside]
        return name, known[at]
    return name


def _key(key: Any) -> Any:
    if isinstance(key, (*_PLAIN, *_SYMBOLIC)):
        return str(key)
    if isinstance(key, tuple):
        return tuple(_key(k) for k in key)
    return type(key).__qualname__


def _has_state(value: Any) -> bool:
    """A plain object: neither code nor a module, of a class that is not PyTorch's or Python's."""
    return (
        isinstance(getattr(value, "__dict__", None), dict)
        and not isinstance(value, (nn.Module, type, FunctionType, MethodType, ModuleType))
        and _ours_to_watch(type(value).__module__)
    )


class _Moment:
    """What all rooms hold at one moment, and what is inside their containers and objects."""

    def __init__(self, rooms: list[_Room]) -> None:
        known: dict[tuple[int, int], Any] = {}
        self.values = [room.values() for room in rooms]
        self.pictures = [
            {n: _print(v, known=known) for n, v in values.items()} for values in self.values
        ]
        self.inside: dict[int, tuple[Any, Any]] = {}
        self.symbolic = False
        for values in self.values:
            for value in values.values():
                self._keep(value, _DEPTH)

    def _keep(self, value: Any, depth: int) -> None:
        self.symbolic = self.symbolic or isinstance(value, _SYMBOLIC)
        if depth == 0 or id(value) in self.inside:
            return
        if isinstance(value, _CONTAINERS) and len(value) <= _LONG:
            shallow = dict(value.items()) if isinstance(value, dict) else value.copy()
            self.inside[id(value)] = value, shallow
            inside: Any = shallow.values() if isinstance(value, dict) else value
        elif isinstance(value, tuple):
            inside = value
        elif _has_state(value):
            self.inside[id(value)] = vars(value), dict(vars(value))
            inside = vars(value).values()
        else:
            return
        for v in list(inside):
            self._keep(v, depth - 1)


class Watch:
    """The Python state of a model before a trace and at the end of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.rooms = list(_rooms(model))
        self.before = self.after = _Moment(self.rooms)

    @contextlib.contextmanager
    def tracing(self, hooked: bool) -> Iterator[None]:
        """Look at the state when the forward has run; ``torch.export`` puts attributes back itself.

        Args:
            hooked: a forward hook can look (Dynamo would trace the hook, too).
        """

        def look(*_: Any) -> None:
            self.after = _Moment(self.rooms)

        if not hooked:
            yield
            look()
            return
        handle = self.model.register_forward_hook(look)
        try:
            yield
        finally:
            handle.remove()

    def changes(self, since: _Moment) -> list[tuple[str, str]]:
        """``(name, owner)`` of what was not as ``since`` at the end of the last trace."""
        found = []
        for room, old, new in zip(self.rooms, since.pictures, self.after.pictures, strict=True):
            found += [(n, room.owner) for n in {**old, **new} if old.get(n, "") != new.get(n, "")]
        return found

    def restore(self) -> None:
        """Put everything back to what it was before."""
        for room, values in zip(self.rooms, self.before.values, strict=True):
            now = room.values()
            for name in {**values, **now}:
                if name not in values:
                    if isinstance(now[name], _LEFT_BEHIND):
                        del room.space[name]
                elif name not in now or now[name] is not values[name]:
                    room.space[name] = values[name]
        for container, copy in self.before.inside.values():
            _refill(container, copy)

    def advance(self) -> None:
        """Put everything to what it was at the end of the trace, sizes as numbers.

        Values that hold tensors (of the trace) stay as they were before.
        """
        self.restore()
        for room, old, new in zip(self.rooms, self.before.values, self.after.values, strict=True):
            for name, value in new.items():
                if name in old and old[name] is value:
                    continue
                with contextlib.suppress(_OfTheTrace):
                    room.space[name] = _concrete(value, self.before.inside)
        for key, (container, copy) in self.after.inside.items():
            if key in self.before.inside:
                with contextlib.suppress(_OfTheTrace):
                    _refill(container, _concrete(copy, self.before.inside, top=True))


class _OfTheTrace(Exception):
    """A value that has no meaning outside of the trace."""


def _concrete(value: Any, known: Mapping[int, Any], top: bool = False) -> Any:
    """The value with numbers for symbolic sizes.

    Args:
        known: containers (by id) that stay the objects they are.
        top: ``value`` is a copy of what is inside one of those.
    """
    if isinstance(value, _SYMBOLIC):
        try:
            return value.node.hint
        except Exception:
            raise _OfTheTrace from None
    if isinstance(value, (FakeTensor, FunctionalTensor)):
        raise _OfTheTrace
    if id(value) in known and not top:
        return value
    if isinstance(value, dict):
        new = copying.copy(value)
        for k, v in value.items():
            new[k] = _concrete(v, known)
        return new
    if type(value) in (list, tuple, set, deque):
        return type(value)(_concrete(v, known) for v in value)
    return value


def _refill(container: Any, copy: Any) -> None:
    """Make ``container`` hold what ``copy`` holds; untouched if it does."""
    if isinstance(container, dict):
        now = list(container.items())
        if len(now) == len(copy) and all(k in copy and copy[k] is v for k, v in now):
            return
    elif isinstance(container, (set, bytearray)):
        if container == copy:
            return
    elif len(container) == len(copy) and all(map(operator.is_, container, copy)):
        return
    container.clear()
    container.update(copy) if isinstance(container, (dict, set)) else container.extend(copy)


def refuse_state(
    watch: Watch, program: torch.export.ExportedProgram, trace_again: Callable[[], Any]
) -> list[str]:
    """Refuse a model whose Python state a graph would freeze.

    Args:
        watch: watched the trace of ``program``.
        trace_again: traces the model once more, watched, in the state that it is in then.

    Returns:
        Sentences for the report about values that are set and then stay as they are.

    Raises:
        ChangesState: naming what changes.
    """
    first = watch.after
    changed = watch.changes(watch.before)
    if not changed:
        return []
    watch.advance()
    note = f"forward sets {_said(changed)}; the rewritten graph does not"
    try:
        again = trace_again()
    except Exception:  # a state in which a trace is impossible: nothing to compare
        return [note]
    moving = [c for c in watch.changes(first) if c in changed]
    if moving:
        raise ChangesState(
            f"forward changes {_said(moving)} at every call; a captured graph would keep the value of "
            "one call for good. Hold it in a buffer, or pass it as an argument"
        )
    if not first.symbolic and _text(program) != _text(again):
        raise ChangesState(
            f"forward changes {_said(changed)} and computes something else after that; a captured "
            "graph would keep what the first call did. Call the model once before, or set it outside"
        )
    return [note]


def _said(changed: list[tuple[str, str]]) -> str:
    texts = [_one(name, owner) for name, owner in dict.fromkeys(changed)]
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return ", ".join(texts[:3]) + more


def _one(name: str, owner: str) -> str:
    if owner.startswith(("the closure", "the arguments")):
        return f"{name} in {owner}"
    kind = "attribute" if owner.startswith(("module '", "the model", "class ")) else "global"
    return f"{kind} {name} of {owner}"


def _text(program: torch.export.ExportedProgram) -> Any:
    graphs = [
        m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)
    ]
    nodes = [
        (n.op, str(n.target), str(n.args), str(n.kwargs)) for graph in graphs for n in graph.nodes
    ]
    constants = [
        # as text: NaN is not equal to itself
        (k, repr(v.tolist()) if isinstance(v, torch.Tensor) and v.numel() < _LONG else type(v))
        for k, v in program.constants.items()
    ]
    return nodes, constants
