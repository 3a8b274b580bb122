"""``param_groups``: roles by use and by type, splits, and groups that optimizers accept."""

import normfuse
import pytest
import torch
from normfuse import optim, passes
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.experts = nn.Parameter(torch.randn(4, d, d) * 0.02)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return x + torch.einsum("btd,edf->btef", x, self.experts).mean(2)


class LM(nn.Module):
    """Names say nothing, or mislead."""

    def __init__(self, d=8, vocab=11, tied=False):
        super().__init__()
        self.linear_like = nn.Embedding(vocab, d)
        self.weight_matrix = nn.Parameter(torch.zeros(1, 5, d))  # positions
        self.blocks = nn.ModuleList([Block(d), Block(d)])
        self.embedding = nn.Linear(d, vocab, bias=False)  # the head
        if tied:
            self.embedding.weight = self.linear_like.weight

    def forward(self, ids):
        x = self.linear_like(ids) + self.weight_matrix[:, : ids.shape[1]]
        for b in self.blocks:
            x = b(x)
        return self.embedding(x)


def roles(groups):
    return {n: g["role"] for g in groups for n, _ in g["params"]}


@pytest.mark.parametrize("by_run", [True, False])
def test_language_model(by_run, capsys):
    model = LM()
    args = (torch.zeros(2, 5, dtype=torch.long),) if by_run else None
    groups = optim.param_groups(model, args)
    assert "blocks.0.qkv.weight" in capsys.readouterr().out
    got = roles(groups)
    assert got["linear_like.weight"] == "embedding"
    assert got["embedding.weight"] == "head"
    assert got["blocks.0.qkv.weight"] == got["blocks.1.out.weight"] == "hidden"
    assert got["blocks.0.experts"] == "stack"
    assert got["blocks.0.norm.weight"] == got["blocks.0.qkv.bias"] == "vector"
    assert got["weight_matrix"] == "vector"
    assert set(got) == {n for n, _ in model.named_parameters()}
    assert model.training


def test_tied_head_is_an_embedding_once():
    for args in (None, (torch.zeros(2, 5, dtype=torch.long),)):
        got = roles(optim.param_groups(LM(tied=True), args, verbose=False))
        assert got["linear_like.weight"] == "embedding"
        assert "embedding.weight" not in got
        assert got["blocks.1.out.weight"] == "hidden"


def test_convolutional_model():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 16, 1),
        nn.Flatten(),
        nn.Linear(16 * 16, 5),
    )
    for args in (None, (torch.randn(1, 3, 8, 8),)):
        got = roles(optim.param_groups(model, args, verbose=False))
        assert got["0.weight"] == "input"
        assert got["2.weight"] == "vector"  # depthwise
        assert got["3.weight"] == "filter"
        assert got["5.weight"] == "head"


def test_every_member_trains_the_groups():
    ids = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(0))
    for name, lr in [
        ("Muon", 0.02),
        ("NorMuon", 0.02),
        ("ROOT", 0.02),
        ("AuON", 0.3),
        ("HybridAuON", 0.05),
        ("MuonMuP", 0.02),
        ("SCALE", 1e-2),
        ("SinkGD", 0.2),
        ("SWAN", 1e-1),
        ("AdamP", 1e-2),
        ("SGDP", 1e-2),
        ("Conda", 1e-2),
        ("ARO", 0.02),
        ("AdamW", 1e-2),
    ]:
        torch.manual_seed(0)
        model = LM()
        groups = optim.param_groups(model, (ids,), other={"lr": 1e-2}, verbose=False)
        opt = getattr(optim, name)(groups, lr=lr)
        losses = []
        for _ in range(12):
            loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses.append(float(loss))
        assert losses[-1] < losses[0] - 0.2, (name, losses)


def split_reference(sizes, dim, steps=4):
    """A fused matrix updated in pieces equals its pieces updated apart."""
    torch.manual_seed(0)
    fused = nn.Parameter(torch.randn(12, 8) if dim == 0 else torch.randn(8, 12))
    parts = [nn.Parameter(t.detach().clone()) for t in fused.split(sizes, dim)]
    a = optim.NorMuon([{"params": [fused], "split": (dim, list(sizes))}], lr=0.1)
    b = optim.NorMuon(parts, lr=0.1)
    for _ in range(steps):
        fused.grad = torch.randn_like(fused)
        for p, g in zip(parts, fused.grad.split(sizes, dim), strict=True):
            p.grad = g.clone()
        a.step()
        b.step()
    return fused, torch.cat(list(parts), dim), a


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("sizes", [(4, 4, 4), (6, 3, 3)])
def test_split(dim, sizes):
    fused, apart, opt = split_reference(sizes, dim)
    torch.testing.assert_close(fused, apart, rtol=1e-5, atol=1e-6)
    copy = optim.NorMuon([{"params": [fused], "split": (dim, list(sizes))}], lr=0.1)
    copy.load_state_dict(opt.state_dict())
    for key, value in opt.state[fused].items():
        assert torch.equal(value, copy.state[fused][key])


