"""Outliers, gates and 4-bit inference: train a small language model with and without gated norms.

Run ``python examples/gated_rescaling.py`` (two CPU cores, half an hour; ``--quick`` for two minutes that
show the mechanics and prove nothing). It

1. trains a byte-level pre-RMSNorm transformer on the Python standard library's own sources, plain
   and with a gate inserted behind every norm, from the same seeds and in the same data order;
2. follows the outlier figures during training with ``normfuse.calibrate``;
3. measures the loss at full precision and simulated W8A8 and W4A4;
4. inserts gates into the *trained* plain model, checks that nothing changes, trains only the gates;
5. does the same with a residual sink planted in the embedding before training: on real text, as in 1,
   models of this size grow none by themselves (``--search`` tries larger learning rates, more depth,
   longer runs, frozen gains and a begin token), and a cure needs a disease. There the outliers are also
   absorbed into biases;
6. does the same where a residual sink grows by itself on real text: gated hidden layers (SwiGLU), gains
   that stay at 1, and a large learning rate together;
7. does the same on a task where a sink grows by itself: bigrams with a rare copying rule
   ("bigram-backcopy"). A head that has nothing to copy for most tokens rests on the first one. Gates
   behind the attention are trained there as well.

The table is printed whichever way it comes out, with the spread over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import normfuse
import torch
import torch.nn.functional as F
from normfuse import passes
from normfuse.runtime.calibration import SINK_MASS, SINK_RATIO
from normfuse.runtime.measure import environment as measure_environment
from normfuse.runtime.probes import ProbeInterpreter, find_probes
from normfuse.runtime.quantize_sim import quantize_linears
from torch import nn

SETTINGS = {"d": 128, "depth": 6, "heads": 4, "length": 128, "batch": 8, "lr": 2e-3, "decay": 0.1}
SMALL = {"d": 64, "depth": 4, "length": 64, "lr": 1e-2, "decay": 0.0}
BACKCOPY = {"task": "backcopy", "d": 64, "depth": 1, "heads": 1, "length": 64, "batch": 16,
            "attention_gates": True}  # fmt: skip
#: What differs from SETTINGS: "plant" is the value of one embedding channel, alike for every byte;
#: "task" is what the windows hold (text, text behind a begin token, or bigrams with a copying rule);
#: "glu" multiplies the hidden layer by a second one; "frozen_gains" leaves the norms' gains at 1.
REGIMES: dict[str, dict] = {
    "default": {},
    "planted sink": SMALL | {"plant": 30.0, "steps": 500},
    "grown residual sink": SMALL
    | {
        "depth": 3,
        "heads": 2,
        "batch": 16,
        "glu": True,
        "frozen_gains": True,
        "lr": 3e-2,
        "steps": 600,
        "absorb": True,
    },
    "grown sink": BACKCOPY | {"lr": 3e-3, "decay": 0.0, "steps": 1500},
}
PLANTED = 7  # the channel
BEGIN = 256  # the token at position 0, where a task has one
#: Plain models trained to see whether a sink grows: changes to SETTINGS.
SEARCH: list[dict] = [
    SMALL | {"depth": 6, "steps": 300},
    SMALL | {"depth": 6, "lr": 3e-2, "steps": 300},
    SMALL | {"depth": 6, "lr": 3e-2, "decay": 0.1, "steps": 300},
    SMALL | {"depth": 12, "steps": 300},
    SMALL | {"depth": 6, "lr": 1e-1, "steps": 300},
    SMALL | {"decay": 0.1, "steps": 1500},
    SMALL | {"lr": 3e-2, "steps": 1500},
    SMALL | {"frozen_gains": True, "steps": 1500},
    SMALL | {"task": "begin", "lr": 3e-3, "decay": 0.1, "batch": 16, "steps": 2000},
    SMALL | {"task": "begin", "depth": 6, "heads": 2, "batch": 16, "steps": 1500},
    SMALL | {"task": "begin", "heads": 8, "length": 128, "lr": 3e-3, "decay": 0.5, "steps": 1500},
]


class Block(nn.Module):
    def __init__(self, d: int, heads: int, glu: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.gate = nn.Linear(d, 4 * d, bias=False) if glu else None
        self.norm1, self.norm2 = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        if self.gate is None:
            return x + self.down(F.silu(self.up(h)))
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class ByteLM(nn.Module):
    def __init__(self, settings: dict, vocabulary: int = 256) -> None:
        super().__init__()
        d, depth, heads, length = (settings[k] for k in ("d", "depth", "heads", "length"))
        self.embed, self.place = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        glu = settings.get("glu", False)
        self.blocks = nn.ModuleList(Block(d, heads, glu) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(d, eps=1e-6), nn.Linear(d, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                scale = (
                    0.02 / math.sqrt(2 * depth)
                    if name.endswith(("out.weight", "down.weight"))
                    else 0.02
                )
                nn.init.normal_(p, std=scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def text(limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the standard library's sources; one file in ten is held out for evaluation."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    train, held = bytearray(), bytearray()
    for i, f in enumerate(files):
        (held if i % 10 == 0 else train).extend(f.read_bytes())
    make = lambda b: torch.frombuffer(b[:limit], dtype=torch.uint8).long()  # noqa: E731
    return make(train), make(held)


Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


class Text:
    """Windows of a text, behind a begin token if so wanted: inputs and what comes next."""

    vocabulary = 256

    def __init__(self, data: torch.Tensor, begin: bool = False) -> None:
        self.data, self.begin, self.device = data, begin, data.device
        self.vocabulary += begin

    def windows(self, batch: int, length: int, seed: int, steps: int) -> Batches:
        """The same windows in the same order for the same seed."""
        g = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            at = torch.randint(0, len(self.data) - length - 1, (batch,), generator=g)
            rows = torch.stack([self.data[i : i + length + 1] for i in at.tolist()])
            if self.begin:
                rows = F.pad(rows[:, :-1], (1, 0), value=BEGIN)
            yield rows[:, :-1], rows[:, 1:]


class Backcopy(Text):
    """Bytes drawn from a text's bigrams behind a begin token; after a trigger comes what preceded it.

    The bigram-backcopy task of "Active-dormant attention heads" (Guo et al., 2024). Most tokens need
    no more than their own embedding; only behind one of the few ``TRIGGERS`` must a model look back.
    """

    TRIGGERS = b"sif"

    def __init__(self, data: torch.Tensor) -> None:
        super().__init__(data.cpu(), begin=True)
        self.device = data.device
        pairs = self.data[:-1] * 256 + self.data[1:]
        counts = torch.bincount(pairs, minlength=256 * 256).view(256, 256).double()
        counts = torch.cat([counts, counts.sum(0, keepdim=True)])  # BEGIN: single frequencies
        self.cumulative = counts.cumsum(1)
        self.trigger = torch.zeros(self.vocabulary, dtype=torch.bool)
        self.trigger[list(self.TRIGGERS)] = True

    def windows(self, batch: int, length: int, seed: int, steps: int) -> Batches:
        g = torch.Generator().manual_seed(seed)
        block = 50  # batches drawn together, token by token
        for start in range(0, steps, block):
            rows = torch.full((batch * block, length + 1), BEGIN)
            for t in range(1, length + 1):
                last = self.cumulative[rows[:, t - 1]]
                u = torch.rand(len(rows), 1, generator=g, dtype=torch.float64) * last[:, -1:]
                drawn = torch.searchsorted(last, u, right=True)[:, 0].clamp_max(255)
                back = rows[:, max(t - 2, 0)]
                copied = self.trigger[rows[:, t - 1]] & (back != BEGIN)
                rows[:, t] = torch.where(copied, back, drawn)
            for part in rows.to(self.device).split(batch)[: steps - start]:
                yield part[:, :-1], part[:, 1:]


def source(data: torch.Tensor, settings: dict) -> Text:
    """What ``settings`` trains on, made from the text ``data``."""
    task = settings.get("task", "text")
    return Backcopy(data) if task == "backcopy" else Text(data, begin=task == "begin")


def loss_of(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())


@torch.no_grad()
def evaluate(model, batches) -> float:
    """Mean loss in bits per byte."""
    return statistics.fmean(float(loss_of(model, x, y)) for x, y in batches) / math.log(2)


def train(model, parameters, data, settings, seed, steps, watch=None) -> float:
    """AdamW with warm-up and cosine decay; returns the mean loss of the last tenth of the steps."""
    decay = [p for p in parameters if p.dim() >= 2]
    rest = [p for p in parameters if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": settings["decay"]}]
    groups += [{"params": rest, "weight_decay": 0.0}] if rest else []
    opt = torch.optim.AdamW(groups, lr=settings["lr"], betas=(0.9, 0.95))
    warm = max(1, steps // 20)
    losses = []
    for i, (x, y) in enumerate(data.windows(settings["batch"], settings["length"], seed, steps)):
        rate = min(1.0, (i + 1) / warm) * (0.1 + 0.45 * (1 + math.cos(math.pi * i / steps)))
        for group in opt.param_groups:
            group["lr"] = settings["lr"] * rate
        loss = loss_of(model, x, y)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()
        losses.append(float(loss.detach()))
        if watch is not None and (i + 1) % max(1, steps // 4) == 0:
            watch(i + 1)
    return statistics.fmean(losses[-max(1, steps // 10) :])


def captured(model, example):
    return (
        model
        if isinstance(model, torch.fx.GraphModule)
        else passes.capture(model, (example,), dynamic=False)
    )


def first_norm(model, ids) -> float:
    """The first token's norm over the median token's, the largest on the residual stream."""
    gm = captured(model, ids)
    found = []

    def see(probe, value) -> None:
        if probe.kind == "stream":
            norms = value.norm(dim=-1)
            found.append(float(norms[:, 0].mean() / norms[:, 1:].median()))

    ignore = lambda *_: None  # noqa: E731
    with torch.no_grad():
        ProbeInterpreter(gm, find_probes(gm), see, ignore, ignore).run(ids)
    return max(found)


def outliers(model, batches) -> dict[str, float]:
    """The worst figure over the residual stream, the linear inputs and the heads."""
    stats = normfuse.calibrate(model, [x for x, _ in batches], progress=False)
    streams = [e.figures() for e in stats.of_kind("stream")]
    linears = [e.figures() for e in stats.of_kind("linear")]
    heads = [e.figures() for e in stats.of_kind("attention")]
    return {
        "stream_max_to_median": max(f["max_to_median"] for f in streams),
        "stream_top_share": max(f["top_channel_share"] for f in streams),
        "linear_peak": max(f["row_peak_p99"] for f in linears),
        "first_key_mass": max(f.get("first_mass_max", 0.0) for f in heads),
        "first_value": min(f.get("first_value_ratio", math.nan) for f in heads),
        "first_norm": first_norm(model, batches[0][0]),
        "sinks": len(stats.sinks()),
        "sink_heads": sum(len(h) for _, h in stats.attention_sinks()),
    }


def trained(model: nn.Module, settings: dict) -> list[nn.Parameter]:
    """What is trained: everything, or everything but the norms' gains."""
    frozen = settings.get("frozen_gains", False)
    return [p for p in model.parameters() if p.dim() > 1 or not frozen]


