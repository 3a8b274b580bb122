"""Linear layers: every spelling is one object, and the algebra on its weight is right."""

import normfuse
import pytest
import torch
import torch.nn.functional as F
from normfuse import passes
from normfuse.passes import Context, ir
from normfuse.passes.axis import Axis
from normfuse.passes.linear import leaf_of, match_linear, set_args, table_user
from normfuse.passes.readers import follow_readers
from normfuse.passes.weight_builder import WeightBuilder
from torch import nn

aten, nf = torch.ops.aten, torch.ops.normfuse
D = 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Op(nn.Module):
    """``op(x, weight, bias)`` as a module."""

    def __init__(self, op, weight, bias=None):
        super().__init__()
        self.op = op
        self.weight = nn.Parameter(torch.randn(weight, dtype=torch.float64))
        self.bias = None if bias is None else nn.Parameter(torch.randn(bias).double())

    def forward(self, x):
        return self.op(x, self.weight, self.bias)


def product(x, w, b):
    return x @ w


def conv(dims, **options):
    def run(x, w, b):
        return getattr(F, f"conv{dims}d")(x, w, b, **options)

    return run


def conv_transpose(dims, **options):
    def run(x, w, b):
        return getattr(F, f"conv_transpose{dims}d")(x, w, b, **options)

    return run


def scaled(x, w, b):
    return nf.scaled_linear(x, w, x.abs().sum(-1, keepdim=True), b)


