"""Find the one site rewrite that changes a number, on the model of Inductor's bisector.

Every rewrite of a site costs one unit of fuel. With ``k`` units the first ``k`` rewrites happen and
no more, so the smallest ``k`` for which the result is wrong names the culprit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..passes.capture import capture
from ..passes.errors import NormfuseError
from ..passes.verify import max_error
from .rewrite import make_settings, rewrite, transform


@dataclass(frozen=True)
class Culprit:
    """The rewrite after which the check fails.

    Attributes:
        pass_name, site: which rewrite.
        index: its position among all rewrites, counted from 1: ``NORMFUSE_FUEL=index`` reproduces
            the failure, ``index − 1`` avoids it.
        total: number of rewrites without a limit.
    """

    pass_name: str
    site: str
    index: int
    total: int

    def __str__(self) -> str:
        return f"{self.pass_name} at {self.site} (rewrite {self.index} of {self.total})"


def bisect(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    passes: str | Iterable[Any] = "exact",
    check: Callable[[nn.Module], bool] | None = None,
    *,
    tolerance: float = 1e-3,
    policy: str | None = None,
) -> Culprit | None:
    """The first rewrite with which ``check`` fails; ``None`` if it never does.

    Args:
        model, args, kwargs, passes, policy: as for :func:`normfuse.rewrite`.
        check: called with a rewritten module, returns True if it is good. By default the outputs on
            ``args`` must agree with the model's to ``tolerance`` relative.

    Raises:
        NormfuseError: the check fails before anything is rewritten.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    if check is None:
        expected = _outputs(model, args, kwargs)

        def check(candidate: nn.Module) -> bool:
            return max_error(_outputs(candidate, args, kwargs), expected) <= tolerance

    def good(fuel: int | None) -> bool:
        candidate, _ = rewrite(model, args, kwargs, passes, verify=False, policy=policy, fuel=fuel)
        return check(candidate)

    if good(None):
        return None
    if not good(0):
        raise NormfuseError(
            "the check fails before anything is rewritten: the capture itself, or the check, is at "
            "fault"
        )
    journal = _journal(model, args, kwargs, passes, policy)
    low, high = 0, len(journal)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    pass_name, site = journal[high - 1]
    return Culprit(pass_name, site, high, len(journal))


def _outputs(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return pytree.tree_leaves(model(*args, **kwargs))


def _journal(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], passes: Any, policy: str | None
) -> list[tuple[str, str]]:
    settings = make_settings(passes, policy)
    gm = capture(model, args, kwargs)
    _, context = transform(
        gm, pytree.tree_leaves((args, kwargs)), settings, training=model.training
    )
    return list(context.journal)
