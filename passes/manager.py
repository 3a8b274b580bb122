"""The pass contract and the pass manager.

A pass looks at a graph site by site. For each site it *plans* (reads only; raises ``Refuse`` with a
reason) and then *commits* (edits the graph; must not fail). Should a commit fail all the same, the
manager restores the graph as it was before the pass, bans that site and runs the pass again: the
user's model is never left half-rewritten.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from . import ir
from .autocast import explicit_casts
from .errors import NormfuseError, NormfuseWarning, Refuse
from .report import PassRecord, Report, Site

if TYPE_CHECKING:
    import sympy

PROMISES = ("exact", "extend", "alter")

#: Environment variables: names of passes to switch off, and the number of site rewrites allowed.
DISABLE_ENV = "NORMFUSE_DISABLE"
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


_REGISTRY: dict[str, type[Pass]] = {}


def register(cls: type[Pass]) -> type[Pass]:
    """Class decorator: make a pass known by name (used by presets, options and the docs)."""
    if not cls.name or cls.promise not in PROMISES:
        raise NormfuseError(f"{cls.__name__} needs a name and a promise among {PROMISES}")
    if _REGISTRY.get(cls.name, cls).__qualname__ != cls.__qualname__:
        raise NormfuseError(f"two passes are called {cls.name!r}")
    _REGISTRY[cls.name] = cls
    return cls


def registry() -> dict[str, type[Pass]]:
    """All known passes by name; each class carries its ``promise``."""
    from . import alter, exact, extend  # noqa: F401  (importing them registers theirs)

    return dict(sorted(_REGISTRY.items()))


class Snapshot:
    """A remembered graph, to be built again as often as asked.

    Taken before every pass and hardly ever needed: it only keeps what the nodes held (arguments are
    immutable in fx). Fake values are shared, modules stay where they are.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.codegen = graph._codegen
        self.records = [
            (n, n.name, n.target, n.args, n.kwargs, n.type, copy.copy(n.meta)) for n in graph.nodes
        ]

    def graph(self) -> fx.Graph:
        """A fresh copy of the graph as it was."""
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for old, name, target, args, kwargs, kind, meta in self.records:
            args, kwargs = fx.node.map_arg((args, kwargs), env.__getitem__)
            new = graph.create_node(old.op, target, args, kwargs, name, kind)
            new.meta = copy.copy(meta)
            if hasattr(old, "_dynamo_source"):
                new._dynamo_source = old._dynamo_source
            env[old] = new
        graph._codegen = self.codegen
        return graph


def copy_graph(source: fx.Graph) -> fx.Graph:
    """A copy of a graph with its facts."""
    return Snapshot(source).graph()


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Garbage collection waits: walking a large model's graph again and again frees nothing."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def disabled_by_environment() -> frozenset[str]:
    names = os.environ.get(DISABLE_ENV, "")
    return frozenset(n.strip() for n in names.split(",") if n.strip())