class Watch:
    """Called during training; appends the outlier figures to a list."""

    def __init__(self, model, batches, out) -> None:
        self.model, self.batches, self.out = model, batches, out

    def __call__(self, step: int) -> None:
        self.out.append({"step": step} | outliers(self.model, self.batches))


def extended(model, example, attention: bool = False):
    """The captured model with a gate behind every norm of the residual stream, or every attention."""
    gate = passes.InsertGatedAttention(per="element") if attention else passes.InsertGatedNorm()
    gm, report = passes.PassManager([gate], passes.Context(training=True)).run(
        captured(model, example)
    )
    sites = len(model.blocks) if attention else 2 * len(model.blocks) + 1
    assert len(report.applied) == sites, report.refused
    return gm


def measure(model, example, held) -> dict[str, float]:
    """Loss at full precision and simulated low precision, and the outlier figures."""
    gm = captured(model, example)
    row = {"loss": evaluate(gm, held)}
    for name, bits in (("w8a8", 8), ("w4a4", 4)):
        row[name] = evaluate(quantize_linears(gm, bits, bits), held)
        row[f"{name}_lost"] = row[name] - row["loss"]
    return row | outliers(gm, held[:2])


def one_seed(seed: int, settings: dict, steps: int, tune: int, data, held) -> dict:
    """Plain and gated from the same initialization and data; then gates on the trained plain model."""
    example = held[0][0]
    rows: dict[str, dict] = {}
    history: dict[str, list] = {}

    def fresh():
        torch.manual_seed(seed)
        model = ByteLM(settings, data.vocabulary)
        if "plant" in settings:
            with torch.no_grad():
                model.embed.weight[:, PLANTED] = settings["plant"]
        return model.to(data.device)

    plain = fresh()
    models = {"plain": plain, "gated": extended(fresh(), example)}
    if "attention_gates" in settings:
        models["gated attention"] = extended(fresh(), example, attention=True)
    for name, model in models.items():
        history[name] = []
        watch = Watch(model, held[:1], history[name])
        start = time.perf_counter()
        final = train(model, trained(model, settings), data, settings, seed, steps, watch)
        rows[name] = measure(model, example, held) | {"train_loss": final / math.log(2)}
        rows[name]["seconds"] = time.perf_counter() - start
        row = rows[name]
        figures = f"{row['loss']:.4f} bits/byte, W4A4 {row['w4a4_lost']:+.4f}"
        print(f"  seed {seed} {name}: {figures}", flush=True)
    if settings.get("absorb", "plant" in settings):
        absorb = passes.AbsorbOutliers(
            normfuse.calibrate(plain, [x for x, _ in held], progress=False)
        )
        gm = passes.capture(plain, (example,), dynamic=False)
        gm, report = passes.PassManager([absorb]).run(gm)
        norms = {"norms_absorbed": len(report.applied), "norms": len(report.sites)}
        rows["outliers absorbed"] = measure(gm, example, held) | norms
        print(f"  seed {seed} absorbed at {len(report.applied)} of {len(report.sites)} norms")
    late_names = ["gates added late", "attention gates added late"]
    for name in late_names[: len(models) - 1]:
        late = extended(plain, example, attention=name != late_names[0])
        with torch.no_grad():
            same = torch.equal(late(example), plain(example))
        late.requires_grad_(False)
        gates = [p.requires_grad_() for p in late.meta["new_parameters"].values()]
        untouched = evaluate(late, held)
        print(f"  seed {seed} {name}: bit-identical {same}, {untouched:.4f}", flush=True)
        train(late, gates, data, settings | {"decay": 0.0}, seed + 1000, tune)
        rows[name] = measure(late, example, held) | {
            "bit_identical_at_insertion": same,
            "loss_at_insertion": untouched,
        }
        plain.requires_grad_(True)  # the graphs share their parameters
    return {"rows": rows, "history": history}


