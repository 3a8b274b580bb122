"""Plain-PyTorch models the runtime tests share."""

import torch
import torch.nn.functional as F
from normfuse.passes import ir
from normfuse.passes.canonical import canonicalize
from torch import nn


class Block(nn.Module):
    def __init__(self, d, norm, dropout):
        super().__init__()
        self.norm1, self.norm2 = norm(d), norm(d)
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(a.transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class Transformer(nn.Module):
    """Pre-norm decoder: token ids ``(batch, time)`` to ``{"logits", "loss"}``."""

    def __init__(self, d=16, layers=2, vocab=32, norm=nn.LayerNorm, dropout=0.0, tied=False):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList(Block(d, norm, dropout) for _ in range(layers))
        self.norm = norm(d)
        self.head = nn.Linear(d, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids, labels=None):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        out = {"logits": logits}
        if labels is not None:
            out["loss"] = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return out


def trained_like(model, seed=0):
    """Gains, biases and weights away from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * 0.2)
    return model


def ids(batch=2, time=6, vocab=32, seed=1):
    return torch.randint(0, vocab, (batch, time), generator=torch.Generator().manual_seed(seed))


def wrong_recognition(gm):
    """``canonicalize`` with a bug: it gets every epsilon wrong."""
    sites = canonicalize(gm)
    for node in ir.norm_nodes(gm):
        node.args = tuple(0.5 if isinstance(a, float) else a for a in node.args)
        node.kwargs = {k: 0.5 if k == "eps" else v for k, v in node.kwargs.items()}
    return sites


class Mixed(nn.Module):
    """Something of everything whose state may change behind a captured graph."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.a2 = nn.Linear(8, 8, bias=False)
        self.a2.weight = self.a.weight
        self.batch, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x, negate=False):
        y = self.b(self.drop(self.batch(self.a(self.norm(x)) + self.a2(x))))
        return -y if negate else y


def logits(m, *args, **kwargs):
    with torch.no_grad():
        return m(*args, **kwargs)["logits"]
