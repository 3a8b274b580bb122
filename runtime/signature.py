"""What inputs, weights and modules a captured graph stands for, checked before every call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter

from ..passes import ir


class Signature:
    """The flat inputs a graph accepts: dtypes, devices, ranks, sizes and constants.

    Sizes that were captured as symbols may vary within the symbol's range and the guards that
    tracing recorded; the answer for a tuple of sizes is remembered.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._expected = [ir.val(n) for n in gm.graph.find_nodes(op="placeholder")]
        self._memo: dict[tuple, bool] = {}
        self._env: ShapeEnv | None = None
        for v in self._expected:
            if isinstance(v, torch._subclasses.FakeTensor) and v.fake_mode.shape_env is not None:
                self._env = v.fake_mode.shape_env
                break
        self._trace = _Traceable(self._expected, self._env)

    def traces(self, inputs: Sequence[Any]) -> bool:
        """:meth:`matches` in terms Dynamo and ``torch.export`` trace: sizes may be symbolic.

        What it asks about a symbolic size becomes a guard. It says no where the question has no
        such form.
        """
        return self._trace.accepts(inputs)

    def matches(self, inputs: Sequence[Any]) -> bool:
        """True if the graph computes the model's function on ``inputs``."""
        if len(inputs) != len(self._expected):
            return False
        key = tuple(
            (tuple(x.shape), x.dtype, x.device) if isinstance(x, torch.Tensor) else (type(x), x)
            for x in inputs
        )
        try:
            known = self._memo.get(key)
        except TypeError:  # an unhashable constant
            return self._check(inputs)
        if known is None:
            if len(self._memo) > 4096:
                self._memo.clear()
            known = self._memo[key] = self._check(inputs)
        return known

    def _check(self, inputs: Sequence[Any]) -> bool:
        binding: dict[sympy.Symbol, int] = {}
        derived: list[tuple[sympy.Expr, int]] = []

        def bind(expected: Any, actual: int) -> bool:
            if not isinstance(expected, torch.SymInt):
                return expected == actual
            expr = expected.node.expr
            if isinstance(expr, sympy.Symbol):
                return binding.setdefault(expr, actual) == actual
            derived.append((expr, actual))
            return True

        for expected, x in zip(self._expected, inputs, strict=True):
            if isinstance(expected, torch.Tensor):
                if not isinstance(x, torch.Tensor):
                    return False
                if x.layout is not torch.strided or x.is_quantized:
                    return False
                if x.dtype != expected.dtype or x.device != expected.device:
                    return False
                if x.dim() != expected.dim():
                    return False
                if not all(bind(e, a) for e, a in zip(expected.shape, x.shape, strict=True)):
                    return False
            elif isinstance(expected, torch.SymInt):
                if not isinstance(x, int) or not bind(expected, x):
                    return False
            elif type(x) is not type(expected) or x != expected:
                return False
        if any(int(expr.subs(binding)) != actual for expr, actual in derived):
            return False
        return self._in_range(binding)

    def _in_range(self, binding: dict[sympy.Symbol, int]) -> bool:
        if self._env is None:
            return True
        for symbol, value in binding.items():
            bounds = self._env.var_to_range.get(symbol)
            if bounds is not None and not (bounds.lower <= value <= bounds.upper):
                return False
        for guard in self._env.guards:
            outcome = guard.expr.subs(binding)
            if outcome == sympy.false:
                return False
        return True


class _Traceable:
    """A signature as plain data and small functions of sizes."""

    def __init__(self, expected: Sequence[Any], env: ShapeEnv | None) -> None:
        self.count = len(expected)
        #: (input, value) of what must be this very constant
        self.constants: list[tuple[int, Any]] = []
        #: (input, dtype, device, rank)
        self.tensors: list[tuple[int, torch.dtype, torch.device, int]] = []
        #: (input, dim, size) of sizes the capture fixed
        self.fixed: list[tuple[int, int, int]] = []
        #: (input, dim or -1 for the input itself, slot) of sizes that may vary; one slot a symbol
        self.varying: list[tuple[int, int, int]] = []
        self.slots = 0
        #: functions of the slots' values; ``None`` if one of them could not be written
        self.conditions: list[Callable[..., bool]] | None = []
        symbols: dict[sympy.Symbol, int] = {}
        derived: list[tuple[sympy.Expr, int]] = []

        def slot(size: torch.SymInt) -> int:
            expr = size.node.expr
            if isinstance(expr, sympy.Symbol) and expr in symbols:
                return symbols[expr]
            self.slots += 1
            if isinstance(expr, sympy.Symbol):
                symbols[expr] = self.slots - 1
            else:
                derived.append((expr, self.slots - 1))
            return self.slots - 1

        for i, v in enumerate(expected):
            if isinstance(v, torch.Tensor):
                self.tensors.append((i, v.dtype, v.device, v.dim()))
                for dim, size in enumerate(v.shape):
                    if isinstance(size, torch.SymInt):
                        self.varying.append((i, dim, slot(size)))
                    else:
                        self.fixed.append((i, dim, size))
            elif isinstance(v, torch.SymInt):
                self.varying.append((i, -1, slot(v)))
            else:
                self.constants.append((i, v))
        texts = [f"{{0}} == v[{at}]" for _, at in derived]
        exprs = [e for e, _ in derived]
        if env is not None:
            for symbol in symbols:
                bounds = env.var_to_range.get(symbol)
                if bounds is not None:
                    limits = (sympy.Ge(symbol, bounds.lower, evaluate=False),)
                    if bounds.upper not in (int_oo, sympy.oo):
                        limits += (sympy.Le(symbol, bounds.upper, evaluate=False),)
                    exprs += limits
                    texts += ["{0}"] * len(limits)
            exprs += [guard.expr for guard in env.guards]
            texts += ["{0}"] * len(env.guards)
        for expr, text in zip(exprs, texts, strict=True):
            if expr == sympy.true or (text == "{0}" and not expr.free_symbols & set(symbols)):
                continue
            if not expr.free_symbols <= set(symbols):
                self.conditions = None
                return
            names = {s: sympy.Symbol(f"v[{at}]", integer=True) for s, at in symbols.items()}
            try:
                code = text.format(f"({PythonPrinter().doprint(expr.xreplace(names))})")
                self.conditions.append(eval(f"lambda v: {code}"))
            except Exception:  # a function without a Python spelling
                self.conditions = None
                return

    def accepts(self, inputs: Sequence[Any]) -> bool:
        if len(inputs) != self.count or self.conditions is None:
            return False
        for i, value in self.constants:
            if type(inputs[i]) is not type(value) or inputs[i] != value:
                return False
        for i, dtype, device, rank in self.tensors:
            x = inputs[i]
            if not isinstance(x, torch.Tensor) or x.dtype != dtype or x.dim() != rank:
                return False
            if x.device != device:
                return False
        for i, dim, size in self.fixed:
            if inputs[i].shape[dim] != size:
                return False
        values: list[Any] = [None] * self.slots
        for i, dim, at in self.varying:
            value = inputs[i] if dim < 0 else inputs[i].shape[dim]
            if values[at] is None:
                values[at] = value
            elif values[at] != value:
                return False
        return all(condition(values) for condition in self.conditions)


