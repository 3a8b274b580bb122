"""Rewritten modules whose parts, modes or weights change afterwards."""

import normfuse
import pytest
import torch
from models import Mixed, trained_like
from torch import nn
from torch.nn.utils import prune


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.delta = base, nn.Parameter(torch.ones_like(base.weight))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + x @ self.delta


def untie(m):
    m.a2.weight = nn.Parameter(m.a2.weight.detach() * 3)


def prune_and_edit(m):
    prune.l1_unstructured(m.b, "weight", 0.5)
    with torch.no_grad():
        m.b.weight_orig.mul_(2)


CHANGES = {
    "freeze a batch norm": (True, lambda m: m.batch.eval()),
    "dropout in eval": (False, lambda m: m.drop.train()),
    "dropout schedule": (True, lambda m: setattr(m.drop, "p", 0.0)),
    "adapter": (False, lambda m: setattr(m, "b", Lora(m.b))),
    "no norm": (False, lambda m: setattr(m, "norm", nn.Identity())),
    "untied": (False, untie),
    "pruned": (False, prune_and_edit),
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_modules_are_seen(change, traced):
    training, edit = CHANGES[change]
    model = trained_like(Mixed()).double().train(training)
    x = torch.randn(4, 8, dtype=torch.float64)
    new, _ = normfuse.rewrite(model, (x,), policy="always")
    f = torch.compile(new, backend="aot_eager") if traced else new
    for m in (model, new):
        edit(m)
    for _ in range(2):
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(f(x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(new.batch.running_var, model.batch.running_var)


@pytest.mark.parametrize("mode", [torch.compile, torch.export.export])
def test_tracing_a_rewritten_module_checks_what_its_graphs_stand_for(mode):
    class Positions(Mixed):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(5, 8))

        def forward(self, x, negate=False):
            return super().forward(x + self.position if x.shape[0] == 5 else 2 * x, negate)

    model = trained_like(Positions()).double().eval()
    new, _ = normfuse.rewrite(model, (torch.randn(5, 8, dtype=torch.float64), True))
    for rows, negate in ((5, True), (5, False), (1, True), (7, True)):
        x = torch.randn(rows, 8, dtype=torch.float64)
        if mode is torch.compile:
            out = torch.compile(new, backend="aot_eager")(x, negate)
        else:
            out = torch.export.export(new, (x, negate)).module()(x, negate)
        torch.testing.assert_close(out, model(x, negate), rtol=1e-10, atol=1e-12)