def table(results: list[dict]) -> str:
    """Mean ± standard deviation over seeds."""
    columns = [
        ("loss (bits/byte)", "loss", ".4f"),
        ("W8A8 lost", "w8a8_lost", "+.4f"),
        ("W4A4 lost", "w4a4_lost", "+.4f"),
        ("stream max/median", "stream_max_to_median", ".1f"),
        ("top channel energy", "stream_top_share", ".3f"),
        ("linear input peak/rms p99", "linear_peak", ".1f"),
        ("most first-key mass", "first_key_mass", ".2f"),
        ("first token's norm/median", "first_norm", ".1f"),
    ]
    columns = [
        c for c in columns if all(c[1] in row for r in results for row in r["rows"].values())
    ]
    lines = [
        "| run | " + " | ".join(c for c, _, _ in columns) + " |",
        "|" + " --- |" * (len(columns) + 1),
    ]
    for name in results[0]["rows"]:
        cells = []
        for _, key, spec in columns:
            values = [r["rows"][name][key] for r in results]
            cell = format(statistics.fmean(values), spec)
            if len(values) > 1:
                cell += f" ± {statistics.stdev(values):{spec.lstrip('+')}}"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def search(data: torch.Tensor, held_out: torch.Tensor, everything: dict, out: Path | None) -> None:
    """Train plain models under settings that might grow a sink; append their figures to the result."""
    done = everything.setdefault("search", [])
    for changes in SEARCH[len(done) :]:
        s = SETTINGS | changes
        held = list(source(held_out, s).windows(16, s["length"], 1, 2))
        torch.manual_seed(0)
        train_on = source(data, s)
        model = ByteLM(s, train_on.vocabulary).to(data.device)
        train(model, trained(model, s), train_on, s, 0, s["steps"])
        done.append({"changes": changes, **measure(model, held[0][0], held)})
        figures = (
            "largest channel {stream_max_to_median:.1f}× the median, {first_key_mass:.2f} on the "
        )
        print(f"{changes}: {figures.format(**done[-1])}first key", flush=True)
        save(out, everything)


