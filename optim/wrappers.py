"""Wrappers over any optimizer, and width transfer of weight decay.

Each wrapper lets the inner optimizer step and then corrects the result; learning rates, schedules,
states and checkpoints stay the inner one's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from .decay import computing_dtype
from .delegate import Delegate
from .groups import observing


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for g in optimizer.param_groups for p in g["params"]]


def _norm(p: Tensor) -> Tensor:
    """Frobenius norm in float64: squares of float32 numbers overflow."""
    return torch.linalg.vector_norm(p.detach(), dtype=torch.float64)


class NormalizeAndProject(Delegate):
    """Keep hidden weights at their initial Frobenius norm (Normalize-and-Project, 2407.01800).

    Meant for networks that normalize before every non-linearity, where the norm of a weight only
    sets its effective learning rate. Schedule the learning rate explicitly: it no longer decays by
    itself.

    Args:
        inner: the optimizer.
        every: project after every so many steps.
        params: which parameters; default all of two or more dimensions except those in groups with
            role ``"head"`` (see :func:`normfuse.optim.param_groups`). Zero-initialized ones are left
            alone.
    """

    def __init__(
        self, inner: Optimizer, *, every: int = 1, params: Iterable[Tensor] | None = None
    ) -> None:
        super().__init__(inner)
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every, self.count = every, 0
        if params is None:
            groups = [g for g in inner.param_groups if g.get("role") != "head"]
            params = [p for g in groups for p in g["params"] if p.ndim >= 2]
        self.projected = list(params)
        with torch.no_grad():
            self.norms = [_norm(p) for p in self.projected]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = self.inner.step(closure) if closure is not None else self.inner.step()
        self.count += 1
        if self.count % self.every == 0:
            for p, norm in zip(self.projected, self.norms, strict=True):
                now = _norm(p)
                usable = (now > 0) & (norm > 0) & torch.isfinite(now)
                ratio = torch.where(usable, norm / now, 1.0).to(computing_dtype(p))
                p.copy_(p * ratio.view(1))  # one-dimensional: half precision would round the ratio
        return loss

    def extra_state(self) -> dict[str, Any]:
        return {"norms": list(self.norms), "count": self.count}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if len(state["norms"]) != len(self.norms):
            raise ValueError(
                f"the state holds {len(state['norms'])} norms, {len(self.norms)} are projected"
            )
        self.norms, self.count = list(state["norms"]), int(state["count"])


class CautiousWeightDecay(Delegate):
    """Decoupled decay only where the step already shrinks the weight (``Δp·p ≤ 0``).

    Args:
        inner: an optimizer whose own weight decay is 0.
        weight_decay: multiplied by each group's learning rate.
    """

    def __init__(self, inner: Optimizer, weight_decay: float) -> None:
        super().__init__(inner)
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight decay should be >= 0 but is: {weight_decay}")
        if any(float(g.get("weight_decay", 0.0)) != 0.0 for g in inner.param_groups):
            raise ValueError(
                "the inner optimizer already decays weights; set its weight_decay to 0"
            )
        self.decay = weight_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        before = [p.detach().clone() for p in _parameters(self.inner)]
        loss = self.inner.step(closure) if closure is not None else self.inner.step()
        old = iter(before)
        for group in self.inner.param_groups:
            rate = group["lr"] * self.decay
            for p in group["params"]:
                was = next(old)
                if p.grad is not None:
                    p.sub_(torch.where((p - was) * was <= 0, was * rate, 0.0))
        return loss


class SafeStep(Delegate):
    """Shorten a step that leaves the region where the softmax loss is analytic along it.

    Along the proposed step ``d`` the loss of a sample has complex singularities no nearer than
    ``π/Δ``, ``Δ`` the spread of the directional derivatives of its logits. The step is scaled by
    ``min(1, r·π/max Δ)``: one forward-mode product per step (*Ghosts of Softmax*). Where ``Δ`` is not
    finite the parameters stay where they were.

    Args:
        inner: the optimizer; its states advance as if the whole step had been taken.
        model: the module whose parameters ``inner`` updates.
        radius: ``r``; 1 is best in the paper, 0.5 safe.
        method: ``"jvp"``, or ``"finite_difference"`` (two forward passes; for models with operators
            that have no forward-mode derivative).

    Attributes:
        scale: the factor applied to the last step.
    """

    def __init__(
        self, inner: Optimizer, model: nn.Module, *, radius: float = 1.0, method: str = "jvp"
    ) -> None:
        super().__init__(inner)
        if method not in ("jvp", "finite_difference"):
            raise ValueError(f"method must be 'jvp' or 'finite_difference', got {method!r}")
        if not radius > 0:
            raise ValueError(f"radius must be positive, got {radius}")
        self.model, self.radius, self.method = model, radius, method
        self.scale = 1.0

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, args: Sequence[Any] = ()
    ) -> Any:
        """Step; ``args`` are the model's inputs, whose logits (the output, or its ``logits``)
        bound the step. The class dimension is the last."""
        if not args:
            raise ValueError("SafeStep.step needs the batch: step(args=(inputs,))")
        owned = {id(p) for p in _parameters(self.inner)}
        named = {n: p for n, p in self.model.named_parameters() if id(p) in owned}
        if len(named) < len(owned):
            raise ValueError("the optimizer updates parameters that the model does not hold")
        before = {n: p.detach().clone() for n, p in named.items()}
        loss = self.inner.step(closure) if closure is not None else self.inner.step()
        delta = {n: p.detach() - before[n] for n, p in named.items()}
        for n, p in named.items():
            p.copy_(before[n])
        directional = self._derivative(before, delta, args)
        spread = (directional.amax(-1) - directional.amin(-1)).max()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(spread, op=torch.distributed.ReduceOp.MAX)
        scale = (self.radius * math.pi / spread.clamp(min=1e-12)).clamp(max=1.0)
        scale = torch.where(torch.isfinite(spread), scale, 0.0)
        for n, p in named.items():
            p.add_(torch.where(scale > 0, delta[n] * scale.to(p.dtype), 0.0))
        self.scale = float(scale)
        return loss

    def _derivative(
        self, at: dict[str, Tensor], along: dict[str, Tensor], args: Sequence[Any]
    ) -> Tensor:
        def logits(params: dict[str, Tensor]) -> Tensor:
            out = torch.func.functional_call(self.model, params, tuple(args))
            return out.logits if hasattr(out, "logits") else out

        with observing(self.model):
            if self.method == "jvp":
                with sdpa_kernel(SDPBackend.MATH):  # the others have no forward-mode derivative
                    return torch.func.jvp(logits, (at,), (along,))[1]
            h = 1e-3
            ahead = logits({n: p + h * along[n] for n, p in at.items()})
            behind = logits({n: p - h * along[n] for n, p in at.items()})
            return (ahead - behind) / (2 * h)


def scale_weight_decay(
    groups: Iterable[dict[str, Any]], ratio: float, *, scale_lr: bool = True
) -> list[dict[str, Any]]:
    """Groups tuned at one width, for a model ``ratio`` times as wide (2510.15262).

    In AdamW's steady state the top singular value of a matrix goes as ``√(lr/λ)·width^0.75``. With
    μP's ``lr ∝ 1/width`` the gain of a layer stays put if ``λ ∝ √width``: matrices get
    ``lr/ratio`` and ``weight_decay·√ratio``; vectors keep their rate and no decay.

    Args:
        groups: parameter groups with ``lr`` and ``weight_decay``, matrices and vectors apart.
        ratio: target width over tuned width.
        scale_lr: also divide the learning rate of matrices (leave out if μP is applied elsewhere).

    Returns:
        New groups; the input is not changed.

    Raises:
        ValueError: a group mixes matrices and vectors, or is updated by a member whose steady state
            this law does not describe.
    """
    if not ratio > 0:
        raise ValueError(f"ratio must be positive, got {ratio}")
    out = []
    for i, group in enumerate(groups):
        group = dict(group)
        if group.get("algorithm", "adamw") not in ("adamw", "adamp"):
            raise ValueError(
                f"group {i} uses {group['algorithm']}: the law holds for Adam-like updates only"
            )
        tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        matrices = [p.ndim >= 2 for p in tensors]
        if any(matrices) and not all(matrices):
            raise ValueError(f"group {i} mixes matrices and vectors; give them groups of their own")
        if "lr" not in group or "weight_decay" not in group:
            raise ValueError(f"group {i} must state lr and weight_decay")
        if matrices and matrices[0] and group.get("role") != "embedding":
            group["weight_decay"] = group["weight_decay"] * math.sqrt(ratio)
            if scale_lr:
                group["lr"] = group["lr"] / ratio
        else:
            group["weight_decay"] = 0.0
        out.append(group)
    return out
