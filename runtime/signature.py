"""What inputs a captured graph stands for, checked before every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

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
            elif isinstance(x, torch.Tensor) or (
                expected is not None and (type(x) is not type(expected) or x != expected)
            ):
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
