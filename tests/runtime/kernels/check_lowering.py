"""Lowered graphs of whole models: which kernels they call, and that they compute the same."""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import interpreter
import pytest
import torch
import torch.nn.functional as F
from normfuse import passes
from normfuse.passes import ir, weights
from normfuse.passes.presets import resolve
from normfuse.runtime import lower_checks
from normfuse.runtime.lower import expand
from normfuse.runtime.lower_kernels import lower_to_kernels
from torch import nn

D, H = 24, 20


@pytest.fixture(autouse=True)
def kernels_on_cpu(monkeypatch):
    monkeypatch.setattr(lower_checks, "DEVICE", "cpu")


class Attend(nn.Module):
    """Post-LN with several readers and a residual: a LayerNorm that cannot lose its mean."""

    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.norm = norm(D, elementwise_affine=False)
        self.q, self.k, self.v = (nn.Linear(D, H) for _ in range(3))

    def forward(self, x):
        h = self.norm(x)
        return self.q(h) * 2 + self.k(h).relu() + self.v(h)


class Gated(nn.Module):
    """Two layers, one gating the other."""

    def __init__(self, act=F.silu, gate_first=True, norm=nn.RMSNorm, bias=False):
        super().__init__()
        self.norm = norm(D, eps=1e-5, elementwise_affine=False)
        self.gate, self.up = nn.Linear(D, H, bias=bias), nn.Linear(D, H, bias=bias)
        self.down, self.act, self.gate_first = nn.Linear(H, D), act, gate_first

    def forward(self, x):
        h = self.norm(x)
        gate, up = self.act(self.gate(h)), self.up(h)
        return x + self.down(gate * up if self.gate_first else up * gate)


class Merged(nn.Module):
    """One layer whose halves gate one another, however they are taken apart."""

    def __init__(self, how, act=F.gelu):
        super().__init__()
        self.norm, self.both = nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, 2 * H)
        self.how, self.act = how, act

    def forward(self, x):
        z = self.both(self.norm(x))
        if self.how == "glu":
            return F.glu(z)
        if self.how == "chunk":
            a, b = z.chunk(2, -1)
        elif self.how == "split":
            a, b = z.split(H, -1)
        else:
            a, b = z[..., :H], z[..., H:]
        return a * self.act(b) if self.how != "split" else self.act(a) * b


class Flattened(nn.Module):
    """Rows are flattened for a product with a weight ``[in, out]``, as in Conv1D."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D, elementwise_affine=False)
        self.weight, self.bias = nn.Parameter(torch.randn(D, H)), nn.Parameter(torch.randn(H))

    def forward(self, x):
        h = self.norm(x)
        z = torch.addmm(self.bias, h.view(-1, D), self.weight).view(*x.shape[:-1], H)
        return F.gelu(z, approximate="tanh")


class Compressed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, H)

    def forward(self, x):
        return self.layer(torch.ops.normfuse.crms_norm(x, None, None, 1e-5)).sigmoid()


class Added(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, H)

    def forward(self, x):
        stream = x + x.flip(0)
        return self.layer(self.norm(stream)), stream * 2


CASES = {
    "several readers": (Attend, ["norm_linear"] * 3),
    "pair": (Gated, ["norm_linear"]),
    "pair, gate second": (lambda: Gated(F.gelu, False), ["norm_linear"]),
    "pair with biases": (lambda: Gated(norm=nn.LayerNorm, bias=True), ["norm_linear"]),
    "chunk": (lambda: Merged("chunk"), ["norm_linear"]),
    "split": (lambda: Merged("split", F.silu), ["norm_linear"]),
    "slices": (lambda: Merged("slice", torch.sigmoid), ["norm_linear"]),
    "glu": (lambda: Merged("glu"), ["norm_linear"]),
    "flattened": (Flattened, ["norm_linear"]),
    "compressed": (Compressed, ["norm_linear"]),
    "add": (Added, ["norm_linear"]),
}


def lowered(model, x, preset="canonical", training=False):
    context = passes.Context(training=training, policy="always", device="cuda")
    gm = passes.capture(model, (x,), dynamic=False)
    gm, _ = passes.PassManager(resolve(preset), context).run(gm)
    done = lower_to_kernels(gm, "cpu", policy="always")
    ir.check(gm)
    return gm, [e.kernel for e in done if e.kernel]


def calls(gm):
    return " ".join(str(n.target) for n in gm.graph.nodes)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(name):
    make, wanted = CASES[name]
    torch.manual_seed(0)
    model = make()
    x = torch.randn(2, 3, D) + 0.3
    gm, kernels = lowered(model, x, training=True)
    assert kernels == wanted
    text = calls(gm)
    assert "normfuse." not in text
    assert text.count("aten.linear.default") == hasattr(model, "down")
    assert not any(f"aten.{op}." in text for op in ("silu", "gelu", "sigmoid", "glu", "chunk"))
    exact = copy.deepcopy(model).double()
    xs = [t.requires_grad_() for t in (x.clone(), x.double())]
    results = []
    for f, v in zip((gm, exact), xs, strict=True):
        y = f(v)
        y = y if isinstance(y, tuple) else (y,)
        loss = sum((t * torch.linspace(1, 2, t.shape[-1]).to(t)).square().sum() for t in y)
        grads = torch.autograd.grad(loss, [v, *f.parameters()])
        results.append([*y, *grads])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-4, atol=2e-4)


def test_after_exact_passes_and_expansion():
    """LayerNorm with gain and bias, folded, deferred and merged first; what is left is expanded."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(D), nn.RMSNorm(D, eps=1e-6)
            self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
            self.gate, self.up, self.down = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)

        def forward(self, x):
            q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
            x = x + self.out(F.scaled_dot_product_attention(q, k, v))
            h = self.norm2(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    torch.manual_seed(0)
    model = Block()
    for p in (model.norm1.weight, model.norm1.bias, model.norm2.weight):
        nn.init.normal_(p, 1.0, 0.3)
    x = torch.randn(2, 5, D)
    gm, kernels = lowered(model, x, preset="exact")
    assert kernels.count("norm_linear") == 2, kernels
    expand(gm)
    gm.recompile()
    torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-4)


