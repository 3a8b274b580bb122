"""``einsum`` with a weight becomes the linear layer it is; everything else stays an ``einsum``."""

import normfuse
import pytest
import torch
from normfuse import passes
from torch import nn

aten = torch.ops.aten

LINEAR = {
    "bld,dh->blh": ((2, 5, 8), (8, 6)),
    "bld,hd->blh": ((2, 5, 8), (6, 8)),
    "bld,dhk->blhk": ((2, 5, 8), (8, 2, 3)),
    "bld,dhk->bhlk": ((2, 5, 8), (8, 2, 3)),
    "bhlk,hkd->bld": ((2, 2, 5, 4), (2, 4, 8)),
    "blhk,dkh->bdl": ((2, 5, 2, 4), (8, 4, 2)),
    "...d,fd->...f": ((2, 5, 8), (6, 8)),
    "...d, df": ((2, 5, 8), (8, 6)),
    "bcn,oc->bon": ((2, 8, 5), (6, 8)),
    "lbd,ldf->bf": ((3, 2, 8), (3, 8, 6)),
    "bld,dk->lbk": ((2, 5, 8), (8, 6)),
    "bld,dk->lkb": ((2, 5, 8), (8, 6)),
    "bld,d->bl": ((2, 5, 8), (8,)),
    "bld,ld->b": ((2, 5, 8), (5, 8)),
}
KEPT = {
    "bed,edf->bef": ((2, 3, 8), (3, 8, 6)),  # a stack of matrices
    "bld,d->bld": ((2, 5, 8), (8,)),  # a gain
    "bld,df->bl": ((2, 5, 8), (8, 6)),  # sums over the weight's own label
    "bld,df->lf": ((2, 5, 8), (8, 6)),  # sums over the batch
    "bdd,df->bf": ((2, 8, 8), (8, 6)),  # a diagonal
    "bld,df->blf": ((2, 5, 1), (8, 6)),  # broadcasts
}


class Einsum(nn.Module):
    def __init__(self, equation: str, shape: tuple[int, ...], left: bool = False) -> None:
        super().__init__()
        self.equation, self.left = equation, left
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        operands = (self.weight, x) if self.left else (x, self.weight)
        return torch.einsum(self.equation, *operands)


def targets(gm: torch.fx.GraphModule) -> set:
    return {n.target for n in gm.graph.nodes if n.op == "call_function"}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("equation", LINEAR)
def test_becomes_linear(equation, dynamic):
    shape, weight = LINEAR[equation]
    model = Einsum(equation, weight)
    x = torch.randn(shape, dtype=torch.float64)
    gm = passes.capture(model, (x,), dynamic=dynamic)
    assert aten.linear.default in targets(gm)
    assert aten.einsum.default not in targets(gm)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("equation", KEPT)
def test_stays(equation):
    shape, weight = KEPT[equation]
    model = Einsum(equation, weight)
    x = torch.randn(shape, dtype=torch.float64)
    gm = passes.capture(model, (x,), dynamic=False)
    assert aten.einsum.default in targets(gm)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-12, atol=1e-12)


def test_weight_first():
    model = Einsum("df,bld->blf", (8, 6), left=True)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    gm = passes.capture(model, (x,))
    assert aten.linear.default in targets(gm)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-12, atol=1e-12)


class Spelled(nn.Module):
    def __init__(self, call, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.call = call
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x, self.weight)


SPELLED = {
    "inner": (torch.inner, (2, 5, 8), (6, 8)),
    "inner_left": (lambda x, w: torch.inner(w, x), (2, 5, 8), (6, 8)),
    "inner_vector": (torch.inner, (8,), (8,)),
    "tensordot": (lambda x, w: torch.tensordot(x, w, 1), (2, 5, 8), (8, 6)),
    "tensordot_dims": (lambda x, w: torch.tensordot(w, x, ([1], [-1])), (2, 5, 8), (6, 8)),
    "tensordot_two": (lambda x, w: torch.tensordot(x, w, ([1, 2], [1, 0])), (2, 5, 8), (8, 5, 3)),
    "matmul_vector": (torch.matmul, (2, 5, 8), (8,)),
    "vector_matmul": (lambda x, w: w @ x, (2, 8, 5), (8,)),
    "mv": (torch.mv, (5, 8), (8,)),
    "dot": (torch.dot, (8,), (8,)),
    "linear_vector": (lambda x, w: x @ w, (8,), (8,)),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SPELLED)
def test_other_spellings_become_linear(name, dynamic):
    call, shape, weight = SPELLED[name]
    model = Spelled(call, weight)
    x = torch.randn(shape, dtype=torch.float64)
    gm = passes.capture(model, (x,), dynamic=dynamic)
    assert aten.linear.default in targets(gm)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-12, atol=1e-12)
    assert gm(x).stride() == model(x).stride()


def test_layout_is_the_one_einsum_has():
    for equation, order in (("bld,dk->lbk", 6), ("bld,dk->lkb", 2)):
        model = Einsum(equation, (8, 6))
        x = torch.randn(2, 5, 8, dtype=torch.float64)

        def viewed(x, model=model, order=order):
            return model(x).view(-1, order)  # what the layout einsum gives allows

        try:
            want = viewed(x)
        except RuntimeError:
            continue
        torch.testing.assert_close(passes.capture(viewed, (x,))(x), want)


class Block(nn.Module):
    """Attention written with einsum throughout."""

    def __init__(self, d: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.q, self.k, self.v = (
            nn.Parameter(torch.randn(d, heads, d // heads) / d**0.5) for _ in range(3)
        )
        self.o = nn.Parameter(torch.randn(heads, d // heads, d) / d**0.5)
        self.final = nn.LayerNorm(d)
        self.head = nn.Linear(d, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (torch.einsum("bld,dhk->bhlk", h, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bhik,bhjk->bhij", q, k).softmax(-1)
        mixed = torch.einsum("bhij,bhjk->bhik", scores, v)
        x = x + torch.einsum("bhik,hkd->bid", mixed, self.o)
        return self.head(self.final(x))


def test_exact_passes_reach_through_einsum():
    torch.manual_seed(0)
    model = Block().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    new, report = normfuse.rewrite(model, (x,), policy="always")
    site = next(s for s in report.sites if s.key == "norm")
    assert "fold_affine" in site.applied
    assert any("merge_linears" in s.applied for s in report.sites)
    torch.testing.assert_close(new(x), model(x), rtol=1e-10, atol=1e-10)
