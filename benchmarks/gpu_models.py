"""Whole models on the GPU at hand: normfuse against Inductor's max-autotune and eager PyTorch.

    python benchmarks/gpu_models.py [--quick] [--only NAME] [--no-training]

A GPT-2-medium-like decoder, a Llama-1B-like one (RMSNorm, SwiGLU, grouped-query attention) and a
ViT-L-like encoder, random weights, bfloat16: inference at 1, 8, 64 and 2,048 tokens, and a training step.
A result is compared with float32 first (wrong ones are not timed). Every contestant is captured in a
CUDA graph of ours, so that none pays for launches from Python; medians. The weights of every model are
larger than any L2 cache, so each replay reads them from memory anew. The floor is the weights read once
at the measured copy bandwidth, or two FLOPs per weight and token at the measured product speed.

Writes JSON and Markdown into ``benchmarks/results/``. Needs no network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor
import torch.nn.functional as F
from gpu_timing import (
    Floors,
    failed,
    geometric_mean,
    graph_seconds,
    is_right,
    measure_floors,
    plain_seconds,
    problems,
    require_gpu,
    table,
    worst,
    write,
)
from models import GeluMLP, rotate
from normfuse.runtime.backend import clear_reports, reports
from torch import nn

DTYPE = torch.bfloat16
TOKENS = (1, 8, 64, 2048)
TRAINING_TOKENS = 2048


class Attention(nn.Module):
    """Attention with fewer heads for keys and values; queries, keys and values from one layer."""

    def __init__(self, d: int, heads: int, kv: int, bias: bool, causal: bool, rotary: bool) -> None:
        super().__init__()
        self.heads, self.kv, self.causal, self.rotary = heads, kv, causal, rotary
        self.width = d // heads
        self.q = nn.Linear(d, d, bias=bias)
        self.k, self.v = (nn.Linear(d, kv * self.width, bias=bias) for _ in range(2))
        self.out = nn.Linear(d, d, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            f(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        if self.rotary:
            q, k = rotate(q), rotate(k)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, enable_gqa=self.kv != self.heads
        )
        return self.out(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(d, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, d, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module], attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention, self.mlp = norm(), norm(), attention, mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """``[1, tokens]`` ids (or ``[1, tokens, patch]`` numbers) to ``[1, tokens, out]``."""

    def __init__(self, embed: nn.Module, blocks: list[Block], norm: nn.Module, out: int) -> None:
        super().__init__()
        self.embed, self.blocks, self.norm = embed, nn.ModuleList(blocks), norm
        d = next(norm.parameters()).shape[0]
        self.head = nn.Linear(d, out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Spec:
    """A model to measure; ``vocabulary`` is 0 for one that reads patches."""

    name: str
    d: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    rms: bool = False
    causal: bool = True
    patch: int = 768

    def build(self) -> Model:
        """On the default device, gains and biases away from their initial values."""
        torch.manual_seed(0)

        def norm() -> nn.Module:
            return nn.RMSNorm(self.d, eps=1e-5) if self.rms else nn.LayerNorm(self.d)

        def mlp() -> nn.Module:
            return SwiGLU(self.d, self.hidden) if self.rms else GeluMLP(self.d)

        blocks = [
            Block(
                norm,
                Attention(self.d, self.heads, self.kv_heads, not self.rms, self.causal, self.rms),
                mlp(),
            )
            for _ in range(self.layers)
        ]
        embed: nn.Module = nn.Embedding(self.vocabulary or 1, self.d)
        if not self.vocabulary:
            embed = nn.Linear(self.patch, self.d)
        model = Model(embed, blocks, norm(), self.vocabulary or 1000)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                    for p in module.parameters():
                        p.add_(torch.randn_like(p) * 0.1)
        return model

    def inputs(self, tokens: int, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
        if self.vocabulary:
            return torch.randint(self.vocabulary, (1, tokens), device=device)
        return torch.randn(1, tokens, self.patch, device=device).to(dtype)

    def product_weights(self) -> int:
        """Weights that are multiplied (all but an embedding's table)."""
        mlp = 3 * self.d * self.hidden if self.rms else 8 * self.d**2
        attention = 2 * self.d**2 + 2 * self.d * self.kv_heads * (self.d // self.heads)
        ends = self.vocabulary * self.d if self.vocabulary else (self.patch + 1000) * self.d
        return self.layers * (mlp + attention) + ends


SPECS = (
    Spec("GPT-2-medium-like", 1024, 24, 16, 16, 4096, 50257),
    Spec("Llama-1B-like", 2048, 16, 32, 8, 8192, 128256, rms=True),
    Spec("ViT-L-like", 1024, 24, 16, 16, 4096, 0, causal=False),
)


def floor(spec: Spec, tokens: int, floors: Floors, training: bool) -> float:
    """Weights read once, two FLOPs per weight and token; a training step writes gradients as well and
    reads weights twice, and does three times the FLOPs."""
    weights = spec.product_weights()
    moved = weights * DTYPE.itemsize * (3 if training else 1)
    return floors.seconds(moved, 2.0 * weights * tokens * (3 if training else 1))


def step(model: Callable[..., Any], parameters: list[torch.Tensor], x: torch.Tensor) -> Any:
    """Loss and gradients of all parameters."""
    loss = model(x).float().square().mean()
    return loss, *torch.autograd.grad(loss, parameters)


def contestants(model: nn.Module) -> dict[str, Callable[..., Any]]:
    """All under the options of Inductor's max-autotune; ours raise where something of theirs fails."""
    mode = "max-autotune-no-cudagraphs"
    inductor = {"strict": True, **torch._inductor.list_mode_options(mode)}
    ours = {"kernels": True, **inductor}
    return {
        "eager": model,
        "max-autotune": torch.compile(model, mode=mode, dynamic=False),
        "without kernels": torch.compile(
            model, backend="normfuse", options=inductor, dynamic=False
        ),
        "ours": torch.compile(model, backend="normfuse", options=ours, dynamic=False),
    }


def measure(spec: Spec, tokens: int, training: bool, floors: Floors, device: torch.device) -> dict:
    """One row of the table."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    with device:
        model = spec.build().to(DTYPE)
    model.train(training)
    x = spec.inputs(tokens, device, DTYPE)
    parameters = [p for n, p in model.named_parameters() if training and p.requires_grad]

    def run(f: Callable[..., Any], x: torch.Tensor = x) -> Any:
        if training:
            return step(f, parameters, x)
        with torch.no_grad():
            return f(x)

    truth = reference(spec, model, x, training)
    row: dict[str, Any] = {
        "name": f"{spec.name}, {'training step' if training else 'inference'}, {tokens} tokens",
        "floor": floor(spec, tokens, floors, training),
        "seconds": {},
        "errors": {},
    }
    for name, f in contestants(model).items():
        clear_reports()
        try:
            row["errors"][name] = worst(_compared(run(f)), truth)
        except Exception as problem:
            failed(row, name, problem)
            if name == "eager":  # nothing to compare with
                return failed(row, "ours", problem)
            continue
        notes = [note for report in reports() for note in report.notes]
        if name == "ours":  # which sites got a kernel, and why
            row["kernels"] = [note for note in notes if note.startswith("kernel ")]
        if not is_right(row["errors"][name], row["errors"]["eager"], DTYPE):
            row.update(wrong=True, error=row["errors"][name], eager_error=row["errors"]["eager"])
            return row
        try:
            row["seconds"][name] = graph_seconds([lambda f=f: run(f)])
        except RuntimeError as problem:
            row.setdefault("not_captured", {})[name] = f"{problem}"[:200]
            torch.cuda.synchronize()
            row["seconds"][name] = plain_seconds(lambda f=f: run(f))
    return row


def _compared(result: Any) -> tuple[torch.Tensor, ...]:
    """Inference: the result. Training: the gradients as one vector, and the loss."""
    if isinstance(result, torch.Tensor):
        return (result,)
    return result[0], torch.cat([g.flatten() for g in result[1:]])


def reference(spec: Spec, model: nn.Module, x: torch.Tensor, training: bool) -> Any:
    """The same weights in float32 (float64 of a model this size would not fit)."""
    wide = spec.build().to(x.device)
    wide.load_state_dict(model.state_dict())
    x = x.float() if x.is_floating_point() else x
    if training:
        return tuple(t.detach() for t in _compared(step(wide, list(wide.parameters()), x)))
    with torch.no_grad():
        return (wide(x),)


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Against the targets: geometric mean at up to 64 tokens of inference, and the lowest anywhere."""
    ratios = {
        r["name"]: r["seconds"]["max-autotune"] / r["seconds"]["ours"]
        for r in rows
        if {"ours", "max-autotune"} <= set(r["seconds"])
    }
    few = [v for n, v in ratios.items() if "inference" in n and " 2048 tokens" not in n]
    return {
        "mean_few_tokens": geometric_mean(few),
        "lowest": min(ratios.values(), default=float("nan")),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Whole models: normfuse, max-autotune, eager.")
    parser.add_argument("--quick", action="store_true", help="one token count, no training")
    parser.add_argument("--no-training", action="store_true", help="inference only")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    options = parser.parse_args(argv)
    device = require_gpu()
    floors = measure_floors(DTYPE)
    rows: list[dict[str, Any]] = []
    try:
        for spec in SPECS:
            if options.only.lower() not in spec.name.lower():
                continue
            jobs = [(t, False) for t in ((8,) if options.quick else TOKENS)]
            if not (options.quick or options.no_training):
                jobs.append((TRAINING_TOKENS, True))
            for tokens, training in jobs:
                rows.append(measure(spec, tokens, training, floors, device))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    finally:  # also of a run that was stopped
        file = write("models", floors, rows, summary=summary(rows))
        print(f"{summary(rows)}\nwritten to {file}")
    if problems(rows):
        sys.exit("some results are wrong or failed: see above")


if __name__ == "__main__":
    main()
