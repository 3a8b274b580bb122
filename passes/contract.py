"""The pass contract: what a pass is, what it may know, what it returns.

A pass looks at a graph site by site. For each site it *plans* (reads only; raises ``Refuse`` with a
reason) and then *commits* (edits the graph; must not fail).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from . import ir
from .errors import NormfuseError, Refuse
from .report import Report, Site

if TYPE_CHECKING:
    import sympy

PROMISES = ("exact", "extend", "alter")

#: Environment variable: the number of site rewrites allowed.
FUEL_ENV = "NORMFUSE_FUEL"


@dataclass
class Context:
    """What passes may know besides the graph.

    Attributes:
        training: the graph will be differentiated; weight expressions stay inline and dropout is
            active. ``False`` means inference: the weight program runs once.
        device: device type, for the cost model.
        policy: ``"always"`` rewrites whatever is exact; ``"pays"`` asks the cost model first.
        disabled: names of passes that must not run.
        fuel: number of further site rewrites allowed (``None``: unlimited); for bisection.
        banned: ``(pass, site key)`` pairs that must be refused (set after a failed commit).
        options: pass-specific options by pass name.
    """

    training: bool = False
    device: str = "cpu"
    policy: str = "always"
    disabled: frozenset[str] = frozenset()
    fuel: int | None = None
    banned: set[tuple[str, str]] = field(default_factory=set)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: every rewrite in order, as (pass, site key), one a unit of fuel: what bisection searches
    journal: list[tuple[str, str]] = field(default_factory=list)
    #: scratch space shared by the passes of one run, e.g. the residual-stream analysis
    cache: dict[str, Any] = field(default_factory=dict)
    #: what ``normfuse.calibrate`` found on this graph, if it was asked (an object with ``hidden()``)
    calibration: Any = None
    #: facts that stay true whatever is rewritten (the float64 results of the original graph)
    facts: dict[str, Any] = field(default_factory=dict)
    #: float64 disagreement measured after each verified pass
    errors: list[float] = field(default_factory=list)

    def fold_dtype(self, *dtypes: torch.dtype) -> torch.dtype:
        """The dtype in which weights of ``dtypes`` are combined before one final rounding.

        float64 when the weight program runs once, else the promoted accumulation dtype.
        """
        if not self.training:
            return torch.float64
        out = torch.float32
        for d in dtypes:
            if d.is_floating_point and d not in (torch.float16, torch.bfloat16):
                out = torch.promote_types(out, d)
        return out


@dataclass
class PassResult:
    """Outcome of one pass: ``applied`` site keys and ``(site key, reason)`` refusals."""

    applied: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    #: predicted savings by site key: (bytes, flops)
    savings: dict[str, tuple[float, float]] = field(default_factory=dict)
    #: sites this pass introduced (groups of linears, batch norms…)
    sites: list[Site] = field(default_factory=list)
    #: the graph computes what it did before. False for extensions whose parameters were trained
    #: already (another graph of an extended model) and for every pass with the promise "alter"
    keeps_function: bool = True
    #: sentences for the report
    notes: list[str] = field(default_factory=list)
    #: sentences for the report that also become one Python warning per run
    warnings: list[str] = field(default_factory=list)

    @property
    def modified(self) -> bool:
        return bool(self.applied)


class CommitFailed(NormfuseError):
    def __init__(self, pass_name: str, key: str, cause: BaseException) -> None:
        super().__init__(f"{pass_name} failed while rewriting {key}: {cause!r}")
        self.pass_name, self.key, self.cause = pass_name, key, cause


class Pass:
    """Base class of all passes.

    A subclass sets ``name`` (snake case) and ``promise`` (one of :data:`PROMISES`), implements
    :meth:`run`, and if exact, :meth:`identity`. Options are constructor keywords with defaults and
    must be plain data: they enter :meth:`uuid`.
    """

    name: ClassVar[str] = ""
    promise: ClassVar[str] = "exact"
    #: a sentence for the report of every run that rewrites something (set by presets)
    note: str = ""
    #: says something about the graph after all passes, or nothing (set by presets)
    closing: Callable[[fx.GraphModule, Report], str] | None = None

    def __init__(self, **options: Any) -> None:
        self.options = options

    @classmethod
    def identity(cls) -> Sequence[tuple[sympy.Matrix, sympy.Matrix]]:
        """``(left, right)`` pairs of symbolic matrices whose equality *is* the pass's correctness."""
        raise NormfuseError(f"{cls.__name__} states no identity")

    def run(self, gm: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite ``gm`` in place; return what was applied and refused."""
        raise NotImplementedError

    def uuid(self) -> str:
        """Stable name of the pass and its options, for compile-cache keys."""
        text = repr(sorted(self.options.items()))
        return f"{type(self).__module__}.{type(self).__qualname__}:{text}"

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in sorted(self.options.items()))
        return f"{type(self).__name__}({inner})"

    # -- helpers for subclasses ---------------------------------------------------------------

    def attempt(
        self,
        context: Context,
        result: PassResult,
        key: str,
        plan: Callable[[], Callable[[], None]],
    ) -> bool:
        """Plan and commit one site; record the outcome.

        Args:
            key: the site's key.
            plan: reads the graph, raises :class:`Refuse`, or returns the commit function.

        Returns:
            True if the site was rewritten.
        """
        if (self.name, key) in context.banned:
            result.refused.append((key, "an earlier attempt failed and was rolled back"))
            return False
        try:
            commit = plan()
        except Refuse as refusal:
            result.refused.append((key, reason_text(refusal)))
            return False
        if context.fuel is not None:
            if context.fuel <= 0:
                result.refused.append((key, f"out of fuel ({FUEL_ENV})"))
                return False
            context.fuel -= 1
        try:
            commit()
        except Exception as error:
            raise CommitFailed(self.name, key, error) from error
        result.applied.append(key)
        context.journal.append((self.name, key))
        return True


def reason_text(refusal: Refuse) -> str:
    """The refusal's reason with the module path and ``file:line`` of the node that caused it."""
    node = refusal.node
    if isinstance(node, fx.Node):
        return f"{refusal.reason} [{ir.describe(node)}]"
    return refusal.reason


#: Passes by name, as far as their modules were imported (:func:`.manager.registry` imports all).
REGISTERED: dict[str, type[Pass]] = {}


def register(cls: type[Pass]) -> type[Pass]:
    """Class decorator: make a pass known by name (used by presets, options and the docs)."""
    if not cls.name or cls.promise not in PROMISES:
        raise NormfuseError(f"{cls.__name__} needs a name and a promise among {PROMISES}")
    if REGISTERED.get(cls.name, cls).__qualname__ != cls.__qualname__:
        raise NormfuseError(f"two passes are called {cls.name!r}")
    REGISTERED[cls.name] = cls
    return cls
