"""Capture: one IR from every source, called like the model, with the model's own parameters."""

import copy

import pytest
import torch
from normfuse import passes
from normfuse.passes import CaptureError, SpecError, ir
from normfuse.passes.capture import clean_path, user_frame
from torch import nn

aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.register_buffer("scale", torch.tensor(2.0))
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, *, double=False):
        x = self.embed(ids) * self.scale
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return {"logits": logits * 2 if double else logits, "states": (x, [ids])}


IDS = torch.arange(10).view(2, 5) % 16


def test_called_like_the_model_with_its_own_parameters():
    model = Tiny().eval()
    gm = passes.capture(model, (IDS,), {"double": True})
    out, expected = gm(IDS, double=True), model(IDS, double=True)
    assert torch.equal(out["logits"], expected["logits"])
    assert isinstance(out["states"], tuple) and torch.equal(out["states"][1][0], IDS)
    assert gm.get_parameter("embed.weight") is model.embed.weight
    assert set(gm.state_dict()) == set(model.state_dict())


def test_tied_weight_is_one_node():
    gm = passes.capture(Tiny().eval(), (IDS,))
    leaves = [n for n in gm.graph.nodes if n.op == "get_attr" and ir.is_weight(n)]
    tied = [n for n in leaves if n.target in ("embed.weight", "head.weight")]
    assert len(tied) == 1 and len(tied[0].users) == 2


def test_provenance_names_module_and_line():
    gm = passes.capture(Tiny().eval(), (IDS,))
    norms = ir.norm_nodes(gm)
    assert [ir.module_path(n) for n in norms] == ["blocks.0.norm", "blocks.1.norm"]
    assert all("test_capture.py:" in ir.where(n) for n in norms)
    assert [n.meta["site"] for n in norms] == ["blocks.0.norm", "blocks.1.norm"]


def test_dynamic_dims_stay_dynamic():
    model = Tiny().eval()
    gm = passes.capture(model, (IDS,))
    other = torch.arange(21).view(3, 7) % 16
    assert torch.equal(gm(other)["logits"], model(other)["logits"])
    assert any(isinstance(s, torch.SymInt) for s in ir.shape(ir.norm_nodes(gm)[0]))


def test_gradients_reach_the_models_parameters():
    model = Tiny()
    gm = passes.capture(model, (IDS,))
    gm(IDS)["logits"].square().sum().backward()
    captured = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model(IDS)["logits"].square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(captured[name], p.grad)


def test_from_function_exported_program_and_graph_module():
    x = torch.randn(3, 8)
    norm = nn.LayerNorm(8)

    def function(x, scale=2.0):
        return norm(x) * scale

    assert torch.equal(passes.capture(function, (x,))(x), function(x))
    exported = torch.export.export(Block().eval(), (x,))
    gm = passes.capture(exported)
    assert torch.equal(gm(x), exported.module()(x))
    symbolic = torch.fx.symbolic_trace(Block().eval())
    assert torch.equal(passes.capture(symbolic, (x,))(x), symbolic(x))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.bn = nn.BatchNorm1d(8)
        self.act = nn.ReLU(inplace=True)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        y = self.fc(x)
        y += x
        y = self.act(self.bn(y))
        self.count.add_(1)
        z = y.view(-1)
        z.mul_(2)
        return y, z


def test_in_place_ops_become_functional_or_are_fenced_off():
    model = InPlace()
    x = torch.randn(4, 8)
    twin = copy.deepcopy(model)
    gm = passes.capture(twin, (x,))
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert aten.add.Tensor in targets and aten.relu.default in targets
    fenced = next(n for n in gm.graph.nodes if n.target is aten.mul_.Tensor)
    assert fenced.meta["mutated"]
    count = next(n for n in gm.graph.nodes if n.target == "count")
    assert count.meta["kind"] == "input"  # it changes: never folded
    twin.load_state_dict(model.state_dict())  # capture itself must not have stepped the buffers
    for expected, actual in zip(model(x), gm(x), strict=True):
        assert torch.equal(expected, actual)
    for name, b in model.named_buffers():
        assert torch.equal(b, gm.get_buffer(name)), name


def test_running_statistics_are_weights_in_eval_only():
    x = torch.randn(4, 8)
    for training in (True, False):
        gm = passes.capture(InPlace().train(training), (x,))
        mean = next(n for n in gm.graph.nodes if n.target == "bn.running_mean")
        assert ir.is_weight(mean) is not training


