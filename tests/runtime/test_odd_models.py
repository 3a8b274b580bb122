"""Small models that are odd in one way each: the same numbers and layouts as eager, or left alone."""

import copy
import warnings

import normfuse
import pytest
import torch
import torch.nn.functional as F
from torch import nn

D = 8


class Odd(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run
        self.norm, self.last = nn.LayerNorm(D), nn.LayerNorm(D)
        self.a, self.b, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.b.weight = self.a.weight
        self.gain, self.mix = nn.Parameter(torch.randn(4, D)), nn.Parameter(torch.randn(4, 4))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape) / 2)

    def forward(self, x):
        return self.run(self, x)


def after_the_norm(m, x):
    y = m.a(x)
    n = m.norm(y)
    y.mul_(2)
    return m.head(n) + y


def into_the_norm(m, x):
    n = m.norm(x)
    n[:, 0] = 0
    return m.head(n), n


def looped(m, x):
    for _ in range(20):
        x = x + 0.1 * m.a(m.norm(x))
    return m.head(m.norm(x))


ODD = {
    "chosen": lambda m, x: m.head(m.norm(torch.where(x.sum(-1, keepdim=True) > 0, x + m.a(x), x))),
    "detached": lambda m, x: m.head(m.norm((x + m.a(x)).detach())) + m.b(m.norm(x + m.a(x))),
    "indexed": lambda m, x: m.head(m.norm((x + m.a(x))[:, torch.tensor([1, 0, 3])])),
    "tied": lambda m, x: m.b(m.last(x + m.a(m.norm(x)))),
    "one norm at two depths": lambda m, x: m.head(m.norm(x + m.b(m.norm(x)))),
    "norm of a norm": lambda m, x: m.head(m.last(m.norm(x))),
    "looped": looped,
    "written after": after_the_norm,
    "written into": into_the_norm,
    "gain by token": lambda m, x: m.head(F.layer_norm(x, (D,)) * m.gain),
    "gain from a weight": lambda m, x: F.linear(
        F.layer_norm(x, (D,), m.a.weight[0], m.a.weight[1]), m.a.weight
    ),
    "tokens mixed": lambda m, x: m.head(m.last(x + m.mix @ m.norm(x))),
    "features rolled": lambda m, x: m.head(m.norm(x + m.a(x)).roll(1, -1)),
    "features in pieces": lambda m, x: m.head(torch.cat(m.norm(x).chunk(2, -1)[::-1], -1)),
    "views out": lambda m, x: ((y := m.head(m.norm(x))), y.view(-1), y[0]),
    "norm out": lambda m, x: (m.head(n := m.norm(x)), n, x),
    "complex": lambda m, x: m.head(m.norm(torch.fft.fft(x).real + m.a(x))),
}


NOT_EMPTY = {"views out", "complex"}  # these fail in eager, too


@pytest.mark.parametrize(
    ("name", "shape"),
    [(n, (rows, 4, D)) for n in ODD for rows in (2, 0) if rows or n not in NOT_EMPTY],
)
def test_odd_models(name, shape):
    torch.manual_seed(0)
    model = Odd(ODD[name]).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="running the original code")
        new, report = normfuse.rewrite(copy.deepcopy(model), (x,), policy="always")
        got, want = new(x.clone()), model(x.clone())
    assert not report.failed_verification
    got, want = ([t] if torch.is_tensor(t) else list(t) for t in (got, want))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert a.stride() == b.stride()