# name: (module, input shape, layout, (in_dim, out_dim), feature dim)
CASES = {
    "linear": (Op(F.linear, (6, D), (6,)), (2, 3, D), "linear", (-1, -2), -1),
    "linear_no_bias": (Op(F.linear, (6, D)), (3, D), "linear", (-1, -2), -1),
    "vector": (Op(F.linear, (6, D), (6,)), (D,), "linear", (-1, -2), -1),
    "addmm": (
        Op(lambda x, w, b: torch.addmm(b, x, w), (D, 6), (6,)),
        (3, D),
        "addmm",
        (-2, -1),
        -1,
    ),
    "mm": (Op(lambda x, w, b: torch.mm(x, w), (D, 6)), (3, D), "mm", (-2, -1), -1),
    "mm_t": (Op(lambda x, w, b: torch.mm(x, w.t()), (6, D)), (3, D), "mm", (-2, -1), -1),
    "matmul": (Op(product, (D, 6)), (2, 3, D), "matmul", (-2, -1), -1),
    "stack": (Op(product, (2, D, 6)), (5, 2, 3, D), "matmul", (-2, -1), -1),
    "broadcast_stack": (Op(product, (2, D, 6)), (3, D), "matmul", (-2, -1), -1),
    "bmm": (Op(lambda x, w, b: torch.bmm(x, w), (2, D, 6)), (2, 3, D), "bmm", (-2, -1), -1),
    "baddbmm": (
        Op(lambda x, w, b: torch.baddbmm(b, x, w), (2, D, 6), (2, 1, 6)),
        (2, 3, D),
        "baddbmm",
        (-2, -1),
        -1,
    ),
    "left_mm": (Op(lambda x, w, b: torch.mm(w, x), (6, D)), (D, 3), "left_mm", (-1, -2), -2),
    "left_matmul": (
        Op(lambda x, w, b: w @ x, (6, D)),
        (2, D, 3),
        "left_matmul",
        (-1, -2),
        -2,
    ),
    "left_stack": (Op(lambda x, w, b: w @ x, (2, 6, D)), (5, 2, D, 3), "left_matmul", (-1, -2), -2),
    "left_bmm": (
        Op(lambda x, w, b: torch.bmm(w, x), (2, 6, D)),
        (2, D, 3),
        "left_bmm",
        (-1, -2),
        -2,
    ),
    "mv": (Op(lambda x, w, b: torch.mv(w, x), (6, D)), (D,), "mv", (-1, -2), -1),
    "matmul_vector": (Op(lambda x, w, b: w @ x, (6, D)), (D,), "mv", (-1, -2), -1),
    "left_linear": (
        Op(lambda x, w, b: F.linear(w, x), (6, D)),
        (3, D),
        "left_linear",
        (-1, -2),
        -1,
    ),
    "conv1d": (Op(conv(1), (6, D, 3), (6,)), (2, D, 7), "conv", (-2, -3), -2),
    "conv2d": (Op(conv(2, stride=2), (6, D, 2, 3), (6,)), (2, D, 6, 7), "conv", (-3, -4), -3),
    "conv3d": (Op(conv(3), (6, D, 1, 1, 1)), (2, D, 2, 3, 2), "conv", (-4, -5), -4),
    "unbatched_conv": (Op(conv(2), (6, D, 3, 3)), (D, 5, 5), "conv", (-3, -4), -3),
    "depthwise": (Op(conv(1, groups=D), (2 * D, 1, 3), (2 * D,)), (2, D, 7), "conv", (-2, -3), -2),
    "grouped": (Op(conv(2, groups=2), (6, D // 2, 2, 2), (6,)), (2, D, 5, 5), "conv", (-3, -4), -3),
    "padded": (Op(conv(1, padding=1), (6, D, 3), (6,)), (2, D, 7), "conv", (-2, -3), -2),
    "valid": (Op(conv(1, padding="valid"), (6, D, 3), (6,)), (2, D, 7), "conv", (-2, -3), -2),
    "same": (Op(conv(2, padding="same"), (6, D, 3, 3)), (2, D, 5, 5), "conv", (-3, -4), -3),
    "same_point": (Op(conv(2, padding="same"), (6, D, 1, 1)), (2, D, 5, 5), "conv", (-3, -4), -3),
    "transposed": (
        Op(conv_transpose(2, stride=2), (D, 6, 3, 3), (6,)),
        (2, D, 4, 4),
        "conv_transpose",
        (-4, -3),
        -3,
    ),
    "grouped_transposed": (
        Op(conv_transpose(1, groups=2), (D, 3, 2), (6,)),
        (2, D, 5),
        "conv_transpose",
        (-3, -2),
        -2,
    ),
    "scaled_linear": (Op(scaled, (6, D), (6,)), (2, 3, D), "scaled_linear", (-1, -2), -1),
}
PADS = {"padded", "same", "transposed", "grouped_transposed"}


def matched(name):
    model, shape, *_ = CASES[name]
    x = torch.randn(shape, dtype=torch.float64)
    gm = passes.capture(model.eval(), (x,), dynamic=False)
    [linear] = [m for n in gm.graph.nodes if (m := match_linear(n)) is not None]
    return model, x, gm, linear


def along(vector, dim):
    return vector.reshape([-1] + [1] * (-dim - 1))


def constant(gm, name, value):
    """A new weight leaf in front of the graph."""
    gm.register_parameter(name, nn.Parameter(value))
    first = next(iter(gm.graph.nodes))
    with gm.graph.inserting_before(first):
        node = gm.graph.get_attr(name)
    node.meta.update(val=ir.fake_mode(gm).from_tensor(value), kind="param", fqn=name)
    return node


def finish(gm):
    ir.stable_sort(gm.graph)
    ir.erase_dead(gm)
    ir.check(gm)
    gm.recompile()
    return gm


@pytest.mark.parametrize("name", CASES)
def test_matched(name):
    model, _, layout, dims, feature = CASES[name]
    _, _, _, linear = matched(name)
    assert linear.layout == layout
    assert (linear.in_dim, linear.out_dim) == dims
    out = -2 if name == "left_linear" else feature
    assert (linear.feature_in, linear.feature_out) == (feature, out)
    assert (linear.in_features, linear.out_features) == (D, 2 * D if name == "depthwise" else 6)
    assert linear.owned and linear.pads == (name in PADS)
    assert (linear.bias is None) == (model.bias is None)
    assert leaf_of(linear.weight).target == "weight"


NO_SHIFT = PADS | {"scaled_linear"}  # the response to a shift is no constant; callers refuse


@pytest.mark.parametrize(
    ("name", "shifted"),
    [(n, s) for n in CASES for s in (False, True) if not s or n not in NO_SHIFT],
)
def test_fold_in(name, shifted):
    model, x, gm, linear = matched(name)
    gain, shift = torch.randn(D).double(), torch.randn(D).double()
    feature = linear.feature_in
    builder = WeightBuilder(gm.graph, Context())
    g = constant(gm, "gain", gain)
    b = constant(gm, "shift", shift) if shifted else None
    weight, bias = builder.fold_in(linear, g, b)
    assert linear.rebuild(weight=weight, bias=bias) is linear.node
    y = along(gain, feature) * x + (along(shift, feature) if shifted else 0)
    want = model(y)
    if linear.layout == "scaled_linear":  # its row scale still reads the plain input
        want = nf.scaled_linear(y, model.weight, x.abs().sum(-1, keepdim=True), model.bias)
    torch.testing.assert_close(finish(gm)(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("number", [False, True])
def test_fold_out(name, number):
    model, x, gm, linear = matched(name)
    out = linear.out_features
    scale, shift = torch.randn(out).double(), torch.randn(out).double()
    builder = WeightBuilder(gm.graph, Context())
    s = 2.5 if number else constant(gm, "scale", scale)
    weight, bias = builder.fold_out(linear, s, constant(gm, "shift", shift))
    if linear.layout == "baddbmm":
        assert ir.same_shape(ir.shape(bias), (2, 1, out))
    linear.rebuild(weight=weight, bias=bias)
    feature = linear.feature_out
    factor = 2.5 if number else along(scale, feature)
    want = model(x) * factor + along(shift, feature)
    torch.testing.assert_close(finish(gm)(x), want, rtol=1e-12, atol=1e-12)


def test_a_number_scales_in_and_a_scalar_weight_too():
    for name in ("linear", "grouped", "grouped_transposed", "bmm", "left_mm", "left_linear"):
        model, x, gm, linear = matched(name)
        builder = WeightBuilder(gm.graph, Context())
        weight, _ = builder.fold_in(linear, constant(gm, "gate", torch.tensor(0.5).double()), None)
        linear.rebuild(weight=weight)
        torch.testing.assert_close(finish(gm)(x), model(x * 0.5))


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x @ x.transpose(-1, -2),
        lambda x: torch.bmm(x, x.transpose(1, 2)),
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: torch.addmm(x[0], x[0], torch.eye(D).double(), beta=0.5),
        lambda x: F.embedding(x[0, :, 0].long().clamp(0, 1), torch.eye(D).double()),
    ],
)
def test_not_a_linear_layer(op):
    gm = passes.capture(op, (torch.rand(2, D, D, dtype=torch.float64),))
    assert not [n for n in gm.graph.nodes if match_linear(n) is not None]


def test_weights_computed_from_activations_are_not_owned():
    def hyper(x):
        return F.linear(x, x.mean(0, keepdim=True).expand(3, D))

    gm = passes.capture(hyper, (torch.rand(2, D),))
    [linear] = [m for n in gm.graph.nodes if (m := match_linear(n)) is not None]
    assert not linear.owned


def test_two_folds_round_once():
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False).bfloat16()
    gm = passes.capture(model, (torch.randn(3, 64).bfloat16(),))
    [linear] = [m for n in gm.graph.nodes if (m := match_linear(n)) is not None]
    g, s = torch.rand(64) + 0.5, torch.rand(64) + 0.5
    builder = WeightBuilder(gm.graph, Context())
    weight, _ = builder.fold_in(linear, constant(gm, "g", g), None)
    linear.rebuild(weight=weight)
    again = match_linear(linear.node)
    # another pass, another builder
    builder = WeightBuilder(gm.graph, Context())
    weight, _ = builder.fold_out(again, constant(gm, "s", s), None)
    again.rebuild(weight=weight)
    eye = torch.eye(64).bfloat16()
    with torch.no_grad():
        got = finish(gm)(eye).T.double()
    exact = s.double()[:, None] * model.weight.detach().double() * g.double()
    assert torch.equal(got, exact.bfloat16().double())


def test_expressions_are_emitted_once():
    gm = passes.capture(nn.Linear(D, D), (torch.randn(2, D),))
    [linear] = [m for n in gm.graph.nodes if (m := match_linear(n)) is not None]
    builder = WeightBuilder(gm.graph, Context())
    gain = constant(gm, "gain", torch.randn(D))
    first, _ = builder.fold_in(linear, gain, None)
    second, _ = builder.fold_in(linear, gain, None)
    assert first is second


def test_tied_table_is_found_through_views():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, D)
            self.head = nn.Linear(D, D)

        def forward(self, ids):
            return self.head(self.embed(ids)) @ self.embed.weight.t()

    gm = passes.capture(Tied(), (torch.arange(3),))
    head, tied = [m for n in gm.graph.nodes if (m := match_linear(n)) is not None]
    assert table_user(head.weight) is None
    assert ir.is_call(table_user(tied.weight), aten.embedding)


def test_set_args_by_name():
    gm = passes.capture(nn.RMSNorm(D, eps=1e-3), (torch.randn(2, D),))
    [norm] = ir.norm_nodes(gm)
    set_args(norm, out_dtype=torch.float64)
    assert ir.NormArgs(norm).out_dtype == torch.float64 and ir.NormArgs(norm).eps == 1e-3
    set_args(norm, eps=1e-6, gain=None)
    assert ir.NormArgs(norm).eps == 1e-6 and ir.NormArgs(norm).out_dtype == torch.float64


class Left(nn.Module):
    """A pre-norm model that is written with every weight on the left."""

    def __init__(self, norm=nn.LayerNorm, d=D):
        super().__init__()
        self.embed, self.first, self.second = (
            nn.Parameter(torch.randn(shape)) for shape in ((d, 3), (2 * d, d), (d, 2 * d))
        )
        self.gate, self.query = nn.Parameter(torch.randn(2 * d, d)), nn.Parameter(torch.randn(d))
        self.mix = nn.Parameter(torch.randn(5, 5))
        self.norm, self.final = norm(d), norm(d)
        self.final.bias = None  # mixing rows would not keep it
        for p in (*self.norm.parameters(), *self.final.parameters()):
            nn.init.normal_(p)

    def forward(self, x):
        x = self.embed @ x  # (…, d, tokens)
        h = self.norm(x.mT).mT
        x = x + torch.matmul(self.second, torch.tanh(self.first @ h) * (self.gate @ h))
        h = self.mix @ self.final(x.mT)  # tokens are mixed, features are not
        return h @ self.query


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
def test_exact_passes_work_on_weights_on_the_left(norm, shape):
    model = Left(norm).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    new, report = normfuse.rewrite(model, (x,), policy="always")
    applied = {s.key: s.applied for s in report.sites}
    wanted = {"fold_affine"} | ({"remove_mean"} if norm is nn.LayerNorm else set())
    assert wanted <= set(applied["norm"]) and wanted <= set(applied["final"])
    assert any("merge_linears" in a for a in applied.values())
    assert not report.failed_verification
    torch.testing.assert_close(new(x), model(x), rtol=1e-10, atol=1e-10)
    new(x).square().sum().backward()
    got = {n: p.grad for n, p in new.named_parameters()}
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-9, atol=1e-9)


