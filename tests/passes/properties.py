"""What every exact pass must satisfy, and generators of small models to try it on."""

import cProfile

import sympy
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from normfuse import passes
from normfuse.passes import Context, PassManager, ir
from normfuse.passes.verify import flat_double
from stream_models import Toy, randomize
from torch import nn

TOLERANCE = 1e-10


# -- what must hold


def proves(pairs):
    """Every pair is equal, and stops being equal when one symbol of one side changes."""
    assert pairs
    for left, right in pairs:
        difference = (left - right).applyfunc(lambda e: sympy.simplify(sympy.expand(e)))
        assert difference == sympy.zeros(*left.shape)
        symbol = min(left.free_symbols, key=str)
        changed = (left - right.subs(symbol, symbol + 1)).applyfunc(sympy.simplify)
        assert changed != sympy.zeros(*left.shape)


def calls(f):
    """How many calls ``f()`` makes: what it costs, whatever else the machine does meanwhile."""
    profile = cProfile.Profile()
    profile.runcall(f)
    return sum(entry.callcount for entry in profile.getstats())


def rewrite(model, args, *chosen, **context):
    """Capture ``model`` and run passes on it; returns the graph and the report."""
    gm = passes.capture(model, args)
    return PassManager(chosen, Context(**context)).run(gm)


def leaves(out):
    return list(out) if isinstance(out, (tuple, list)) else [out]


def values_and_gradients(f, model, args):
    """Outputs, and gradients of a fixed random functional by parameter name and input."""
    args = tuple(a.clone().requires_grad_(a.is_floating_point()) for a in args)
    model.zero_grad()
    torch.manual_seed(0)
    outs = leaves(f(*args))
    g = torch.Generator().manual_seed(1)
    loss = sum(
        (o * torch.randn(o.shape, generator=g, dtype=torch.float64).to(o)).sum() for o in outs
    )
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    grads |= {f"input {i}": a.grad for i, a in enumerate(args) if a.grad is not None}
    return [o.detach() for o in outs], grads


def assert_same(model, gm, args):
    """Same values and gradients in float64, to 1e-10 relative."""
    want, want_grads = values_and_gradients(model, model, args)
    got, got_grads = values_and_gradients(gm, model, args)
    for w, g in zip(want, got, strict=True):
        assert w.shape == g.shape and w.dtype == g.dtype
        assert (w - g).abs().max() <= TOLERANCE * w.abs().max().clamp_min(1e-3)
    assert want_grads.keys() == got_grads.keys()
    scale = max(g.abs().max().item() for g in want_grads.values())
    for name, w in want_grads.items():
        error = (got_grads[name] - w).abs().max().item()
        assert error <= TOLERANCE * max(scale, 1e-3), name


def assert_idempotent(gm, *chosen, **context):
    """A second run changes nothing."""
    code = gm.code
    gm, again = PassManager(chosen, Context(**context)).run(gm)
    assert not again.applied and gm.code == code


def low_precision_errors(model, args, *chosen, **context):
    """Root-mean-square errors against float64 of eager and of the rewritten graph."""
    exact = flat_double(passes.capture(model, args), args)
    gm, report = rewrite(model, args, *chosen, **context)
    with torch.no_grad():
        eager, ours = leaves(model(*args)), leaves(gm(*args))

    def error(outs):
        total = sum((o.double() - e).square().sum() for o, e in zip(outs, exact, strict=True))
        return (total / sum(e.square().sum() for e in exact)).sqrt().item()

    return error(eager), error(ours), report


def count(gm, *packets):
    return sum(ir.is_call(n, *packets) for n in gm.graph.nodes)


# -- models: a norm and every spelling of a linear reader