def test_split_on_request_through_param_groups():
    model = LM()
    groups = optim.param_groups(model, split={"*.qkv.weight": 3}, verbose=False)
    split = [g for g in groups if "split" in g]
    assert [n for n, _ in split[0]["params"]] == ["blocks.0.qkv.weight", "blocks.1.qkv.weight"]
    optim.Muon(groups)
    with pytest.raises(ValueError, match=r"qkv\.weight.*split|split.*qkv\.weight"):
        bad = optim.param_groups(model, split=lambda n, p: 5 if "qkv" in n else None, verbose=False)
        optim.Muon(bad)


def test_conv_aspect_is_that_of_the_flattened_matrix():
    for fmt in (torch.contiguous_format, torch.channels_last):
        w = nn.Parameter(torch.randn(40, 2, 3, 3).to(memory_format=fmt))
        flat = nn.Parameter(w.detach().reshape(40, 18).clone())
        a = optim.Muon([{"params": [w], "view": "flatten"}], lr=0.1)
        b = optim.Muon([flat], lr=0.1)
        w.grad = torch.randn(40, 2, 3, 3).to(memory_format=fmt)
        flat.grad = w.grad.reshape(40, 18).clone()
        a.step()
        b.step()
        torch.testing.assert_close(w.reshape(40, 18), flat, rtol=1e-5, atol=1e-6)


def test_stacks_are_independent_matrices():
    stack = nn.Parameter(torch.randn(3, 6, 4))
    ones = [nn.Parameter(t.clone()) for t in stack.detach()]
    a = optim.Muon([{"params": [stack], "view": "batch"}], lr=0.1)
    b = optim.Muon(ones, lr=0.1)
    stack.grad = torch.randn(3, 6, 4)
    for p, g in zip(ones, stack.grad, strict=True):
        p.grad = g.clone()
    a.step()
    b.step()
    torch.testing.assert_close(stack, torch.stack(list(ones)), rtol=1e-5, atol=1e-6)