def _mode(m: nn.Module) -> tuple[bool, float | None]:
    p = m.__dict__.get("p")
    return m.training, p if isinstance(p, (float, int)) else None


def layout(root: nn.Module) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Which modules there are below ``root`` (by identity), and the mode each of them is in.

    Modes are ``training`` and the probability ``p`` of dropouts, which schedules change.
    """
    modules: list[nn.Module] = [root]
    seen: dict[int, Any] = {}
    for m in modules:  # grows while it is read
        if id(m) not in seen:
            seen[id(m)] = _mode(m)
            modules.extend(child for child in m._modules.values() if child is not None)
    return tuple(seen), tuple(seen.values())


class Weights:
    """The model's tensors that a graph reads: where they are, of what type, and which are one.

    Args:
        owner: the model.
        tensors: what the graph reads, by qualified name.
    """

    def __init__(self, owner: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        self._places: list[tuple[nn.Module, str, tuple]] = []
        by_id: dict[int, tuple[nn.Module, str]] = {}
        for name, tensor in tensors.items():
            path, _, last = name.rpartition(".")
            module = ir.attribute(owner, path) if path else owner
            self._places.append((module, last, self._type(module, last)))
            by_id[id(tensor)] = module, last
        self._ties: list[tuple[nn.Module, str, nn.Module, str]] = []
        self.modules = [(path, m, _mode(m)) for path, m in owner.named_modules()]
        for _, m, _ in self.modules:
            for last, tensor in (*m._parameters.items(), *m._buffers.items()):
                place = by_id.get(id(tensor), (m, last))
                if place != (m, last):
                    self._ties.append((m, last, *place))

    def moved(self, root: nn.Module) -> Weights:
        """The same for a copy of the model: its modules by their paths."""
        there = dict(root.named_modules())
        to = {id(m): there[path] for path, m, _ in self.modules}
        new = object.__new__(Weights)
        new._places = [(to[id(m)], *rest) for m, *rest in self._places]
        new._ties = [(to[id(m)], a, to[id(n)], b) for m, a, n, b in self._ties]
        new.modules = [(path, there[path], mode) for path, _, mode in self.modules]
        return new

    @staticmethod
    def _find(module: nn.Module, name: str) -> Any:
        t = module._parameters.get(name)  # a module's own __getattr__ is ten times slower
        return getattr(module, name, None) if t is None else t

    @classmethod
    def _type(cls, module: nn.Module, name: str) -> tuple:
        registered = name in module._parameters or name in module._buffers
        t = cls._find(module, name)
        if not isinstance(t, torch.Tensor):
            return ()
        return t.dtype, t.device, t.shape, registered  # pruning leaves an attribute behind

    def read(self) -> list[torch.Tensor]:
        """The tensors that are in their places now, found without walking paths."""
        return [self._find(module, name) for module, name, _ in self._places]

    def unchanged(self) -> bool:
        """True if a graph that read these tensors may read what is in their places now."""
        for module, name, expected in self._places:
            if self._type(module, name) != expected:
                return False
        for module, name, other, other_name in self._ties:
            if self._find(module, name) is not self._find(other, other_name):
                return False
        return True

    def same_modules(self, owner: nn.Module) -> bool:
        """What :func:`layout` tells, in terms Dynamo traces."""
        for path, module, mode in self.modules:
            now = owner
            for part in path.split(".") if path else ():
                now = now._modules.get(part)
                if now is None:
                    return False
            if (path and now is not module) or _mode(now) != mode:  # the root's stand-in will do
                return False
        return True
