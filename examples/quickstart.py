"""Train a small byte-level GPT on real text, compile it with normfuse, and check every claim.

The text is Python's own standard library, which every machine with Python has. The run takes two to
four minutes on two CPU cores: train (one minute, so expect a model that knows bytes, not Python),
compile, compare logits and generated text with eager, then time eager, Inductor and normfuse side
by side.

    python examples/quickstart.py [--seconds 60] [--html report.html]
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import time
from pathlib import Path

import normfuse
import torch
import torch.nn.functional as F
from normfuse.runtime.measure import interleaved, paired_ratio, timings
from torch import nn
from tqdm import tqdm

CONTEXT = 128
LEARNING_RATE = 2e-3
HELD_OUT = 200_000  # bytes


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.ln1(x)
        q, k, v = (
            f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class ByteGPT(nn.Module):
    """Pre-LayerNorm decoder: bytes ``(batch, time)`` to logits ``(batch, time, 256)``."""

    def __init__(self, d: int = 192, layers: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, d), nn.Embedding(CONTEXT, d)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(layers))
        self.ln = nn.LayerNorm(d)
        self.head = nn.Linear(d, 256, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.bytes(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))


def corpus() -> torch.Tensor:
    """The standard library's top-level modules as one row of bytes, indented by tabs."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    if not files:
        sys.exit(f"no Python sources in {folder}")
    text = b"\n".join(f.read_bytes() for f in files).replace(b"    ", b"\t")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batch(data: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(data) - CONTEXT - 1, (size, 1), generator=generator)
    return data[starts + torch.arange(CONTEXT + 1)].long()


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(model: nn.Module, data: torch.Tensor, seconds: float) -> None:
    """AdamW for a fixed time; the learning rate follows the clock."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    start = time.monotonic()
    with tqdm(
        total=round(seconds),
        unit="s",
        desc="training",
        bar_format=("{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total} s {postfix}"),
    ) as bar:
        while (elapsed := time.monotonic() - start) < seconds:
            warm = min(1.0, elapsed / (0.05 * seconds) + 0.05)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * warm * (1 - 0.9 * elapsed / seconds)
            loss = loss_of(model, batch(data, 8, generator))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar.set_postfix_str(f"loss {loss.item() / 0.6931:.2f} bits per byte")
            bar.update(min(time.monotonic() - start, seconds) - bar.n)


@torch.no_grad()
def generate(model: nn.Module, prompt: bytes, length: int) -> list[int]:
    """Greedy continuation. The window is padded on the right, where a causal model never looks, so
    that every step has one shape."""
    ids = list(prompt)
    for _ in range(length):
        window = ids[-CONTEXT:]
        padded = torch.tensor([window + [0] * (CONTEXT - len(window))])
        ids.append(int(model(padded)[0, len(window) - 1].argmax()))
    return ids[len(prompt) :]


def check(model: nn.Module, fast: nn.Module, held_out: torch.Tensor) -> bool:
    """Logits, next bytes and generated text against eager; prints all three."""
    ids = batch(held_out, 8, torch.Generator().manual_seed(1))[:, :-1]
    with torch.no_grad():
        eager = torch.cat([model(row[None]) for row in ids])
        ours = torch.cat([fast(row[None]) for row in ids])
        exact = model.double()(ids)
        model.float()

    def error(x: torch.Tensor) -> float:
        return ((x - exact).abs().max() / exact.abs().max()).item()

    print("\nLogits on held-out text, largest error relative to the largest logit:")
    print(f"  eager float32 vs. float64     {error(eager):.2e}")
    print(f"  normfuse float32 vs. float64  {error(ours):.2e}")
    print(f"  normfuse vs. eager            {(ours - eager).abs().max() / eager.abs().max():.2e}")
    same = int((eager.argmax(-1) == ours.argmax(-1)).sum())
    print(f"  same next byte at {same:,} of {ids.numel():,} positions")

    print("\nGreedy generation (prompt | continuation):")
    identical = True
    for row in ids[:4].tolist():
        prompt, length = bytes(row[:48]), 80
        expected, got = generate(model, prompt, length), generate(fast, prompt, length)
        end, text = prompt[-24:].decode(errors="replace"), bytes(got).decode(errors="replace")
        print(f"  {end!r} | {text!r}")
        if got != expected:
            identical = False
            first = next(i for i in range(length) if got[i] != expected[i])
            print(f"  DIFFERS from eager at byte {first}: {bytes(expected)!r}")
    if identical:
        print("  identical to eager, token for token")
    return identical


def race(model: nn.Module) -> None:
    """Eager, Inductor and normfuse, interleaved call by call."""
    print(f"\nInference, median of interleaved rounds ({torch.get_num_threads()} threads):")
    print(
        f"  {'batch×bytes':<12}{'eager':>10}{'Inductor':>10}{'normfuse':>10}   vs. Inductor [95 %]"
    )
    for rows, length in ((1, 1), (1, 16), (2, 128)):
        torch._dynamo.reset()
        ids = torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(2))
        models = {
            "eager": model,
            "inductor": torch.compile(model, dynamic=False),
            "normfuse": torch.compile(model, backend="normfuse", dynamic=False),
        }

        def call(f: nn.Module, ids: torch.Tensor = ids) -> torch.Tensor:
            with torch.no_grad():
                return f(ids)

        times = interleaved({n: lambda f=f: call(f) for n, f in models.items()}, rounds=21)
        row = "".join(f"{t.median * 1e3:>7.2f} ms" for t in timings(times).values())
        ratio = paired_ratio(times["inductor"], times["normfuse"])
        print(f"  {f'{rows}×{length}':<12}{row}   {ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="time to train")
    parser.add_argument("--html", help="also write the report as a page")
    options = parser.parse_args()

    torch.manual_seed(0)
    data = corpus()
    model = ByteGPT()
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.1f} M parameters, {len(data) / 1e6:.1f} MB of Python source")
    train(model, data[:-HELD_OUT], options.seconds)
    model.eval()

    fast = torch.compile(model, backend="normfuse", options={"verify": True})
    with torch.no_grad():
        fast(torch.zeros(1, CONTEXT, dtype=torch.long))
    report = normfuse.reports()[-1]
    print(f"\n{report}")
    if options.html:
        normfuse.explain(model, (torch.zeros(1, CONTEXT, dtype=torch.long),)).to_html(options.html)
        print(f"wrote {options.html}")

    same = check(model, fast, data[-HELD_OUT:])
    race(model)
    if not same:
        sys.exit("generated text differs from eager")


if __name__ == "__main__":
    main()