class Attention(nn.Module):
    """A library's encoder, whose eval mode is one operator, behind weights computed from others."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 1
        )
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.masked = nn.Linear(8, 8)
        self.register_buffer("mask", torch.ones(8, 8))
        self.head = nn.Linear(8, 11)

    def forward(self, ids):
        x, _ = self.rnn(self.encoder(self.embed(ids)))
        x = self.spectral(self.normed(x))
        x = nn.functional.linear(x, self.masked.weight * self.mask, self.masked.bias)
        return {"loss": x.sum(), "logits": self.head(x)}


def test_library_modules_and_computed_weights():
    model = Attention()
    model.spectral.eval()
    groups = optim.param_groups(model, (torch.randint(0, 11, (2, 5)),), verbose=False)
    roles = {n: g["role"] for g in groups for n, _ in g["params"]}
    matrices = {n for n, p in model.named_parameters() if p.ndim == 2 and 1 not in p.shape}
    hidden = {n for n, r in roles.items() if r == "hidden"}
    assert hidden == matrices - {"embed.weight", "head.weight"}
    assert roles["head.weight"] == "head" and roles["embed.weight"] == "embedding"
    assert roles["normed.parametrizations.weight.original0"] == "vector"  # its gains
    assert model.training and not model.spectral.training  # every module in its own mode again
    assert torch.backends.mha.get_fastpath_enabled()
    by_type = optim.param_groups(model, verbose=False)
    assert {n for g in by_type if g["role"] == "hidden" for n, _ in g["params"]} == hidden


def test_lazy_models_are_named():
    with pytest.raises(ValueError, match=r"1\.weight has no shape yet"):
        optim.param_groups(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3)))


class Patches(nn.Module):
    """Images beside tokens, relative positions used as activations, and two heads joined."""

    def __init__(self, d=16):
        super().__init__()
        self.patch = nn.Conv2d(3, d, 4, 4)
        self.frozen = nn.Conv2d(3, 3, 3, padding=1)
        self.frozen.requires_grad_(False)
        self.after = nn.Conv2d(3, d, 4, 4)
        self.words = nn.Embedding(11, d)
        self.places = nn.Embedding(16, d)  # as wide a table as the model
        self.key = nn.Linear(d, d)
        self.value = nn.Linear(d, d)
        self.heads = nn.ModuleList([nn.Linear(d, 7), nn.Linear(d, 7)])

    def forward(self, image, ids):
        x = self.patch((image - 0.5) / 0.2).flatten(2).mT + self.words(ids)
        x = x + self.after(self.frozen(image)).flatten(2).mT
        x = x + (x @ self.key(self.places.weight).T) @ self.value(self.places.weight)
        return torch.stack([head(x) for head in self.heads]).flatten(0, 1)


def test_inputs_tables_and_heads_by_what_they_do():
    groups = optim.param_groups(
        Patches(), (torch.rand(2, 3, 16, 16), torch.zeros(2, 16, dtype=torch.long)), verbose=False
    )
    got = {n.removesuffix(".weight"): r for n, r in roles(groups).items() if "bias" not in n}
    assert got == {
        "patch": "input",  # whatever else is looked up
        "after": "filter",  # what reads a frozen trunk reads no raw input
        "words": "embedding",
        "places": "embedding",  # multiplied, never looked up
        "key": "hidden",
        "value": "hidden",
        "heads.0": "head",
        "heads.1": "head",
    }


def test_what_several_matrices_read_is_a_stream():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            y = self.norm(x)
            return x + F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))

    model = nn.Sequential(Attend(), nn.Linear(8, 3))
    got = roles(optim.param_groups(model, (torch.randn(2, 5, 8),), verbose=False))
    assert {got[f"0.{n}.weight"] for n in "qkv"} == {"hidden"} and got["1.weight"] == "head"


def test_by_type_gains_stacked_biases_and_tables_as_wide_as_the_model():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 8, 12))
            self.up_bias = nn.Parameter(torch.randn(4, 12))

    norm = nn.utils.parametrizations.weight_norm
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Conv1d(4, 6, 3))
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(11, 8),
            "places": nn.Embedding(8, 8),
            "experts": Experts(),
            "conv": norm(nn.Conv1d(4, 6, 3)),
            "depthwise": norm(nn.Conv1d(6, 6, 3, groups=6)),
            "old": old,
            "out": nn.Linear(8, 8),
            "again": nn.Linear(8, 8),
            "head": nn.Linear(8, 11, bias=False),
            "pooler": nn.Linear(8, 5),
        }
    )
    got = roles(optim.param_groups(model, verbose=False))
    assert got["experts.up"] == "stack" and got["experts.up_bias"] == "vector"
    for name, role in (("conv", "filter"), ("depthwise", "vector")):
        assert got[f"{name}.parametrizations.weight.original0"] == "vector"
        assert got[f"{name}.parametrizations.weight.original1"] == role
    assert got["old.weight_g"] == "vector" and got["old.weight_v"] == "filter"
    assert got["out.weight"] == got["again.weight"] == "hidden"
    assert got["head.weight"] == "head"
    model["head"].weight = model["words"].weight  # tied: there is no other head
    got = roles(optim.param_groups(model, verbose=False))
    assert "head" not in got.values() and got["words.weight"] == "embedding"


def test_what_extensions_insert_is_grouped_like_the_models_own():
    model = nn.Sequential(
        nn.Embedding(11, 32), nn.RMSNorm(32), nn.Linear(32, 48), nn.Linear(48, 32)
    )
    args = (torch.zeros(2, 5, dtype=torch.long),)
    for inserted, kinds in (
        ([passes.InsertGatedNorm(sites=["*"]), passes.InsertPreAffine(sites=["*"])],
         {"gate_down": "hidden", "gate_up": "hidden", "pre_affine": "vector"}),
        ([passes.SeeDNorm(sites=["*"])], {"seed_alpha": "vector", "seed_beta": "vector"}),
    ):  # fmt: skip
        extended, _ = normfuse.rewrite(model, args, passes=inserted)
        got = roles(optim.param_groups(extended, args))
        for kind, role in kinds.items():
            assert [got[n] for n in got if n.endswith(kind)] == [role]
        assert set(got) == {n for n, _ in extended.named_parameters()}
