"""Algebraic facts on the nodes of a graph: what each one is, in terms of a base tensor.

One forward walk gives every node a value number (equal number: equal value, whatever nodes compute
it) and, where it applies, one of these facts; ``N`` is the number of elements a statistic runs over::

    Square   c·v²                          elementwise; v is a base tensor or a centered one
    Stat     c·N^p·Σ v^k + shift           k = 1, 2; reduced over dims
    Root     c·N^p·stat^q · gain           q = ±1/2, ±1
    Scaled   c·N^p·v·stat^q · gain         on the way to a norm
    Norm     the vocabulary's cast order, gain and bias

Every spelling of a norm runs into the same ``Norm``; the rules below never look at more than one
node and its arguments' facts, so operand order, overloads and the order of steps do not matter. A
fact that would need a different function carries a ``flaw`` in words: where it becomes a complete
norm nevertheless, it is a near miss and the flaw is the reason.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from . import ir
from .normal_facts import (
    _RESHAPES,
    _SAME,
    Center,
    Fact,
    Miss,
    Norm,
    Number,
    Root,
    Scaled,
    Square,
    Stat,
    Value,
    _is_one,
    _short,
    is_cast,
    packet,
    unexpanded,
    widens,
)
from .ops import _opmath

aten = torch.ops.aten

# ---------------------------------------------------------------------------------------------
# The walk


class NormalForm:
    """Facts for every node of ``gm``; the graph is only read.

    After :meth:`run`, ``facts`` holds the fact of each node, ``extended`` the nodes whose norm goes
    on at their single reader, and ``misses`` the near misses by the node where each began.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.values: dict[fx.Node, Value] = {}
        self.facts: dict[fx.Node, Fact] = {}
        self.extended: set[fx.Node] = set()
        self.misses: dict[fx.Node, Miss] = {}
        self._numbers: dict[Hashable, int] = {}
        self._ident: dict[fx.Node, Any] = {}
        self._constants: dict[fx.Node, Number | None] = {}
        self._weights: dict[fx.Node, bool] = {}
        self._region = 0
        self._regions: dict[fx.Node, int] = {}

    def run(self) -> NormalForm:
        for node in self.gm.graph.nodes:
            if node.op == "output":
                continue
            self._region += _separates(node)
            self._regions[node] = self._region
            self._ident[node] = self._number(self._key(node))
            v = node.meta.get("val")
            if isinstance(v, torch.Tensor):
                self._ident[node] = (self._ident[node], v.dtype)
                self._visit(node, v)
            elif node.op == "call_function" and ir.is_pure(node):
                rule = _RULES.get(packet(node))
                fact = rule(self, node) if rule else None
                if fact is not None:
                    self.facts[node] = fact
        return self

    # -- value numbers ------------------------------------------------------------------------

    def _number(self, key: Hashable) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _key(self, node: fx.Node) -> Hashable:
        if node.op != "call_function" or not ir.is_pure(node):
            return node
        try:
            args, kwargs = self._freeze(node.args), self._freeze(node.kwargs)
            key = (node.target, args, kwargs, self._region)
            hash(key)
        except TypeError:
            return node
        return key

    def _freeze(self, arg: Any) -> Hashable:
        if isinstance(arg, fx.Node):
            if arg.meta.get("mutated"):
                return ("node", arg, self._region)
            return ("node", self._ident[arg])
        if isinstance(arg, (list, tuple)):
            return tuple(self._freeze(a) for a in arg)
        if isinstance(arg, dict):
            return tuple((k, self._freeze(a)) for k, a in sorted(arg.items()))
        if isinstance(arg, slice):
            return ("slice", *(self._freeze(a) for a in (arg.start, arg.stop, arg.step)))
        return (type(arg), arg)

    def _visit(self, node: fx.Node, v: torch.Tensor) -> None:
        if not v.is_floating_point():
            return
        number = self._ident[node][0]
        self.values[node] = Value(number, v.dtype, node)
        if node.op != "call_function" or not ir.is_pure(node):
            return
        if is_cast(node):
            self._cast(node)
        elif node.target in _SAME:
            self._same(node, node.args[0])
        elif node.target in _RESHAPES:
            self._reshape(node)
        else:
            rule = _RULES.get(packet(node))
            fact = rule(self, node) if rule else None
            if fact is not None:
                self.facts[node] = fact
                if isinstance(fact, Scaled):
                    self._complete(node, fact)

    def value(self, a: Any) -> Value | None:
        v = self.values.get(a) if isinstance(a, fx.Node) else None
        if v is not None and a.meta.get("mutated"):  # another value after each write
            return Value(self._number(("written", a, self._region)), v.dtype, a)
        if v is None or self._regions[a] == self._region or a.op != "call_function":
            return v
        return Value(self._ident[a][0], ir.dtype(a), a)  # type: ignore

    def fact(self, a: Any) -> Fact | None:
        if not isinstance(a, fx.Node) or self._regions[a] != self._region:
            return None
        return self.facts.get(a)

    def is_weight(self, a: Any) -> bool:
        return ir.is_tensor(a) and ir.is_weight_expr(a, self._weights)

    def constant(self, a: Any) -> Number | None:
        """``a`` as a number: a Python number, a size, or a constant 0-d tensor."""
        if isinstance(a, (int, float)) and not isinstance(a, bool):
            return Number(a)
        if not isinstance(a, fx.Node):
            return None
        v = ir.val(a)
        if isinstance(v, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(v, bool):
            return Number(ir.concrete(v))
        if not isinstance(v, torch.Tensor) or v.dim() != 0 or a.meta.get("mutated"):
            return None
        if a not in self._constants:
            self._constants[a] = self._read_constant(a)
        return self._constants[a]

    def _read_constant(self, node: fx.Node) -> Number | None:
        with _disable_current_modes():  # constants are real tensors, even while fakes are traced
            t = self._evaluate(node, 8)
            if t is None:
                return None
            tol = 4 * torch.finfo(t.dtype).eps if t.is_floating_point() else 1e-12
            return Number(t.item(), max(tol, 1e-12))

    def _evaluate(self, node: fx.Node, depth: int) -> torch.Tensor | None:
        """The tensor behind a small expression of 0-d constants, or ``None``."""
        if node.op == "get_attr":
            if node.meta.get("kind") != "constant":
                return None
            t: Any = self.gm
            for part in str(node.target).split("."):
                t = getattr(t, part, None)
            real = isinstance(t, torch.Tensor) and type(t) in (torch.Tensor, torch.nn.Parameter)
            return t.detach() if real and t.dim() == 0 and not t.is_meta else None
        if node.op != "call_function" or depth == 0 or not ir.is_pure(node):
            return None
        args = []
        for a in node.args:
            if isinstance(a, fx.Node):
                t = self._evaluate(a, depth - 1) if ir.is_tensor(a) else None
                if t is None:
                    return None
                args.append(t)
            else:
                args.append(a)
        if any(isinstance(a, fx.Node) for a in node.kwargs.values()):
            return None
        try:
            t = node.target(*args, **node.kwargs)  # type: ignore[operator]
        except Exception:  # an odd constant is simply not a number to us
            return None
        return t if isinstance(t, torch.Tensor) and t.dim() == 0 else None

    # -- transparent nodes --------------------------------------------------------------------

    def _extend(self, node: fx.Node, source: fx.Node, **changes: Any) -> Norm | None:
        """The norm at ``source`` goes on at ``node``, if nobody else reads it before."""
        norm = self.facts[source]
        assert isinstance(norm, Norm)
        if len(source.users) != 1:
            return None
        self.extended.add(source)
        return replace(norm, out_dtype=ir.dtype(node), end=node, **changes)

    def _set(self, node: fx.Node, fact: Fact | None) -> None:
        if fact is not None:
            self.facts[node] = fact

    def _same(self, node: fx.Node, source: Any) -> None:
        v, fact = self.value(source), self.fact(source)
        if v is None:
            return
        physical = node if v.node is source else v.node
        self.values[node] = replace(v, node=physical)
        if isinstance(fact, Norm):
            if len(source.users) != 1:
                return
            self.extended.add(
                source
            )  # ``end`` stays: a layout change after the norm is not its own
        self._set(node, fact)

    def _cast(self, node: fx.Node) -> None:
        source: Any = node.args[0]
        v, fact, to = self.value(source), self.fact(source), ir.dtype(node)
        if v is None:
            return
        if v.dtype == to:
            self._same(node, source)
            return
        if widens(v.dtype, to):
            self.values[node] = replace(v, dtype=to, center=None)
        if isinstance(fact, Norm):
            if ir.module_path(node) != ir.module_path(fact.core):
                return
            if fact.stage == 0:
                self._set(node, self._extend(node, source, stage=1, norm_dtype=to))
            elif fact.stage < 4:
                self._set(node, self._extend(node, source, stage=4))
        elif isinstance(fact, (Square, Stat, Root, Scaled)):
            what = {Square: "square", Stat: "statistic", Root: "root", Scaled: "scaled value"}
            flaw = (
                f"the {what[type(fact)]} is computed in {_short(fact.dtype)} and rounded or "
                f"carried on in {_short(to)}"
            )
            self._set(node, replace(fact, dtype=to, flaw=fact.flaw or flaw))

    def _reshape(self, node: fx.Node) -> None:
        source: Any = node.args[0]
        v, fact = self.value(source), self.fact(source)
        if v is None:
            return
        if ir.same_shape(ir.shape(node), ir.shape(source)):
            self._same(node, source)
            return
        if not isinstance(fact, (Stat, Root)):
            return
        stat = fact if isinstance(fact, Stat) else fact.stat
        if isinstance(fact, Root) and fact.gain is not None:
            return
        full = ir.shape(stat.v.base)
        rank = len(full)
        kept = tuple(1 if i - rank in stat.dims else s for i, s in enumerate(full))
        if ir.same_shape(ir.shape(node), kept):
            expands = node.target in (aten.expand.default, aten.expand_as.default)
            if not expands or fact.kept:
                self._set(node, replace(fact, kept=True))
        elif fact.kept and ir.same_shape(ir.shape(node), full):
            if ir.same_shape(ir.shape(source), kept):
                self._set(node, fact)

    # -- helpers of the rules -----------------------------------------------------------------

    def centered(self, x: Value, dims: tuple[int, ...], node: fx.Node | None) -> Value:
        number = self._number(("center", x.number, dims, x.dtype))
        return Value(number, x.dtype, node, Center(x, dims), f"({x.text}-mean({x.text}))")

    def stat(self, node: fx.Node, v: Value, power: int, dims: Any, keep: bool, text: str) -> Stat:
        full = ir.shape(v.base)
        rank = len(full)
        if dims is None or (isinstance(dims, (list, tuple)) and not dims):
            dims = range(rank)
        elif isinstance(dims, int):
            dims = [dims]
        dims = tuple(sorted({d - rank if d >= 0 else d for d in dims}))
        n = math.prod(full[d] for d in dims)
        dtype = ir.dtype(node) if ir.is_tensor(node) else v.dtype
        return Stat(v, power, dims, n, dtype, bool(keep), text)

    def _complete(self, node: fx.Node, s: Scaled) -> None:
        """Where ``s`` is a whole norm, turn the fact of ``node`` into it; else note a near miss."""
        root = s.root
        if root is None or root.q != -0.5:
            return
        stat = root.stat
        if not ir.same_shape(ir.shape(node), ir.shape(s.v.base)):
            return
        c, p = s.c / math.sqrt(stat.c), s.p - (stat.p + 1) / 2
        flaw = s.flaw or root.flaw or stat.flaw
        origin = s.origin or node
        weight = self.is_weight(node)
        if flaw is None and _is_one(c, p, stat.n):
            eps = self._eps(stat)
            v = s.v
            wide = _opmath(stat.v.dtype) if stat.wide else stat.v.dtype
            if stat.floor and v.center is not None:
                flaw = "the deviation is clamped from below where a LayerNorm adds eps"
            elif stat.floor and eps is not None and eps < torch.finfo(wide).tiny:
                flaw = f"the bound of the mean square, {eps:.3g}, is none in {_short(wide)}"
            elif eps is not None:
                x = v.center.x if v.center is not None else v
                assert x.node is not None
                if weight and self._only_weight_of_a_linear(node):
                    return
                self.misses.pop(origin, None)
                self.facts[node] = Norm(
                    kind="layer_norm" if v.center is not None else "rms_norm",
                    x=x.node,
                    dims=stat.dims,
                    eps=eps,
                    floor=stat.floor > 0,
                    stat_dtype=wide,
                    norm_dtype=stat.v.dtype,
                    out_dtype=ir.dtype(node),
                    core=node,
                    end=node,
                    text=s.text,
                    gain=s.gain,
                    stage=0 if s.gain is None else 2,
                )
                return
            else:
                flaw = "eps is divided by a size that is not known before the model runs"
        if weight:
            return
        if _is_one(c, p + 0.5, stat.n) and not _is_one(c, p, stat.n):
            flaw = "L2 normalization: the squares are summed, not averaged"
        elif flaw is None:
            if isinstance(stat.n, int):
                k = f"{c * float(stat.n) ** p:.6g}"
            else:
                k = f"{c:.6g}·d^{p:g} (the size d = {stat.n} is known only when the model runs)"
            flaw = f"the normalized value carries the extra constant factor {k}"
        x = s.v.center.x if s.v.center is not None else s.v
        self.misses[origin] = Miss(node, x.node or node, s.text, flaw)

    @staticmethod
    def _eps(stat: Stat) -> float | None:
        """``shift / (c·N^(p+1))``: eps once the statistic is written as a mean; so for ``floor``."""
        eps = stat.floor or stat.shift
        if eps == 0.0:
            return 0.0
        if stat.p == -1:
            return eps if stat.c == 1.0 else eps / stat.c
        if isinstance(stat.n, int):
            return eps / (stat.c * float(stat.n) ** (stat.p + 1))
        return None

    @staticmethod
    def _only_weight_of_a_linear(node: fx.Node) -> bool:
        """Weight standardization: the result is nothing but the weight of linears and convs."""
        return bool(node.users) and all(
            ir.is_call(u, aten.linear, aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution)
            and u.args[0] is not node
            for u in node.users
        )

    def gain_fits(self, gain: fx.Node, x: fx.Node, dims: tuple[int, ...]) -> fx.Node | None:
        """``gain`` (less a needless expand) if it may be the gain of a norm of ``x`` over ``dims``.

        It broadcasts to ``x`` and, unless it is a scalar, varies along the normalized dims: a factor
        per position or per channel *outside* them is not a gain.
        """
        gain = unexpanded(gain)
        if not self.is_weight(gain):
            return None
        full, shape = ir.shape(x), ir.shape(gain)
        if len(shape) > len(full):
            return None
        sizes = {i - len(shape): s for i, s in enumerate(shape)}
        for d, s in sizes.items():
            if not ir.same_dim(s, 1) and not ir.same_dim(s, full[d]):
                return None
        varies = [d for d, s in sizes.items() if not ir.same_dim(s, 1)]
        if varies and not any(d in dims for d in varies):
            return None
        return gain


def _separates(node: fx.Node) -> bool:
    """True for a node that no norm may straddle.

    Across a change of grad mode its gradient would change, across a write what it reads.
    """
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return node.target is torch._C._set_grad_enabled or not isinstance(
        node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
    )


#: Rules by op packet: ``rule(form, node) -> fact``. Filled by ``normal_rules``.
_RULES: dict[Any, Callable[[NormalForm, fx.Node], Fact | None]] = {operator.getitem: None}  # type: ignore


def rule(*packets: Any) -> Callable:
    """Decorator: the fact of a call to one of ``packets``."""

    def register(f: Callable) -> Callable:
        for each in packets:
            _RULES[each] = f
        return f

    return register
