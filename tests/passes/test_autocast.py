"""Autocast made explicit: same results as eager under autocast, dtypes true in the graph."""

import torch
from normfuse import passes
from normfuse.passes import ir
from normfuse.passes.autocast import Autocast, ambient
from torch import nn


class Model(nn.Module):
    def __init__(self, region):
        super().__init__()
        self.norm, self.fc, self.region = nn.LayerNorm(16), nn.Linear(16, 16), region

    def body(self, x):
        y = self.fc(self.norm(x))
        y = torch.softmax(y @ y.mT, -1) @ self.fc(y)
        return y + x

    def forward(self, x):
        if not self.region:
            return self.body(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = self.body(x)
            with torch.autocast("cpu", enabled=False):
                z = self.fc(x)
        return y * 2 + z


def test_region_inside_the_model():
    model, x = Model(True).eval(), torch.randn(4, 16)
    gm = passes.capture(model, (x,))
    assert torch.equal(gm(x), model(x))
    linears = [n for n in gm.graph.nodes if ir.is_call(n, torch.ops.aten.linear)]
    assert [ir.dtype(n) for n in linears] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert not any("autocast" in str(n.target) for n in gm.graph.nodes)


def test_ambient_autocast_is_captured():
    model, x = Model(False).eval(), torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert ambient() == (Autocast("cpu", torch.bfloat16),)
        gm = passes.capture(model, (x,))
        expected = model(x)
    assert ambient() == ()
    assert torch.equal(gm(x), expected)  # the casts are in the graph: no autocast needed
    norm = ir.norm_nodes(gm)[0]
    assert ir.dtype(norm) == torch.float32  # CPU autocast does not touch norms


def test_casts_of_one_weight_are_shared():
    model, x = Model(True).eval(), torch.randn(4, 16)
    gm = passes.capture(model, (x,))
    weight = next(n for n in gm.graph.nodes if n.target == "fc.weight")
    casts = [u for u in weight.users if ir.is_call(u, torch.ops.aten.to.dtype)]
    assert len(casts) == 1


def test_mixed_dtypes_that_only_autocast_makes_legal():
    class Convs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4)

        def forward(self, x):
            return self.b(self.a(x))  # bfloat16 activations meet float32 weights

    model, x = Convs().eval(), torch.randn(1, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        gm, expected = passes.capture(model, (x,)), model(x)
    assert torch.equal(gm(x), expected)
