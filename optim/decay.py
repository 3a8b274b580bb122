"""How a parameter decays and moves: one operation, one rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def add_decayed(
    target: Tensor, update: Tensor, keep: Any, *, after: bool = False, cautious: bool = False
) -> None:
    """``target ← keep·target + update`` in place: one read and one write of ``target``, one rounding.

    Args:
        keep: a number, a 0-d tensor, a tensor with the dimensions of ``target``, or None for 1.
        after: the update decays, too.
        cautious: only entries that the update shrinks decay.
    """
    if keep is None:
        target.add_(update)
        return
    if after:
        update = update * keep
    if cautious:
        kept = torch.as_tensor(keep, dtype=computing_dtype(target), device=target.device)
        mask = torch.where(update * target <= 0, kept, torch.ones_like(kept))
        torch.addcmul(update, target, mask, out=target)
    elif isinstance(keep, Tensor) or target.itemsize < 4:
        # one-dimensional, so that it takes part in type promotion: bfloat16 would round it to 1
        kept = torch.as_tensor(keep, dtype=computing_dtype(target), device=target.device)
        torch.addcmul(update, target, kept.view(1) if kept.ndim == 0 else kept, out=target)
    else:
        torch.add(update, target, alpha=keep, out=target)


def computing_dtype(x: Tensor) -> torch.dtype:
    """What stages compute in, and in which a parameter moves before it is rounded."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
