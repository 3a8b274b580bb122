"""Make a GPT-2 ready for rotation-based quantization, and rotate it.

Rotation methods (QuaRot, SpinQuant) multiply the residual stream by an orthogonal matrix Q and undo
it in the weights around it, so that outliers spread over all channels. That is exact only if the
norms on the stream commute with Q: an RMSNorm without a gain does, a LayerNorm or a gain does not.
The preset "rotation_ready" folds every gain and bias into the layers that read it and centers what
writes to the stream, which turns LayerNorms into plain RMSNorms.

The weights are random, with the gains, means and the outlier channel a trained model would have. The
whole run takes less than a minute:

    python examples/rotation_ready.py
"""

from __future__ import annotations

import copy
import sys

import normfuse
import torch
from torch import nn

try:
    from transformers import GPT2Config, GPT2LMHeadModel
except ImportError:
    sys.exit("this example needs transformers: pip install -c constraints.txt -e '.[models]'")


def gpt2(d: int = 192, layers: int = 4) -> nn.Module:
    config = GPT2Config(
        n_embd=d, n_layer=layers, n_head=4, vocab_size=1000, n_positions=64,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # gains, biases and means a trained model would have
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.3 if ".ln_" in name else 0.02))
        model.transformer.wte.weight[:, 3] += 2.0  # an outlier channel
    return model


@torch.no_grad()
def rotate(model: nn.Module, q: torch.Tensor) -> None:
    """Rotate the residual stream of a GPT-2 in place: writers end in Q, readers begin with Qᵀ.

    ``Conv1D`` weights are stored as ``(in, out)``, embeddings and the head as ``(rows, d)``.
    """
    for name, p in model.named_parameters():
        part = name.split(".", 1)[1] if name.startswith("transformer.") else name
        if part in ("wte.weight", "wpe.weight", "lm_head.weight") or ".c_proj." in part:
            p.copy_(p @ q)
        elif part.endswith(("c_attn.weight", "c_fc.weight")):  # readers
            p.copy_(q.T @ p)


@torch.no_grad()
def kurtosis(model: nn.Module, ids: torch.Tensor) -> float:
    """How heavy-tailed the embedding's output is: 3 for Gaussian values, large with outliers."""
    x = nn.functional.embedding(ids, model.get_parameter("transformer.wte.weight")).flatten()
    return ((x - x.mean()) ** 4).mean().item() / x.var().item() ** 2


def main() -> None:
    model = gpt2().double()  # the claim is algebra: check it where rounding cannot hide anything
    ids = torch.randint(1000, (2, 32), generator=torch.Generator().manual_seed(1))
    d = model.config.n_embd
    q, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))

    def logits(m: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return m(ids, use_cache=False).logits

    def change(m: nn.Module) -> float:
        reference = logits(model)
        return ((logits(m) - reference).abs().max() / reference.abs().max()).item()

    ready, report = normfuse.rewrite(
        model, (ids,), {"use_cache": False}, passes="rotation_ready", weights="baked"
    )
    print(report)

    naive = copy.deepcopy(model)
    rotate(naive, q)
    prepared = change(ready)
    before = kurtosis(ready, ids)
    rotate(ready, q)
    rotated = change(ready)
    print("\nLargest change of the logits, relative to the largest logit:")
    print(f"  rotation-ready, not rotated       {prepared:.1e}")
    print(f"  rotation-ready, rotated           {rotated:.1e}")
    print(f"  rotated without preparation       {change(naive):.1e}")
    print(
        f"\nKurtosis of the embedded tokens: {before:.1f} before, {kurtosis(ready, ids):.1f} after"
    )
    if max(prepared, rotated) > 1e-10:
        sys.exit("the rotation changed the logits")


if __name__ == "__main__":
    main()
