"""Small plain-PyTorch models, one per residual-stream topology."""

import torch
import torch.nn.functional as F
from torch import nn


def randomize(model, seed=0, scale=0.4):
    """Gains, biases and means away from their initial values, so that nothing cancels by luck."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) * scale)
            p.add_(0.1)
    return model


class Attention(nn.Module):
    def __init__(self, d, heads=2, bias=True, qk_norm=False):
        super().__init__()
        self.heads = heads
        self.q, self.k = nn.Linear(d, d, bias=bias), nn.Linear(d, d, bias=bias)
        self.v, self.o = nn.Linear(d, d, bias=bias), nn.Linear(d, d, bias=bias)
        self.q_norm = nn.LayerNorm(d // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(d // heads) if qk_norm else nn.Identity()

    def forward(self, x, memory=None):
        memory = x if memory is None else memory

        def split(t):
            return t.unflatten(-1, (self.heads, -1))

        q = self.q_norm(split(self.q(x))).transpose(1, 2)
        k = self.k_norm(split(self.k(memory))).transpose(1, 2)
        v = split(self.v(memory)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, d, bias=True):
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * d, bias=bias), nn.Linear(2 * d, d, bias=bias)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Scale(nn.Module):
    """LayerScale."""

    def __init__(self, d):
        super().__init__()
        self.gain = nn.Parameter(torch.full((d,), 0.5))

    def forward(self, x):
        return x * self.gain


class Block(nn.Module):
    """Two branches; ``style`` says where the norms sit."""

    def __init__(self, d, style, affine, bias, dropout, layer_scale, mixer):
        super().__init__()
        self.style = style
        self.norm1 = nn.LayerNorm(d, elementwise_affine=affine)
        if style != "parallel":
            self.norm2 = nn.LayerNorm(d, elementwise_affine=affine)
        if style == "sandwich":
            self.post1 = nn.LayerNorm(d, elementwise_affine=affine)
            self.post2 = nn.LayerNorm(d, elementwise_affine=affine)
        self.mixer = Attention(d, bias=bias) if mixer == "attention" else Mlp(d, bias)
        self.mlp = Mlp(d, bias)
        self.scale1 = Scale(d) if layer_scale else nn.Identity()
        self.scale2 = Scale(d) if layer_scale else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        if self.style == "parallel":
            h = self.norm1(x)
            return x + self.branch1(h) + self.branch2(h)
        if self.style == "post":
            x = self.norm1(x + self.branch1(x))
            return self.norm2(x + self.branch2(x))
        if self.style == "sandwich":
            x = x + self.post1(self.branch1(self.norm1(x)))
            return x + self.post2(self.branch2(self.norm2(x)))
        x = x + self.branch1(self.norm1(x))
        return x + self.branch2(self.norm2(x))

    def branch1(self, h):
        return self.dropout(self.scale1(self.mixer(h)))

    def branch2(self, h):
        return self.dropout(self.scale2(self.mlp(h)))


class Toy(nn.Module):
    """A transformer (or MLP) with every choice that matters to a residual stream.

    Args:
        styles: one of ``pre``, ``post``, ``parallel``, ``sandwich`` per block.
        entry: ``tokens`` (ids), ``vectors`` (last dim 5, any rank), ``patches`` (images through a
            convolution, a class token and learned positions).
        tied: the head is the token table.
        tap: also return the stream before each block.
    """

    def __init__(
        self,
        d=8,
        styles=("pre", "pre"),
        entry="tokens",
        affine=True,
        bias=True,
        dropout=0.0,
        layer_scale=False,
        tied=False,
        tap=False,
    ):
        super().__init__()
        self.entry, self.tap = entry, tap
        if entry == "tokens":
            self.embed, self.place = nn.Embedding(11, d), nn.Embedding(9, d)
        elif entry == "patches":
            self.patch = nn.Conv2d(3, d, 4, stride=4, bias=bias)
            self.cls = nn.Parameter(torch.zeros(1, 1, d))
            self.place = nn.Parameter(torch.zeros(1, 5, d))
        else:
            self.embed = nn.Linear(5, d, bias=bias)
        self.drop = nn.Dropout(dropout)
        mixer = "mlp" if entry == "vectors" else "attention"
        self.blocks = nn.ModuleList(
            Block(d, s, affine, bias, dropout, layer_scale, mixer) for s in styles
        )
        self.norm = nn.LayerNorm(d, elementwise_affine=affine)
        self.head = nn.Linear(d, 11, bias=bias and not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        if self.entry == "tokens":
            x = self.embed(x) + self.place(torch.arange(x.shape[-1], device=x.device))
        elif self.entry == "patches":
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.place
        else:
            x = self.embed(x)
        x = self.drop(x)
        states = []
        for block in self.blocks:
            states.append(x)
            x = block(x)
        logits = self.head(self.norm(x))
        return (logits, *states) if self.tap else logits

    def example(self, seed=0, rank=3):
        """A tuple of inputs; ``rank`` counts for the entry ``vectors``."""
        g = torch.Generator().manual_seed(seed)
        if self.entry == "tokens":
            return (torch.randint(11, (2, 6), generator=g),)
        dtype = next(self.parameters()).dtype
        shape = (2, 3, 8, 8) if self.entry == "patches" else (*(3, 2, 4)[: rank - 1], 5)
        return (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype),)


class EncoderDecoder(nn.Module):
    """Pre-norm encoder and decoder with cross attention; the memory is normed once."""

    def __init__(self, d=8):
        super().__init__()
        self.source, self.target = nn.Embedding(11, d), nn.Embedding(11, d)
        self.enc_norm, self.enc_mlp = nn.LayerNorm(d), Mlp(d)
        self.enc_final = nn.LayerNorm(d)
        self.dec_norm, self.cross = nn.LayerNorm(d), Attention(d)
        self.dec_final = nn.LayerNorm(d)
        self.head = nn.Linear(d, 11)

    def forward(self, src, tgt):
        m = self.source(src)
        m = self.enc_final(m + self.enc_mlp(self.enc_norm(m)))
        y = self.target(tgt)
        y = y + self.cross(self.dec_norm(y), m)
        return self.head(self.dec_final(y))

    def example(self):
        g = torch.Generator().manual_seed(0)
        return (torch.randint(11, (2, 5), generator=g), torch.randint(11, (2, 4), generator=g))


class LowPrecision(nn.Module):
    """A bfloat16 stream whose norms compute in float32, with in-place residual adds."""

    def __init__(self, d=8, dtype=torch.bfloat16):
        super().__init__()
        self.embed = nn.Embedding(11, d, dtype=dtype)
        self.mlps = nn.ModuleList(Mlp(d).to(dtype) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.head = nn.Linear(d, 11, dtype=dtype)

    def forward(self, ids):
        x = self.embed(ids) * 1.0
        for norm, mlp in zip(self.norms, self.mlps, strict=False):
            x += mlp(norm(x.float()).to(x.dtype))
        return self.head(self.norms[-1](x.float()).to(x.dtype))

    def example(self):
        return (torch.arange(10).reshape(2, 5),)