def test_no_grad_region_is_inlined_and_detached():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                y = self.a(x)
            return self.b(x) + y

    model = Model()
    x = torch.randn(2, 4)
    gm = passes.capture(model, (x,))
    assert not any("submod" in str(n.target) for n in gm.graph.nodes)
    gm(x).sum().backward()
    assert model.a.weight.grad is None and model.b.weight.grad is not None


def test_errors_name_what_is_wrong():
    with pytest.raises(CaptureError, match="tuple"):
        passes.capture(Block(), torch.randn(2, 8))
    with pytest.raises(CaptureError, match="argument"):
        passes.capture(Block(), (torch.randn(2, 8), 3, 4))
    with pytest.raises(CaptureError, match="meta"):
        passes.capture(Block(), (torch.randn(2, 8, device="meta"),))
    with pytest.raises(CaptureError, match="sparse"):
        passes.capture(Block(), (torch.eye(8).to_sparse(),))
    with pytest.raises(CaptureError, match="module"):
        passes.capture("model", ())

    class DataDependent(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(CaptureError, match="DataDependent"):
        passes.capture(DataDependent(), (torch.randn(3),))


def test_spec_names_the_illegal_node():
    gm = passes.capture(Block().eval(), (torch.randn(2, 8),))
    norm = ir.norm_nodes(gm)[0]
    norm.update_arg(1, [0])
    with pytest.raises(SpecError, match="negative"):
        ir.check(gm)
    norm.update_arg(1, [-1])
    ir.check(gm)
    del norm.meta["val"]
    with pytest.raises(SpecError, match="fake value"):
        ir.check(gm)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("L['self'].transformer.h[0]._modules['ln_1']", "transformer.h.0.ln_1"),
        ("L['self']", ""),
        ("transformer.h.0.ln_1", "transformer.h.0.ln_1"),
        (
            "L['fn']._modules['blocks']._modules['1'].norm._parameters['weight']",
            "blocks.1.norm.weight",
        ),
    ],
)
def test_clean_path(raw, clean):
    assert clean_path(raw) == clean


def test_user_frame_skips_torch():
    trace = (
        'File "/models/model.py", line 7, in forward\n    return self.norm(x)\n'
        f'File "{torch.__file__.replace("__init__", "nn/modules/linear")}", line 1, in forward\n'
    )
    assert user_frame(trace).endswith("model.py:7")


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.f = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.norm(x)
        if h.sum() > 1e6:
            return h
        return self.f(h)


def test_branching_on_values_is_one_sentence_and_prints_nothing(capfd):
    with pytest.raises(CaptureError) as error:
        passes.capture(Branching().eval(), (torch.randn(3, 8),))
    line = Branching.forward.__code__.co_firstlineno + 2
    text = str(error.value)
    assert "control flow" in text and f"test_capture.py:{line}" in text
    assert "\n" not in text and "Guard" not in text and "_export" not in text
    assert capfd.readouterr() == ("", "")


class Untraceable(nn.Module):
    def forward(self, x):
        return x + (None if torch.compiler.is_compiling() else x).sum()


def test_a_capture_that_fails_names_the_line():
    line = Untraceable.forward.__code__.co_firstlineno + 1
    with pytest.raises(CaptureError, match=rf"has no attribute 'sum' at .*test_capture\.py:{line}"):
        passes.capture(Untraceable(), (torch.ones(2),))


class StaticOnly(nn.Module):
    """A random tensor from a generator cannot be traced with symbolic sizes."""

    def forward(self, x):
        return nn.functional.layer_norm(x, (4,)) + torch.randn(tuple(x.shape), generator=None)


def test_a_failed_dynamic_capture_is_followed_by_a_static_one():
    x = torch.randn(3, 4)
    gm = passes.capture(StaticOnly(), (x,))
    assert len(ir.norm_nodes(gm)) == 1 and gm(x).shape == x.shape
    assert not vars(x)


def test_dims_that_the_caller_marked_stay_marked():
    x = torch.randn(3, 4)
    torch._dynamo.maybe_mark_dynamic(x, 0)
    passes.capture(nn.LayerNorm(4), (x,))
    assert x._dynamo_weak_dynamic_indices == {0}
