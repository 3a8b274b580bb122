"""The code of ``docs/gating.md`` runs as it stands, in its order."""

import re
from pathlib import Path

import normfuse
import pytest
import torch
from torch import nn

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gating.md"


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(32, d), nn.RMSNorm(d), nn.Linear(d, 32)
        self.blocks = nn.Sequential(Block(d), Block(d))

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.embed(ids))))


def test_the_snippets_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, batches = Model().eval(), [torch.randint(0, 32, (2, 9)) for _ in range(3)]
    with torch.no_grad():
        model.embed.weight[:, 5] = 40.0  # a sink, alike for every token
    names = {"model": model, "batches": batches, "args": (batches[0],), "torch": torch}
    snippets = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(snippets) >= 6
    for snippet in snippets:
        exec(snippet, names)
    assert (tmp_path / "calibration.html").stat().st_size > 1000
    loaded = normfuse.runtime.calibration.Calibration.load("stats.safetensors")
    assert loaded.to_dict() == names["stats"].to_dict()
    assert names["stats"].sites() == ["blocks.0.norm", "blocks.1.norm", "norm"]
    assert "dimension 5 carries" in capsys.readouterr().out
    gated, x = names["gated"], batches[1]
    assert torch.equal(gated(x), model(x))
    trained = {n for n, p in gated.named_parameters() if p.requires_grad}
    assert trained == set(gated.new_parameters) and len(trained) == 6
    assert [site for site, name in names["report"].applied if name == "absorb_outliers"]
    assert not torch.equal(names["w4a4"](x), model(x))
