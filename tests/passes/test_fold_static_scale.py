"""FoldStaticScale: LayerScale, gates, constant multipliers; before, behind, into norms."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from normfuse.passes import ir
from normfuse.passes.exact.fold_static_scale import FoldStaticScale
from properties import assert_idempotent, assert_same, count, low_precision_errors, proves, rewrite
from stream_models import Toy, randomize
from torch import nn

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_identity():
    proves(FoldStaticScale.identity())


def multiplications(gm):
    return [
        n
        for n in gm.graph.nodes
        if ir.is_call(n, aten.mul, aten.div) and not n.meta.get("weight_program")
    ]


class Scaled(nn.Module):
    """A linear op scaled before or behind, by a number, a scalar weight or a weight per channel."""

    def __init__(self, layer, scale, behind, divides, view, bias=True):
        super().__init__()
        self.layer_kind, self.behind, self.divides, self.view = layer, behind, divides, view
        d, out = 4, 6
        if layer == "linear":
            self.layer = nn.Linear(d, out, bias=bias)
        elif layer == "conv":
            self.layer = nn.Conv1d(d, out, 3, padding=1, groups=2, bias=bias)
        elif layer == "conv_transpose":
            self.layer = nn.ConvTranspose1d(d, out, 3, groups=2, bias=bias)
        else:
            self.layer = nn.Parameter(torch.randn(d, out))
        n = out if behind else d
        channels_first = "conv" in layer
        self.scale = {
            "number": -0.7,
            "scalar": nn.Parameter(torch.tensor(1.5)),
            "one": nn.Parameter(torch.full((1, 1), 1.5)),
            "vector": nn.Parameter(torch.rand(n, 1) if channels_first else torch.rand(n)),
        }[scale]

    def times(self, h):
        scale = self.scale
        return h / scale if self.divides else scale * h

    def forward(self, x):
        x = x.transpose(1, 2) if "conv" in self.layer_kind else x
        x = torch.tanh(x)
        if not self.behind:
            x = self.times(x)
        y = x @ self.layer if self.layer_kind == "matmul" else self.layer(x)
        if self.behind:
            y = self.times(y.contiguous().clone() if self.view else y)
        return torch.tanh(y)


@settings(max_examples=24, deadline=None, derandomize=True)
@given(
    st.sampled_from(["linear", "matmul", "conv", "conv_transpose"]),
    st.sampled_from(["number", "scalar", "one", "vector"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_same_function_and_gradients(layer, scale, behind, divides, view, bias):
    model = randomize(Scaled(layer, scale, behind, divides, view, bias).double())
    args = (torch.randn(2, 5, 4).double(),)
    gm, report = rewrite(model, args, FoldStaticScale())
    assert [name for _, name in report.applied] == ["fold_static_scale"]
    assert not multiplications(gm)
    assert_same(model, gm, args)
    assert_idempotent(gm, FoldStaticScale())


def test_layer_scale_everywhere():
    model = randomize(Toy(layer_scale=True).double().eval())
    args = model.example()
    gm, report = rewrite(model, args, FoldStaticScale())
    assert [k for k, _ in report.applied] == [
        f"blocks.{i}.scale{j}.scale" for i in (0, 1) for j in (1, 2)
    ]
    assert {s.kind for s in report.sites} == {"layer_norm", "scale"}
    assert_same(model, gm, args)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6, eps=1e-6)])
@pytest.mark.parametrize("vector", [False, True])
def test_into_a_norms_gain(norm, vector):
    class Depth(nn.Module):
        """The factor 1/√ℓ of LayerNorm Scaling, before a reader that is not linear too."""

        def __init__(self):
            super().__init__()
            self.norm, self.fc = norm, nn.Linear(6, 3)
            self.gain = nn.Parameter(torch.rand(6)) if vector else 3**-0.5

        def forward(self, x):
            h = self.norm(x) * self.gain
            return self.fc(h) * torch.sigmoid(h.mean(-1, keepdim=True))

    model = randomize(Depth().double())
    args = (torch.randn(2, 5, 6).double(),)
    gm, report = rewrite(model, args, FoldStaticScale())
    scaled = [k for k, name in report.applied if name == "fold_static_scale"]
    assert len(scaled) == 1 and not multiplications(gm)[1:]
    assert_same(model, gm, args)


@pytest.mark.parametrize("other", ["linear", "conv"])
def test_norm_without_gain_passes_it_to_the_readers(other):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)
            self.b = nn.Linear(4, 2) if other == "linear" else nn.Conv1d(4, 2, 3, padding=1)

        def forward(self, x):
            h = F.rms_norm(x, (4,)) * 0.5
            return self.a(h).sum(), self.b(h if other == "linear" else h.transpose(1, 2))

    model = randomize(Plain().double())
    args = (torch.randn(2, 5, 4).double(),)
    gm, report = rewrite(model, args, FoldStaticScale())
    assert len(report.applied) == 1 and not multiplications(gm)
    assert_same(model, gm, args)


def test_query_scaling_goes_into_the_projection():
    class Query(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            q = self.q(x).view(2, -1, 2, 4).transpose(1, 2) * 4**-0.5
            k = self.k(x).view(2, -1, 2, 4).transpose(1, 2)
            return (q @ k.transpose(-1, -2)).softmax(-1)

    model = randomize(Query().double())
    args = (torch.randn(2, 5, 8).double(),)
    gm, report = rewrite(model, args, FoldStaticScale())
    assert len(report.applied) == 1 and not multiplications(gm)
    assert_same(model, gm, args)


def test_per_head_scale_is_tiled():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.s = nn.Linear(8, 8), nn.Parameter(torch.rand(4))

        def forward(self, x):
            return torch.tanh(self.q(x).unflatten(-1, (2, 4)) * self.s)

    model = randomize(Heads().double())
    args = (torch.randn(2, 5, 8).double(),)
    gm, report = rewrite(model, args, FoldStaticScale())
    assert report.applied
    assert_same(model, gm, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_working_precision(dtype):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.s = nn.Parameter(torch.rand(64) + 0.5)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x) * self.s)) * 0.3

    model = randomize(Model(), scale=0.1).to(dtype)
    args = (torch.randn(64, 64).to(dtype),)
    eager, ours, report = low_precision_errors(model, args, FoldStaticScale())
    assert len(report.applied) == 2 and ours <= 1.5 * eager


def test_a_promoting_scale_stays_a_cast():
    class Promoting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8, dtype=torch.bfloat16)
            self.s = nn.Parameter(torch.rand(8))

        def forward(self, x):
            return self.fc(x) * self.s

    model, args = Promoting(), (torch.randn(4, 8).bfloat16(),)
    gm, report = rewrite(model, args, FoldStaticScale())
    assert report.applied and gm(*args).dtype == torch.float32


# -- chains, and norms whose statistics are fixed


STEPS = {
    "times": lambda m, x: x * m.g,
    "over": lambda m, x: x / m.sd,
    "less": lambda m, x: x - m.mu,
    "plus": lambda m, x: m.b + x,
    "half": lambda m, x: x / 2,
    "scalar": lambda m, x: x * m.c,
    "scalar_shift": lambda m, x: x + m.c,
    "one": lambda m, x: x - 0.5,
    "addcmul": lambda m, x: torch.addcmul(m.b, m.g, x),
    "addcdiv": lambda m, x: torch.addcdiv(m.b, x, m.sd),
}


class Chain(nn.Module):
    """Fixed maps in a row before or behind a layer, as norms with fixed statistics are written."""

    def __init__(self, steps, layer="linear", behind=False, bias=True):
        super().__init__()
        self.steps, self.behind, d, out = steps, behind, 4, 6
        self.conv = layer == "conv"
        self.layer = {
            "linear": lambda: nn.Linear(d, out, bias=bias),
            "conv": lambda: nn.Conv1d(d, out, 2, groups=2, bias=bias),
        }[layer]()
        n = (out if behind else d, *([1] * self.conv))
        self.g, self.b = nn.Parameter(torch.rand(n)), nn.Parameter(torch.rand(n))
        self.c = nn.Parameter(torch.tensor(1.3))
        self.register_buffer("mu", torch.rand(n))
        self.register_buffer("sd", torch.rand(n) + 0.5)

    def fixed(self, x):
        for step in self.steps:
            x = STEPS[step](self, x)
        return x

    def forward(self, x):
        x = torch.tanh(x.transpose(1, 2) if self.conv else x)
        x = self.fixed(self.layer(x)) if self.behind else self.layer(self.fixed(x))
        return torch.tanh(x)


def additions(gm):
    ops = (aten.add, aten.sub, aten.addcmul, aten.addcdiv)
    return [n for n in gm.graph.nodes if ir.is_call(n, *ops) and not n.meta.get("weight_program")]


@settings(max_examples=24, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4),
    st.sampled_from(["linear", "conv"]),
    st.booleans(),
    st.integers(0, 9),
)
def test_chains_fold_whole_before_a_layer(steps, layer, bias, seed):
    torch.manual_seed(seed)
    model = Chain(steps, layer, bias=bias).double().eval()
    args = (torch.randn(2, 5, 4).double(),)
    gm, report = rewrite(model, args, FoldStaticScale())
    assert len(report.applied) == len(steps) and not report.refused
    assert not multiplications(gm) and not additions(gm)
    assert_same(model, gm, args)
    assert_idempotent(gm, FoldStaticScale())


@pytest.mark.parametrize("layer", ["linear", "conv"])
@pytest.mark.parametrize(
    "steps", [["less", "over", "times", "plus"], ["addcmul"], ["half", "times"], ["plus", "half"]]
)
def test_chains_fold_whole_behind_a_layer(steps, layer):
    model = Chain(steps, layer, behind=True, bias=len(steps) % 2 == 0).double().eval()
    args = (torch.randn(2, 5, 4).double(),)
    gm, report = rewrite(model, args, FoldStaticScale())
    assert len(report.applied) == len(steps)
    assert not multiplications(gm) and not additions(gm)
    assert_same(model, gm, args)
    assert_idempotent(gm, FoldStaticScale())


def test_a_chain_that_cannot_fold_says_so_for_every_op():
    class Padded(Chain):
        def __init__(self):
            super().__init__(["less", "over"], "conv")
            self.layer = nn.Conv1d(4, 6, 3, padding=1)

    model, args = Padded().double().eval(), (torch.randn(2, 5, 4).double(),)
    gm, report = rewrite(model, args, FoldStaticScale())
    # the division folds; the zeros around the input are no multiple of the mean
    assert [k for k, _ in report.applied] == ["graph.scale"] and not multiplications(gm)
    assert [k for k, _, _ in report.refused] == ["graph.shift"]
    assert "pads its input with zeros" in report.refused[0][2]
    assert_same(model, gm, args)
    assert_idempotent(gm, FoldStaticScale())


def test_a_shift_in_low_precision_is_rounded_once():
    model = Chain(["less", "over", "times", "plus"]).bfloat16().eval()
    args = (torch.randn(64, 5, 4).bfloat16(),)
    eager, ours, report = low_precision_errors(model, args, FoldStaticScale())
    assert len(report.applied) == 4 and ours <= 1.5 * eager


def test_tables_of_positions_are_no_sites():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
            self.table = nn.Parameter(torch.rand(5, 4))

        def forward(self, x):
            return self.out(self.fc(x) + self.table)

    gm, report = rewrite(Positions().eval(), (torch.randn(2, 5, 4),), FoldStaticScale())
    assert not report.sites and len(additions(gm)) == 1


def test_a_shift_does_not_copy_a_tied_weight():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mu = nn.Embedding(11, 4), nn.Parameter(torch.rand(4))

        def forward(self, ids):
            return F.linear(torch.tanh(self.embed(ids)) - self.mu, self.embed.weight)

    model, args = Tied().double(), (torch.arange(5),)
    gm, report = rewrite(model, args, FoldStaticScale())
    assert len(report.applied) == 1 and not additions(gm)
    assert_same(model, gm, args)


# -- left alone


@pytest.mark.parametrize(
    "function",
    [
        lambda y: 0.5 * y * (1 + torch.tanh(0.7978845608 * (y + 0.044715 * y**3))),
        lambda y: torch.relu(y) * 2.0,
        lambda y: y * torch.sigmoid(1.702 * y),
        lambda y: (y @ y.transpose(-1, -2)) * 0.5,
    ],
)
def test_arithmetic_of_activations_is_no_site(function):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return torch.sin(function(self.fc(x)))

    gm, report = rewrite(Model().eval(), (torch.randn(3, 4),), FoldStaticScale())
    assert not report.sites and multiplications(gm)


def test_shared_results_are_refused():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.s = nn.Linear(4, 4), nn.Parameter(torch.rand(4))

        def forward(self, x):
            y = self.fc(x)
            return torch.sin(y * self.s) + y

    model = Shared().double()
    args = (torch.randn(3, 4).double(),)
    gm, report = rewrite(model, args, FoldStaticScale())
    assert not report.applied and len(report.refused) == 1
    assert_same(model, gm, args)


@pytest.mark.parametrize("copy_tied", [False, True])
def test_tied_layers(copy_tied):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 4)

        def forward(self, ids):
            return F.linear(torch.tanh(self.embed(ids)), self.embed.weight) * 0.25

    model, args = Tied().double(), (torch.arange(5),)
    gm, report = rewrite(model, args, FoldStaticScale(copy_tied=copy_tied))
    assert bool(report.applied) == copy_tied
    if not copy_tied:
        assert "tied to an embedding" in report.refused[0][2]
    assert_same(model, gm, args)


def test_scale_along_another_dim_is_refused():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.s = nn.Linear(4, 4), nn.Parameter(torch.rand(5, 1))

        def forward(self, x):
            return torch.tanh(self.fc(x) * self.s)

    model, args = Rows().double(), (torch.randn(2, 5, 4).double(),)
    gm, report = rewrite(model, args, FoldStaticScale())
    assert not report.applied
    assert_same(model, gm, args)


def test_infinite_numbers_are_left_alone():
    class Infinite(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) * float("inf")

    gm, report = rewrite(Infinite(), (torch.randn(3, 4),), FoldStaticScale())
    assert not report.applied and count(gm, aten.mul) == 1


def test_declines_in_training_where_it_must_pay():
    model = Toy(layer_scale=True)
    _, report = rewrite(
        model.train(), model.example(), FoldStaticScale(), training=True, policy="pays"
    )
    assert not report.applied and all("in training" in r for _, _, r in report.refused)