class PlusOne(nn.Module):
    """RMSNorm whose gain is stored around zero, computed in float32."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d))

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        h = x.to(wide)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (h * (1.0 + self.weight.to(wide))).to(x.dtype)


class Bounded(nn.Module):
    """``F.normalize(x)·√d``, as vision and diffusion models write RMSNorm."""

    def __init__(self, d, affine=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d)) if affine else None

    def forward(self, x):
        y = F.normalize(x, dim=-1) * x.shape[-1] ** 0.5
        return y if self.weight is None else y * self.weight


def make_norm(kind, d):
    return {
        "bounded": lambda: Bounded(d),
        "bounded_plain": lambda: Bounded(d, affine=False),
        "layer": lambda: nn.LayerNorm(d),
        "layer_no_bias": lambda: nn.LayerNorm(d, bias=False),
        "rms": lambda: nn.RMSNorm(d, eps=1e-6),
        "plus_one": lambda: PlusOne(d),
        "plain": lambda: nn.RMSNorm(d, eps=1e-6, elementwise_affine=False),
    }[kind]()


class Reader(nn.Module):
    """A linear map of ``(batch, …, d)`` written in one of many ways."""

    KINDS = (
        "linear",
        "addmm",
        "matmul",
        "transposed",
        "experts",
        "stack",
        "conv",
        "grouped_conv",
        "select",
        "mean",
        "heads",
        "dropout",
    )
    #: linear, one row in and one row out, no stack
    ROWS = ("linear", "addmm", "matmul", "transposed", "select", "dropout")

    def __init__(self, kind, d, out, bias):
        super().__init__()
        self.kind = kind
        shape = {
            "addmm": (d, out),
            "matmul": (d, out),
            "experts": (3, d, out),
            "stack": (2, d, out),
        }.get(kind, (out, d))
        if "conv" in kind:
            groups = 2 if kind == "grouped_conv" else 1
            self.conv = nn.Conv1d(d, 4, 1 if groups == 1 else 2, groups=groups, bias=bias)
            return
        self.weight = nn.Parameter(torch.zeros(shape))
        width = (3, 1, out) if kind == "experts" else (out,)
        has_bias = bias and kind not in ("matmul", "transposed", "stack")
        self.bias = nn.Parameter(torch.zeros(width)) if has_bias or kind == "addmm" else None

    def forward(self, h):
        w, b = getattr(self, "weight", None), getattr(self, "bias", None)
        if "conv" in self.kind:
            rows = h.flatten(1, -2) if h.dim() > 2 else h.unsqueeze(0)
            return self.conv(rows.transpose(1, 2))
        if self.kind == "addmm":
            flat = torch.addmm(b, h.reshape(-1, h.shape[-1]), w)
            return flat.view(*h.shape[:-1], w.shape[1])
        if self.kind == "matmul":
            return h @ w
        if self.kind == "transposed":
            return torch.matmul(h, w.t())
        if self.kind == "experts":
            rows = h.reshape(1, -1, h.shape[-1]).expand(3, -1, -1)
            return torch.bmm(rows, w) if b is None else torch.baddbmm(b, rows, w)
        if self.kind == "stack":
            return h.flatten(0, -2) @ w
        if self.kind == "select":
            h = h[:, 0] if h.dim() > 2 else h
        elif self.kind == "mean":
            h = h.mean(0)
        elif self.kind == "heads":
            h = h.unflatten(-1, (2, -1)).transpose(-2, -3).transpose(-2, -3).flatten(-2)
        elif self.kind == "dropout":
            h = F.dropout(h, 0.3, self.training).contiguous()
        return F.linear(h, w, b)


class NormAndReaders(nn.Module):
    """A norm whose result goes to several readers; the outputs are those of the readers."""

    def __init__(self, norm="layer", readers=("linear",), d=4, bias=True):
        super().__init__()
        self.norm = make_norm(norm, d)
        self.readers = nn.ModuleList(Reader(kind, d, 3 + i, bias) for i, kind in enumerate(readers))
        self.d = d

    def forward(self, x):
        h = self.norm(x)
        return tuple(torch.tanh(r(h)) for r in self.readers)

    def example(self, rank=3, seed=0):
        g = torch.Generator().manual_seed(seed)
        shape = {2: (5,), 3: (2, 5), 4: (2, 3, 2)}[rank]
        x = torch.randn(*shape, self.d, generator=g, dtype=torch.float64)
        return (x.to(next(self.parameters()).dtype),)


@st.composite
def norms_and_readers(
    draw, norms=("layer", "layer_no_bias", "rms", "plus_one", "bounded"), kinds=Reader.KINDS
):
    """``(model in float64, args, its norm, its readers' kinds)``."""
    norm = draw(st.sampled_from(norms))
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3))
    model = NormAndReaders(norm, chosen, draw(st.sampled_from([4, 6])), draw(st.booleans()))
    model = randomize(model.double(), seed=draw(st.integers(0, 99))).eval()
    return model, model.example(draw(st.sampled_from([2, 3, 4]))), norm, chosen


@st.composite
def toys(draw):
    """``(model in float64, args)``: residual-stream topologies of :class:`Toy`."""
    entry = draw(st.sampled_from(["tokens", "vectors", "patches"]))
    model = Toy(
        d=draw(st.sampled_from([4, 6, 8])),
        styles=draw(
            st.sampled_from([("pre", "pre"), ("parallel", "pre"), ("sandwich",), ("post", "pre")])
        ),
        entry=entry,
        affine=draw(st.booleans()),
        bias=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.3])),
        layer_scale=draw(st.booleans()),
        tied=entry == "tokens" and draw(st.booleans()),
    )
    rank = draw(st.integers(2, 4))
    model = randomize(model.double(), seed=draw(st.integers(0, 99))).eval()
    return model, model.example(rank=rank)
