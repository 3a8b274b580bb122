"""The models that are measured, in plain PyTorch.

Every model takes its norm as a factory ``d -> nn.Module``, so that the *bound* of a row can be built:
the same model with its norms deleted (``nn.Identity``), which no rewrite of norms can beat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

Norm = Callable[[int], nn.Module]


def no_norm(d: int) -> nn.Module:
    return nn.Identity()


class Attention(nn.Module):
    """Multi-head attention on ``(batch, time, d)`` with separate projections."""

    def __init__(self, d: int, heads: int, bias: bool, causal: bool, rotary: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.rotary = heads, causal, rotary
        self.q, self.k, self.v, self.out = (nn.Linear(d, d, bias=bias) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        if self.rotary:
            q, k = rotate(q), rotate(k)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(a.transpose(1, 2).flatten(2))


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions on ``(batch, heads, time, head_dim)``."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** -(torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device).unsqueeze(1) * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class GeluMLP(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class SwiGLU(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        hidden = 8 * d // 3 // 32 * 32
        self.gate, self.up = (nn.Linear(d, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, d, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, d: int, norm: Norm, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(d), norm(d)
        self.attention, self.mlp = attention, mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Pre-norm decoder: ids ``(batch, time)`` to logits. ``style`` is ``"gpt"`` or ``"llama"``."""

    def __init__(
        self, norm: Norm, d: int, layers: int, heads: int, style: str, vocab: int = 4096
    ) -> None:
        super().__init__()
        gpt = style == "gpt"
        self.embed = nn.Embedding(vocab, d)
        self.positions = nn.Embedding(1024, d) if gpt else None
        self.blocks = nn.ModuleList(
            Block(
                d,
                norm,
                Attention(d, heads, bias=gpt, causal=True, rotary=not gpt),
                GeluMLP(d) if gpt else SwiGLU(d),
            )
            for _ in range(layers)
        )
        self.norm = norm(d)
        self.head = nn.Linear(d, vocab, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        if self.positions is not None:
            x = x + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ViT(nn.Module):
    """Vision transformer: images ``(batch, 3, size, size)`` to 1,000 class scores."""

    def __init__(
        self, norm: Norm, d: int, layers: int, heads: int, size: int = 224, patch: int = 16
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, d, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, d))
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, d) * 0.02)
        self.blocks = nn.ModuleList(
            Block(d, norm, Attention(d, heads, True, False, False), GeluMLP(d))
            for _ in range(layers)
        )
        self.norm = norm(d)
        self.head = nn.Linear(d, 1000)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), 1)
        x = x + self.positions[:, : x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


@dataclass(frozen=True)
class Model:
    """A measured model.

    Attributes:
        norm: the norm it is published with.
        build: from a norm factory to the module.
        kind: ``"text"`` (inputs are token ids) or ``"image"``.
        image_sizes: image sides standing in for sequence lengths.
    """

    name: str
    norm: Norm
    build: Callable[[Norm], nn.Module]
    kind: str = "text"

    def make(self, with_norms: bool = True) -> nn.Module:
        """The model, with gains and biases away from their initial values, in eval mode."""
        torch.manual_seed(0)
        model = self.build(self.norm if with_norms else no_norm)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                    for p in module.parameters(recurse=False):
                        p.add_(torch.randn_like(p) * 0.1)
        return model.eval()

    def inputs(self, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """One input of about ``tokens`` positions.

        Images are as large as their model takes them; ``tokens`` then is the batch size.
        """
        generator = torch.Generator().manual_seed(1)
        if self.kind == "image":
            return torch.randn(tokens, 3, 224, 224, generator=generator).to(dtype)
        return torch.randint(4096, (1, tokens), generator=generator)


def gpt(d: int, layers: int, heads: int) -> Callable[[Norm], nn.Module]:
    return lambda norm: Decoder(norm, d, layers, heads, "gpt")


def llama(d: int, layers: int, heads: int) -> Callable[[Norm], nn.Module]:
    return lambda norm: Decoder(norm, d, layers, heads, "llama")


MODELS = {
    m.name: m
    for m in (
        Model("gpt-192", nn.LayerNorm, gpt(192, 12, 3)),
        Model("gpt-384", nn.LayerNorm, gpt(384, 8, 6)),
        Model("gpt-768", nn.LayerNorm, gpt(768, 6, 12)),
        Model("llama-192", lambda d: nn.RMSNorm(d, eps=1e-6), llama(192, 12, 3)),
        Model("llama-384", lambda d: nn.RMSNorm(d, eps=1e-6), llama(384, 8, 6)),
        Model("llama-768", lambda d: nn.RMSNorm(d, eps=1e-6), llama(768, 6, 12)),
        Model("vit-192", nn.LayerNorm, lambda norm: ViT(norm, 192, 12, 3), kind="image"),
    )
}