class PassManager:
    """Runs passes in order on one graph, checks the IR after each, keeps the report.

    Args:
        passes: pass instances (or classes, or registered names).
        context: shared by all passes; a fresh default one per run if omitted.
        verify: compare the graph's float64 results before and after each pass and undo a pass that
            changes them (see ``passes/verify.py``).
    """

    def __init__(
        self,
        passes: Iterable[Pass | type[Pass] | str],
        context: Context | None = None,
        verify: bool = False,
    ) -> None:
        self.passes = [instantiate(p) for p in passes]
        self.context = context
        self.verify = verify

    def uuid(self) -> str:
        """Stable across processes; changes with the passes, their order and their options."""
        text = "\n".join(p.uuid() for p in self.passes)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def run(
        self, gm: fx.GraphModule, report: Report | None = None
    ) -> tuple[fx.GraphModule, Report]:
        """Rewrite ``gm`` in place; returns it with the report.

        Raises:
            SpecError: a pass produced illegal IR (the graph is restored first).
        """
        context = self.context or Context()
        if fuel := os.environ.get(FUEL_ENV):
            context.fuel = int(fuel) if context.fuel is None else context.fuel
        disabled_passes = context.disabled | disabled_by_environment()
        unknown = disabled_passes - set(registry())
        if unknown:
            raise NormfuseError(
                f"cannot disable unknown passes {sorted(unknown)}; known: {sorted(registry())}"
            )
        if report is None:
            report = Report()
        report.mode = "training" if context.training else "inference"
        report.device = context.device
        start = time.perf_counter()
        _record_sites(gm, report)
        with explicit_casts():
            self._run_all(gm, context, report, disabled_passes)
            with collector_paused():
                gm.recompile()
        report.seconds += time.perf_counter() - start
        return gm, report

    def _run_all(
        self, gm: fx.GraphModule, context: Context, report: Report, disabled: frozenset[str]
    ) -> None:
        said: list[str] = []
        before = None
        for p in self.passes:
            record = PassRecord(p.name, p.promise, disabled=p.name in disabled)
            report.passes.append(record)
            if record.disabled:
                continue
            t0 = time.perf_counter()
            with collector_paused():
                before = before or Snapshot(gm.graph)
            result = self._run_one(p, gm, context, report, before)
            if result.modified:
                before = None
            record.seconds = time.perf_counter() - t0
            record.applied, record.refused = len(result.applied), len(result.refused)
            _merge(report, p, result)
            said += result.warnings
            if p.note and result.modified and p.note not in report.notes:
                report.notes.append(p.note)
        report.notes += [text for p in self.passes if p.closing and (text := p.closing(gm, report))]
        if said:
            warnings.warn("; ".join(dict.fromkeys(said)), NormfuseWarning, stacklevel=4)

    def _run_one(
        self, p: Pass, gm: fx.GraphModule, context: Context, report: Report, before: Snapshot
    ) -> PassResult:
        journal, fuel = list(context.journal), context.fuel

        def undo() -> None:
            gm.graph = before.graph()
            context.journal[:] = journal
            context.fuel = fuel
            context.cache.clear()

        while True:
            try:
                with collector_paused():
                    result = p.run(gm, context)
                    if result.modified:
                        context.cache.clear()
                        ir.stable_sort(gm.graph)
                        ir.erase_dead(gm)
                        ir.check(gm)
            except CommitFailed as failure:
                undo()
                context.banned.add((failure.pass_name, failure.key))
                report.notes.append(f"{failure}; the site was left as it was")
                continue
            except Exception:
                undo()
                raise
            if self.verify and result.modified:
                from .verify import check_pass, rebase

                if p.promise == "alter" or not result.keeps_function:
                    change = rebase(gm, context, before.graph())
                    if p.promise == "alter" and change is not None:
                        result.notes.append(
                            f"{p.name} changes the result by {change:.1e} relative (largest "
                            "difference over largest value, on the example inputs, in float64)"
                        )
                    return result
                disagreement = check_pass(before.graph(), gm, context)
                if disagreement is not None:
                    steps = [key for _, key in context.journal[len(journal) :]]
                    undo()
                    culprit = self._culprit(p, gm, context, steps, undo)
                    report.failed_verification = True
                    report.notes.append(
                        f"verification failed after {p.name} at {culprit}: {disagreement}; undone"
                    )
                    if not steps:  # nothing to ban: without the pass, then
                        return PassResult()
                    context.banned.add((p.name, culprit))
                    continue
            return result

    def _culprit(
        self,
        p: Pass,
        gm: fx.GraphModule,
        context: Context,
        steps: list[str],
        undo: Callable[[], None],
    ) -> str:
        """The site whose rewrite changes the numbers: bisect over how many of the pass's ``steps``
        (a stream of norms that change together is one) are taken."""
        from .verify import check_pass

        fuel = context.fuel
        good, bad = 0, len(steps)
        while bad - good > 1:
            middle = (good + bad) // 2
            before = Snapshot(gm.graph)
            context.fuel = middle
            try:
                p.run(gm, context)
                ir.stable_sort(gm.graph)
                ir.erase_dead(gm)
                wrong = check_pass(before.graph(), gm, context) is not None
            finally:
                gm.graph = before.graph()
                undo()
            good, bad = (good, middle) if wrong else (middle, bad)
        context.fuel = fuel
        return steps[bad - 1] if steps else "an unknown site"  # it did not use `attempt`


def instantiate(p: Any) -> Pass:
    """A pass from an instance, a class or a registered name."""
    if isinstance(p, str):
        known = registry()
        if p not in known:
            raise NormfuseError(f"no pass is called {p!r}; known: {sorted(known)}")
        p = known[p]
    if isinstance(p, type) and issubclass(p, Pass):
        p = p()
    if not isinstance(p, Pass):
        raise NormfuseError(f"expected a pass, a pass class or a name, got {p!r}")
    return p


def _record_sites(gm: fx.GraphModule, report: Report) -> None:
    known = {s.key for s in report.sites}
    for node in ir.norm_nodes(gm):
        key = node.meta.get("site")
        if key is None or key in known:
            continue
        known.add(key)
        x = ir.NormArgs(node).x
        report.sites.append(
            Site(
                key=key,
                kind=node.target._schema.name.split("::")[1],
                module=ir.module_path(node),
                spelling=node.meta.get("spelling", ""),
                where=ir.where(node),
                shape="×".join(str(s) for s in ir.shape(x)),
                dtype=str(ir.dtype(x)).removeprefix("torch."),
            )
        )


def _merge(report: Report, p: Pass, result: PassResult) -> None:
    by_key = {s.key: s for s in report.sites}
    for site in result.sites:
        if site.key not in by_key:
            report.sites.append(site)
            by_key[site.key] = site

    def site_of(key: str) -> Site:
        if key not in by_key:
            by_key[key] = Site(key=key, kind="other")
            report.sites.append(by_key[key])
        return by_key[key]

    for key in result.applied:
        site = site_of(key)
        site.applied.append(p.name)
        saved = result.savings.get(key, (0.0, 0.0))
        site.bytes_saved += saved[0]
        site.flops_saved += saved[1]
    for key, reason in result.refused:
        site_of(key).refused.append((p.name, reason))
    report.notes += [*result.notes, *result.warnings]
