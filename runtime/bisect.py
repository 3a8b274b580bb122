"""Find the one site rewrite that changes a number, on the model of Inductor's bisector.

Every rewrite of a site costs one unit of fuel. With ``k`` units the first ``k`` rewrites happen and
no more, so the smallest ``k`` for which the result is wrong names the culprit. This searches what
:func:`normfuse.rewrite` does; for a compiled model ``docs/backend.md`` has the recipe.
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
from .rewrite import rewrite
from .transform import Settings, make_settings, transform


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
    disable: str | Iterable[str] = (),
    gradients: bool = False,
) -> Culprit | None:
    """The first rewrite with which ``check`` fails; ``None`` if it never does.

    Args:
        model, args, kwargs, passes, policy, disable: as for :func:`normfuse.rewrite`.
        check: called with a rewritten module, returns True if it is good. By default the outputs on
            ``args`` must agree with the model's to ``tolerance`` relative.
        tolerance: largest relative disagreement, of the largest difference to the largest value.
        gradients: compare the parameters' gradients of a fixed random functional of the outputs
            too, as one vector. Not with a ``check`` of your own.

    Raises:
        NormfuseError: the check fails before anything is rewritten.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    passes = passes if isinstance(passes, str) else list(passes)
    disable = (disable,) if isinstance(disable, str) else tuple(disable)
    if check is not None and gradients:
        raise NormfuseError("gradients=True is for the default check; look at them in your own")
    if check is None:
        measure = _outputs_and_gradients if gradients else _outputs
        expected = measure(model, args, kwargs)
        if gradients and not expected[-1].any():
            raise NormfuseError("gradients=True, but no output has a gradient in any parameter")

        def check(candidate: nn.Module) -> bool:
            return max_error(measure(candidate, args, kwargs), expected) <= tolerance

    def good(fuel: int | None) -> bool:
        candidate, _ = rewrite(
            model, args, kwargs, passes, verify=False, policy=policy, disable=disable, fuel=fuel
        )
        return check(candidate)

    if good(None):
        return None
    if not good(0):
        raise NormfuseError(
            "the check fails before anything is rewritten: the capture itself, or the check, is at "
            "fault"
        )
    journal = _journal(model, args, kwargs, make_settings(passes, policy, disable))
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


def _outputs_and_gradients(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """Outputs, then all gradients as one vector, ordered by the parameters' names.

    One vector, because a gradient that is zero in theory (of a key's bias, say) is noise twice.
    """
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outs = pytree.tree_leaves(model(*args, **kwargs))
        torch.manual_seed(1)
        loss: Any = sum(
            (o * torch.randn(o.shape, dtype=torch.float64).to(o)).sum()
            for o in outs
            if isinstance(o, torch.Tensor) and o.requires_grad
        )
        named = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
        found: Sequence[Any] = [None] * len(named)
        if isinstance(loss, torch.Tensor) and named:
            found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    grads = [
        (torch.zeros_like(p) if g is None else g).flatten().cpu().double()
        for (_, p), g in zip(named, found, strict=True)
    ]
    values = [o.detach() if isinstance(o, torch.Tensor) else o for o in outs]
    return [*values, torch.cat(grads) if grads else torch.zeros(0)]


def _journal(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], settings: Settings
) -> list[tuple[str, str]]:
    gm = capture(model, args, kwargs)
    _, context = transform(
        gm, pytree.tree_leaves((args, kwargs)), settings, training=model.training
    )
    return list(context.journal)
