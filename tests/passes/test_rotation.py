"""The preset ``rotation_ready``: what it leaves, and that a rotation commutes with what it made."""

import normfuse
import pytest
import torch
from stream_models import randomize
from torch import nn


class Block(nn.Module):
    def __init__(self, d, post, raw):
        super().__init__()
        self.norm, self.fc, self.post, self.raw = nn.LayerNorm(d), nn.Linear(d, d), post, raw
        self.out = nn.Linear(d, d)

    def forward(self, x):
        if self.post:
            return self.norm(x + self.out(torch.tanh(self.fc(x))))
        h = self.norm(x)
        y = self.out(torch.tanh(self.fc(h)))
        return x + (y * torch.sigmoid(h) if self.raw else y)


class Model(nn.Module):
    def __init__(self, post=False, raw=False, d=6):
        super().__init__()
        self.embed = nn.Embedding(11, d)
        self.blocks = nn.ModuleList(Block(d, post, raw) for _ in range(2))
        self.final, self.head = nn.LayerNorm(d), nn.Linear(d, 5)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.final(x))


def notes(model, passes="rotation_ready", **options):
    args = (torch.arange(4)[None],)
    _, report = normfuse.rewrite(randomize(model).eval(), args, passes=passes, **options)
    return [n for n in report.notes if "not rotation-ready" in n]


def test_nothing_is_said_of_a_model_that_is_ready():
    assert notes(Model()) == []


def test_norms_of_queries_are_on_no_residual_stream():
    class Queries(Model):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6)
            self.q_norm = nn.RMSNorm(3)

        def forward(self, ids):
            h = self.final(self.embed(ids) + self.embed(ids + 1))
            q = self.q_norm(self.q(h).unflatten(-1, (2, 3)))
            return torch.softmax(q @ self.k(h).unflatten(-1, (2, 3)).mT, -1)

    assert notes(Queries()) == []


@pytest.mark.parametrize(
    ("options", "counted", "reason"),
    [
        ({"post": True}, "2 of 2 ", "blocks.0.norm (its input's mean is removed first: one of its"),
        ({"raw": True}, "2 of 3 ", "blocks.0.norm (it"),
    ],
)
def test_what_stays_is_counted_and_named_with_its_reason(options, counted, reason):
    [note] = notes(Model(**options))
    assert note.startswith(counted) and reason in note
    assert "test_rotation.py:" in note  # where the reader is that would not have it


def test_other_presets_say_nothing():
    assert notes(Model(post=True), "exact") == []


def test_disabled_passes_leave_gains_that_are_counted():
    [note] = notes(Model(), disable=["fold_affine"])
    assert note.startswith("3 of 3 ") and "it has a gain" in note
