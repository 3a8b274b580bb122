"""The pass manager: runs passes in order, checks after each, undoes what failed, reports.

Should a commit fail, the manager restores the graph as it was before the pass, bans that site and runs
the pass again: the user's model is never left half-rewritten.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import fx

from . import ir
from .autocast import explicit_casts
from .contract import FUEL_ENV, REGISTERED, CommitFailed, Context, Pass, PassResult
from .errors import NormfuseError, NormfuseWarning
from .report import PassRecord, Report, Site
from .snapshot import Snapshot
from .warn import warn

#: Environment variable: names of passes to switch off.
DISABLE_ENV = "NORMFUSE_DISABLE"


def registry() -> dict[str, type[Pass]]:
    """All known passes by name; each class carries its ``promise``."""
    from . import alter, exact, extend  # noqa: F401  (importing them registers theirs)

    return dict(sorted(REGISTERED.items()))


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
            warn("; ".join(dict.fromkeys(said)), NormfuseWarning)

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
