"""The activations that a product applies to its result, by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: In the kernels' numbering, with their formulas.
ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}
