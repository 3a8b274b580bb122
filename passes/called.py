"""A call of the model beside its capture: what the graph has to give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .python_state import Watch


def called(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> list[Any] | None:
    """The flat results of ``model(*args, **kwargs)``; ``None`` if it cannot be called.

    The model, its buffers and Python state, and the inputs are afterwards as they were.
    """
    watch = Watch(model)
    held = [(m._buffers, dict(m._buffers)) for m in model.modules()]
    kept = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    args, kwargs = pytree.tree_map_only(
        torch.Tensor,
        lambda x: x.detach().clone().requires_grad_(x.requires_grad),
        (args, kwargs),
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            out = model(*args, **kwargs)
    except Exception:
        return None
    finally:
        watch.restore()
        for buffers, before in held:
            buffers.update(before)
        with torch.no_grad():
            for buffer, before in kept:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
    return [x.detach() if isinstance(x, torch.Tensor) else x for x in pytree.tree_leaves(out)]
