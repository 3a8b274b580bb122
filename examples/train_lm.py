"""Train a small byte-level language model with any member of the family, on a CPU, in a minute.

    python examples/train_lm.py --optimizer NorMuon
    python examples/train_lm.py --optimizer Muon --steps 400 --checkpoint run.pt   # again to resume
    python examples/train_lm.py --compare all --out members.json                   # a table

The text is the reference prose that ships with Python (``pydoc_data.topics``) unless ``--text`` names
a file. Hidden matrices go to the chosen member, the rest to AdamW in the same optimizer.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from normfuse import optim
from normfuse.runtime.measure import environment
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

#: Learning rates tried by ``--compare``, per member: the grid is part of the result.
GRID = {
    "Muon": (0.01, 0.03, 0.1),
    "NorMuon": (0.01, 0.03, 0.1),
    "ROOT": (0.003, 0.01, 0.03),
    "AuON": (0.3, 1.0, 3.0),
    "HybridAuON": (0.1, 0.3, 1.0),
    "MuonMuP": (0.01, 0.03, 0.1),
    "SCALE": (0.001, 0.003, 0.01),
    "SinkGD": (0.03, 0.1, 0.3),
    "SWAN": (0.001, 0.003, 0.01),
    "AdamW": (0.001, 0.003, 0.01),
    "AdamP": (0.001, 0.003, 0.01),
    "SGDP": (0.1, 0.3, 1.0),
    "Conda": (0.003, 0.01, 0.03),
    "ARO": (0.003, 0.01, 0.03),
}
ENTRIES = {"SGDP": {"momentum": 0.9, "nesterov": True}, "Conda": {"gap": 50}}


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ByteLM(nn.Module):
    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 if p.shape[0] == 256 else p.shape[1] ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.bytes(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def load_text(path: str | None) -> Tensor:
    if path is None:
        from pydoc_data.topics import topics

        raw = "\n".join(topics[k] for k in sorted(topics)).encode()
    else:
        raw = Path(path).read_bytes()
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()


def batch(data: Tensor, size: int, context: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(data) - context - 1, (size,), generator=g)
    rows = starts[:, None] + torch.arange(context + 1)
    return data[rows[:, :-1]], data[rows[:, 1:]]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(
    name: str, lr: float, args: argparse.Namespace, seed: int, show: bool
) -> tuple[list[float], float, float]:
    """``(training losses, validation loss, optimizer milliseconds a step)``."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    data = load_text(args.text)
    cut = int(0.9 * len(data))
    model = ByteLM(args.width, args.layers, context=args.context)
    sample = data[: args.context][None]
    groups = optim.param_groups(model, (sample,), other={"lr": 3e-3}, verbose=show)
    opt = getattr(optim, name)(groups, lr=lr, compile=args.compile, **ENTRIES.get(name, {}))
    sched = torch.optim.lr_scheduler.OneCycleLR(
        opt,
        [gr["lr"] for gr in opt.param_groups],
        total_steps=args.steps,
        pct_start=0.1,
        cycle_momentum=False,
    )
    start, losses = 0, []
    saved = Path(args.checkpoint) if args.checkpoint and show else None
    if saved and saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        sched.load_state_dict(state["schedule"])
        g.set_state(state["generator"])
        start, losses = state["step"], state["losses"]
        print(f"resumed at step {start}")

    def save(step: int) -> None:
        if saved is None:
            return
        state = {
            "model": model.state_dict(),
            "optimizer": opt.state_dict(),
            "schedule": sched.state_dict(),
            "generator": g.get_state(),
            "step": step,
            "losses": losses,
        }
        partial = saved.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(saved)  # a run killed while saving keeps the older file

    times = []
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=not show)
    for step in bar:
        x, y = batch(data[:cut], args.batch, args.context, g)
        loss = loss_of(model, x, y)
        opt.zero_grad()
        loss.backward()
        began = time.perf_counter()
        opt.step()
        times.append(time.perf_counter() - began)
        sched.step()
        losses.append(float(loss.detach()))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
        if (step + 1) % 100 == 0:
            save(step + 1)
    save(args.steps)
    held = torch.Generator().manual_seed(0)
    with torch.no_grad():
        parts = [loss_of(model, *batch(data[cut:], 64, args.context, held)) for _ in range(4)]
    step_ms = 1e3 * statistics.median(times) if times else float("nan")
    return losses, float(torch.stack(parts).mean()), step_ms


def compare(args: argparse.Namespace) -> None:
    """Every member at every rate of its grid, the same steps, data and seeds; the best rate's mean."""
    rows = []
    print(f"{args.steps} steps, {args.seeds} seeds; every learning rate of each grid was run")
    for name in args.compare:
        runs: dict[float, list[float]] = {}
        times = []
        for lr in GRID[name]:
            done = [train(name, lr, args, seed, False) for seed in range(args.seeds)]
            runs[lr] = [d[1] for d in done]
            times += [d[2] for d in done]
        finite = {lr: statistics.mean(v) for lr, v in runs.items() if all(map(math.isfinite, v))}
        best = min(finite, key=finite.__getitem__) if finite else GRID[name][0]
        values = runs[best]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        edge = best in (GRID[name][0], GRID[name][-1])
        row = {
            "member": name,
            "lr": best,
            "at the grid's edge": edge,
            "validation": statistics.mean(values),
            "deviation": spread,
            "step ms": statistics.median(times),
            "runs": {f"{lr:g}": v for lr, v in runs.items()},
        }
        rows.append(row)
        print(
            f"{name:<12}{best:>8g}{row['validation']:>10.4f} ± {spread:.4f}"
            f"{row['step ms']:>10.2f} ms   {GRID[name]}",
            flush=True,
        )
    if args.out:
        settings = ("steps", "batch", "context", "width", "layers", "seeds", "text")
        record = {
            "kind": "train_lm",
            "environment": environment(),
            "settings": {k: getattr(args, k) for k in settings},
            "members": rows,
        }
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--optimizer", choices=sorted(GRID), default="Muon")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--text", help="a file to train on")
    parser.add_argument("--checkpoint", help="saved every 100 steps; resumed from if it exists")
    parser.add_argument("--plot", help="where to write the loss curve (needs matplotlib)")
    parser.add_argument("--compile", action="store_true", help="compile the optimizer's step")
    parser.add_argument("--compare", nargs="+", choices=["all", *sorted(GRID)], metavar="MEMBER")
    parser.add_argument("--out", help="JSON of what --compare found")
    args = parser.parse_args()
    if args.compare:
        if "all" in args.compare:
            args.compare = list(GRID)
        compare(args)
        return
    lr = GRID[args.optimizer][1] if args.lr is None else args.lr
    losses, validation, ms = train(args.optimizer, lr, args, 0, True)
    print(f"validation loss {validation:.4f}, optimizer {ms:.2f} ms a step")
    if args.plot:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        plt.plot(losses)
        plt.xlabel("step")
        plt.ylabel("loss (nats per byte)")
        plt.title(f"{args.optimizer}, lr {lr:g}")
        plt.savefig(args.plot, dpi=120)


if __name__ == "__main__":
    main()
