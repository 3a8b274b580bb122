"""``normfuse_state::hold``: the value of a state before it is overwritten, also for the backward.

AOTAutograd recomputes cheap operations in the backward. Of a state that the forward overwrites
(``copy_``) it keeps the tensor, not the value: a ``clone`` made before is recomputed from what was
written after, and gradients are silently wrong (torch 2.11 to 2.13). What it may not recompute is
kept; an operator that it does not know is.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("normfuse_state::hold", mutates_args=())
def hold(x: Tensor) -> Tensor:
    """A copy of ``x``, any shape and dtype, that the backward does not compute again."""
    return x.clone()


@hold.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


HOLD = torch.ops.normfuse_state.hold.default
