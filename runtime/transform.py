"""The passes of a rewrite on one captured graph: settings, the run, what verification says of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from ..passes.contract import Context, Pass
from ..passes.errors import NormfuseError
from ..passes.manager import PassManager
from ..passes.presets import policy_of, resolve
from ..passes.report import Report
from ..passes.verify import check_recognition, check_working
from ..passes.weights import keep_nonfinite


class Settings:
    """Which passes run, and how (picklable)."""

    def __init__(
        self,
        passes: list[Pass],
        policy: str,
        disable: frozenset[str],
        verify: bool,
        dynamic: bool,
        fuel: int | None,
    ) -> None:
        self.passes, self.policy, self.disable = passes, policy, disable
        self.verify, self.dynamic, self.fuel = verify, dynamic, fuel

    @property
    def beyond_exact(self) -> list[str]:
        """The passes without which the model would be another function: extensions, alterations."""
        return [p.name for p in self.passes if p.promise != "exact" and p.name not in self.disable]


def make_settings(
    passes: Any,
    policy: str | None = None,
    disable: Iterable[str] = (),
    verify: bool = False,
    dynamic: bool = True,
    fuel: int | None = None,
) -> Settings:
    """Validated settings; ``policy=None`` means what the preset implies."""
    if policy not in (None, "pays", "always"):
        raise NormfuseError(f"policy must be 'pays' or 'always', got {policy!r}")
    disable = (disable,) if isinstance(disable, str) else disable
    return Settings(
        resolve(passes), policy or policy_of(passes), frozenset(disable), verify, dynamic, fuel
    )


def transform(
    gm: fx.GraphModule, flat: Sequence[Any], settings: Settings, *, training: bool
) -> tuple[Report, Context]:
    """Run the passes on a captured graph; verify if asked; returns the report."""
    device = next((x.device.type for x in flat if isinstance(x, torch.Tensor)), "cpu")
    context = Context(
        training=training,
        device=device,
        policy=settings.policy,
        disabled=settings.disable,
        fuel=settings.fuel,
    )
    report = Report()
    report.sites.extend(gm.meta.get("near_misses", []))
    report.notes += gm.meta.get("notes", [])
    report.notes += left_alone(keep_nonfinite(gm))
    if settings.verify:
        gm.meta["example_inputs"] = list(flat)
        wrong = check_recognition(gm, context)
        if wrong is not None:
            _unrecognize(gm, context, report, wrong)
            return report, context
    manager = PassManager(settings.passes, context, verify=settings.verify)
    manager.run(gm, report)
    if settings.verify:
        _verify(gm, context, report)
        for name in _FOR_VERIFICATION:
            gm.meta.pop(name, None)
    return report, context


_FOR_VERIFICATION = ("example_inputs", "captured", "called")


def _unrecognize(gm: fx.GraphModule, context: Context, report: Report, wrong: str) -> None:
    """Nothing is rewritten, not even spelled otherwise: the graph is the captured one again."""
    PassManager([], context).run(gm, report)  # lists the sites
    report.failed_verification = True
    report.max_relative_error = 0.0
    report.notes.append(f"verification failed after recognition: {wrong}; nothing was rewritten")
    for site in report.sites:
        site.refused.append(("canonicalize", "verification failed after recognition (see notes)"))
    gm.graph = gm.meta["captured"].graph()
    gm.recompile()
    for name in _FOR_VERIFICATION:
        gm.meta.pop(name, None)


def left_alone(names: Sequence[str]) -> list[str]:
    """What a report says of weights that are not finite."""
    if not names:
        return []
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return [
        f"not finite, so nothing is folded into them or out of them: {', '.join(names[:4])}{more}"
    ]


def _verify(gm: fx.GraphModule, context: Context, report: Report) -> None:
    """Fill in the error figures: float64 agreement, and working dtype against float64."""
    report.max_relative_error = max(context.errors, default=0.0)
    if context.facts.get("rebased"):
        report.notes.append(
            "a pass changes the function (or extends a model that was trained since): the result is "
            "not compared with the original's"
        )
        return
    worse = check_working(gm, context, report)
    if worse is not None:
        report.failed_verification = True
        report.notes.append(f"verification failed in the working dtype: {worse}")