def test_a_weight_on_the_left_of_rows_reads_no_features():
    def path(h):
        return torch.eye(6) @ h  # (tokens, tokens) @ (tokens, features)

    readings, blocked = read(path)
    assert not blocked and [r.linear.layout for r in readings] == ["linear"]


# -- readers


class Paths(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.path, self.fc = path, nn.Linear(D, 3)

    def forward(self, x):
        return self.fc(self.path(torch.tanh(x)))


def read(path, shape=(2, 6, D)):
    gm = passes.capture(Paths(path).eval(), (torch.randn(shape),))
    value = next(n for n in gm.graph.nodes if ir.is_call(n, aten.tanh))
    return follow_readers(value, Axis((-1,)))


@pytest.mark.parametrize(
    ("path", "shift"),
    [
        (lambda h: h.flatten(0, 1), True),
        (lambda h: h.transpose(0, 1).contiguous(), True),
        (lambda h: h.unflatten(-1, (2, 2)).transpose(1, 2).transpose(1, 2).flatten(-2), True),
        (lambda h: h[:, 0], True),
        (lambda h: h[:, 1:3].unsqueeze(1).expand(-1, 5, -1, -1), True),
        (lambda h: h.double().float(), True),
        (lambda h: h.mean(1), True),
        (lambda h: h.chunk(2, 1)[1], True),
        (lambda h: h[torch.tensor([1, 0])], True),
        (lambda h: F.dropout(h, 0.5, False), True),
        (lambda h: h.sum(1), False),
        (lambda h: h * 2, False),
        (lambda h: F.pad(h, (0, 0, 1, 1)), False),
        (lambda h: F.dropout(h, 0.5, True), False),
        (lambda h: torch.ones(2, 5, 6) @ h, False),
    ],
)
def test_readers_are_found_through(path, shift):
    readings, blocked = read(path)
    assert not blocked and len(readings) == 1
    assert readings[0].axis == Axis((-1,))
    assert (readings[0].changes_shift is None) == shift


@pytest.mark.parametrize(
    "path",
    [
        torch.relu,
        lambda h: h + 1,
        lambda h: h + h.mean(1, keepdim=True),
        lambda h: h * h,
        lambda h: h.transpose(1, 2).reshape(2, -1, D),
        lambda h: h.flip(-1),
        lambda h: h.cumsum(-1),
        lambda h: torch.cat([h, torch.ones(2, 1, D)], 1),
        lambda h: h.transpose(1, 2)[..., :D],
    ],
)
def test_readers_are_blocked_by(path):
    _, blocked = read(path)
    assert blocked and all(b.reason for b in blocked)


def test_outputs_are_readers():
    gm = passes.capture(lambda x: torch.tanh(x).view(-1, D), (torch.randn(2, 6, D),))
    value = next(n for n in gm.graph.nodes if ir.is_call(n, aten.tanh))
    _, [blocked] = follow_readers(value, Axis((-1,)))
    assert "output" in blocked.reason