def load(path: Path | None, settings: dict, steps: int) -> dict:
    """What an interrupted run with the same settings left in ``path``, or an empty result."""
    fresh = {
        "kind": "gated_rescaling",
        "environment": measure_environment(),
        "settings": settings,
        "steps": steps,
        "regimes": {},
    }
    if path is None or not path.is_file():
        return fresh
    old = json.loads(path.read_text(encoding="utf-8"))
    if (old.get("settings"), old.get("steps")) != (settings, steps):
        raise SystemExit(f"{path} holds a run with other settings; move it away or change --out")
    return old


def save(path: Path | None, result: dict) -> None:
    """Write all at once: a run that is stopped leaves what it had, whole."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1), encoding="utf-8")
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, tiny model: mechanics only")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=list(REGIMES))
    parser.add_argument("--search", action="store_true", help="look for settings that grow sinks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON, saved after every seed; goes on from it")
    options = parser.parse_args()
    settings = dict(SETTINGS)
    seeds, steps = options.seeds, options.steps
    if options.quick:
        settings |= {"d": 32, "depth": 2, "heads": 2, "length": 80, "batch": 4}
        seeds, steps = 1, 20
        REGIMES["planted sink"] = {"plant": 30.0}
        REGIMES["grown residual sink"] = {"glu": True, "frozen_gains": True, "absorb": True}
        REGIMES["grown sink"] = {"task": "backcopy", "attention_gates": True}
    device = torch.device(options.device)
    data, held_out = (t.to(device) for t in text(4_000_000))
    everything = load(options.out, settings, steps)
    if options.search:
        search(data, held_out, everything, options.out)
    for title in options.regimes:
        changes = REGIMES[title]
        n = changes.get("steps", steps)
        s = settings | changes
        train_on = source(data, s)
        # a task that draws from the text's bigrams is evaluated on other draws from the same ones
        other = train_on if isinstance(train_on, Backcopy) else source(held_out, s)
        held = list(other.windows(8, s["length"], 12345, 2 if options.quick else 8))
        print(f"\n{title}: {s}, {n} steps", flush=True)
        done = everything["regimes"].setdefault(title, {"changes": changes, "seeds": {}})["seeds"]
        for seed in range(seeds):
            if str(seed) not in done:
                done[str(seed)] = one_seed(seed, s, n, max(5, n // 4), train_on, held)
                save(options.out, everything)
        results = list(done.values())
        print("\n" + table(results))
        channel, mass = (
            statistics.fmean(r["rows"]["plain"][k] for r in results)
            for k in ("stream_max_to_median", "first_key_mass")
        )
        if channel < SINK_RATIO:
            print(
                f"\nThe plain models grew no residual sink (largest channel {channel:.1f}× the median): "
                "this run says nothing about curing one."
            )
        print(
            f"\nThe plain models' heads put at most {mass:.0%} of their attention on the first key: "
            f"{'an' if mass > SINK_MASS else 'no'} attention sink."
        )
        for row in (row for r in results for row in r["rows"].values()):
            assert row.get("bit_identical_at_insertion", True), "the gates changed the function"
    print(
        "\nThe paper reports +2 points of average quality and 1.2 points lost under W4A4, at billions "
        "of parameters; those numbers are its authors', not reproduced here."
    )


if __name__ == "__main__":
    main()
