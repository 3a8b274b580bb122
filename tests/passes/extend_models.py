"""Small models and helpers of the extension tests."""

import torch
import torch.nn.functional as F
from normfuse import passes
from normfuse.passes import PassManager
from torch import nn


def stirred(model, seed=0):
    """Weights away from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def capture_(model, *args, dynamic=False, **kwargs):
    return passes.capture(model, args, kwargs, dynamic=dynamic)


def run_pass(gm, name, context=None, **options):
    _, report = PassManager([getattr(passes, name)(**options)], context).run(gm)
    return report


def rms(d):
    return nn.RMSNorm(d, eps=1e-6)


class Block(nn.Module):
    def __init__(self, d, norm=rms):
        super().__init__()
        self.norm, self.linear = norm(d), nn.Linear(d, d)

    def forward(self, x):
        return x + self.linear(self.norm(x))


class Two(nn.Module):
    """Two pre-norm blocks and a final norm."""

    def __init__(self, d, norm=rms):
        super().__init__()
        self.a, self.b, self.norm = Block(d, norm), Block(d, norm), norm(d)

    def forward(self, x):
        return self.norm(self.b(self.a(x)))


class Hidden(nn.Module):
    """A norm inside the branch, not on the stream."""

    def __init__(self, d):
        super().__init__()
        self.norm, self.inner = rms(d), rms(4)
        self.up, self.down = nn.Linear(d, 4), nn.Linear(4, d)

    def forward(self, x):
        return x + self.down(F.gelu(self.inner(F.gelu(self.up(self.norm(x))))))


class Attention(nn.Module):
    """Self-attention on a residual stream; ``groups`` query heads share a value head."""

    def __init__(self, d=16, heads=4, groups=1, mask="causal", rope=False, fused=False):
        super().__init__()
        self.heads, self.groups, self.mask, self.rope, self.fused = heads, groups, mask, rope, fused
        self.norm = rms(d)
        kv = d // groups
        if fused:
            self.qkv = nn.Linear(d, d + 2 * kv)
        else:
            self.q, self.k, self.v = nn.Linear(d, d), nn.Linear(d, kv), nn.Linear(d, kv)
        self.out = nn.Linear(d, d)

    def forward(self, x):
        h = self.norm(x)
        d, kv = x.shape[-1], x.shape[-1] // self.groups
        if self.fused:
            q, k, v = self.qkv(h).split([d, kv, kv], -1)
        else:
            q, k, v = self.q(h), self.k(h), self.v(h)
        q, k, v = (t.unflatten(-1, (-1, d // self.heads)).transpose(1, 2) for t in (q, k, v))
        n = x.shape[1]
        if self.rope:
            angle = torch.arange(n, device=x.device)[:, None].to(x.dtype) * 0.1
            q = q * angle.cos() + q.roll(1, -1) * angle.sin()
            k = k * angle.cos() + k.roll(1, -1) * angle.sin()
        keep = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        mask = None
        if self.mask == "bool":
            mask = keep
        elif self.mask == "additive":
            mask = torch.zeros(n, n, dtype=x.dtype, device=x.device).masked_fill(~keep, -1e9)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.mask == "causal", enable_gqa=self.groups > 1
        )
        return x + self.out(y.transpose(1, 2).flatten(2))