def test_column_sums_are_in_the_weight_program():
    """They are computed once, follow the weights, and the merged weight itself is not copied."""
    torch.manual_seed(0)
    model = Merged("chunk")
    x = torch.randn(2, 3, D)
    gm, _ = lowered(model, x)
    flat, names = weights.lift(gm)
    program = weights.split(flat)
    assert program is not None and program.bytes == 2 * H * 4
    flat.recompile()
    leaves = [ir.attribute(gm, n) for n in names]
    cache = weights.WeightCache(program)

    def run():
        with torch.no_grad():
            (y,) = flat(*leaves, x, *cache([leaves[i] for i in program.leaves]))
        return y

    torch.testing.assert_close(run(), model(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.both.weight.mul_(-2)
        leaves[names.index("both.weight")].copy_(model.both.weight)
    torch.testing.assert_close(run(), model(x), rtol=1e-4, atol=1e-5)


def test_residual_add_and_statistic_in_one_kernel():
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, D))

        def forward(self, x):
            h = x + x.flip(0)
            rstd = torch.ops.normfuse.row_rstd(h, [-1], 1e-6, stat_dtype=torch.float32)
            return h * rstd, h

    x = torch.randn(4, D)
    gm, kernels = lowered(Stream(), x)
    assert kernels == ["add_row_rstd"]
    for ours, truth in zip(gm(x), Stream()(x), strict=True):
        torch.testing.assert_close(ours, truth)


class Mixed(nn.Module):
    """A float32 norm before bfloat16 layers: what autocast makes of any block."""

    def __init__(self, norm, bias=True):
        super().__init__()
        self.norm = norm(D, eps=1e-5, elementwise_affine=False)
        self.gate, self.up = nn.Linear(D, H, bias=bias), nn.Linear(D, H, bias=bias)
        self.out = nn.Linear(D, H, bias=bias)
        self.bfloat16()

    def forward(self, x):
        h = self.norm(x).bfloat16()
        return F.silu(self.gate(h)) * self.up(h) + self.out(h)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("how", ["canonical", "exact", "autocast"])
def test_float32_norm_before_bfloat16_layers(norm, how):
    torch.manual_seed(0)
    model, x = Mixed(norm, bias=how != "autocast"), torch.randn(2, 3, D) + 0.3
    truth = copy.deepcopy(model).double()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        if how == "autocast":
            model.float()
        gm, kernels = lowered(model, x, preset="canonical" if how == "autocast" else how)
        # merged to one layer first, where the preset does that
        assert kernels == ["norm_linear"] * (1 if how == "exact" else 2)
        product = next(n for n in gm.graph.nodes if "norm_linear" in str(n.target))
        assert ir.dtype(product.args[0]) == torch.float32
        assert ir.dtype(product.args[1]) == torch.bfloat16
        eager = model(x)
    y = gm(x)
    assert y.dtype == eager.dtype == torch.bfloat16

    def exact(x):
        f = F.layer_norm if norm is nn.LayerNorm else F.rms_norm
        h = f(x.double(), (D,), eps=1e-5)
        return F.silu(truth.gate(h)) * truth.up(h) + truth.out(h)

    interpreter.check(y, eager, exact(x), slack=2**-8)


def test_bfloat16_rows_before_a_float32_layer_are_declined():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(D, H)

        def forward(self, x):
            return self.layer(torch.ops.normfuse.layer_norm(x, [-1], stat_dtype=torch.float32))

    gm = passes.capture(Model(), (torch.randn(4, D).bfloat16(),), dynamic=False)
    done = lower_to_kernels(gm, "cpu", policy="always")
    assert any("are not multiplied exactly" in e.reason for e in done), done
    assert not any(e.kernel == "norm_linear" for e in done)


REFUSED = {
    "needs the normed tensor too": lambda h, w: (F.linear(h, w), h * 2),
    "rounds to torch.float64": lambda h, w: F.linear(h.double(), w.double()),
    "rows of torch.float32 before a torch.float16 layer may overflow": lambda h, w: F.linear(
        h.half(), w.half()
    ),
    "rounded to torch.bfloat16 before a torch.float32 layer": lambda h, w: F.linear(
        h.bfloat16().float(), w
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_say_why(reason):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(H, D))

        def forward(self, x):
            return REFUSED[reason](F.layer_norm(x, (D,)), self.w)

    gm = passes.capture(Model(), (torch.randn(2, D),), dynamic=False)
    done = lower_to_kernels(gm, "cpu", policy="always")
    assert any(reason in e.reason for e in done), done
    assert not any(e.kernel == "norm_linear" for e in done)


def test_a_gain_in_the_way_is_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(D), nn.Linear(D, H)

        def forward(self, x):
            return self.layer(self.norm(x))

    gm = passes.capture(Model(), (torch.randn(2, D),), dynamic=False)
    done = lower_to_kernels(gm, "cpu", policy="always")
    assert "a gain or a bias of its own" in done[0].reason and done[1].kernel == "norm"
