"""Large matrices on CPUs are worked on a piece at a time; each parameter is read and written once."""

import pytest
import torch
from normfuse import optim
from normfuse.optim import buckets, pipeline, stages
from normfuse.optim.base import Algorithm, MatrixOptimizer
from normfuse.optim.decay import add_decayed
from normfuse.optim.pipeline import Pipeline
from torch.utils._python_dispatch import TorchDispatchMode

BIG = (96, 3000)


def steps(cls, monkeypatch, big, dtype=torch.float32, shape=BIG, count=3, layout=None, **entries):
    monkeypatch.setattr(pipeline, "PIECE", 10_007)  # neither a divisor nor a multiple of a row
    monkeypatch.setattr(buckets, "PIECE", 10_007)
    monkeypatch.setattr(buckets, "CACHE_BYTES", 1 if big else 2**40)
    g = torch.Generator().manual_seed(0)
    params = []
    for _ in range(2):
        p = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        params.append(torch.nn.Parameter(layout(p) if layout else p))
    opt = cls(params, lr=0.02, weight_decay=0.1, **entries)
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype)
        opt.step()
    states = [v for p in params for v in opt.state[p].values() if isinstance(v, torch.Tensor)]
    return [p.detach() for p in params], states


CASES = [
    (optim.Muon, {}),
    (optim.Muon, {"nesterov": False}),
    (optim.Muon, {"momentum_style": "heavy_ball", "cautious": True}),
    (optim.NorMuon, {}),
    (optim.ROOT, {}),
    (optim.AdamW, {}),
    (optim.AdamP, {}),
    (optim.SGDP, {"momentum": 0.9}),
    (optim.SinkGD, {}),
    (optim.SCALE, {"head": True}),
]


@pytest.mark.parametrize("cls, entries", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pieces_do_the_same(cls, entries, dtype, monkeypatch):
    ours, mine = steps(cls, monkeypatch, True, dtype, **entries)
    plain, theirs = steps(cls, monkeypatch, False, dtype, **entries)
    close = (
        {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 2e-3}
    )
    torch.testing.assert_close(ours, plain, **close)
    torch.testing.assert_close(mine, theirs, **close)


def stacked(p):
    return p.view(2, *BIG).contiguous()


@pytest.mark.parametrize(
    "shape, layout, view",
    [
        (BIG, lambda p: p.t().contiguous().t(), "matrix"),
        ((2 * BIG[0], BIG[1]), stacked, "batch"),
        ((5, 3), None, "matrix"),
    ],
)
@pytest.mark.parametrize("cls", [optim.Muon, optim.AdamW])
def test_other_layouts(cls, shape, layout, view, monkeypatch):
    def make(params, **entries):
        return cls([{"params": params, "view": view}], **entries)

    both = [steps(make, monkeypatch, b, torch.float64, shape, layout=layout) for b in (True, False)]
    torch.testing.assert_close(both[0], both[1], rtol=1e-11, atol=1e-12)


def test_leading_stages_see_pieces_only(monkeypatch):
    """What the pieces are for: no elementwise stage makes a temporary of a matrix's size."""
    sizes = []
    plain = optim.stages.Momentum.__call__

    def watched(self, batch):
        sizes.append(batch.update.numel())
        return plain(self, batch)

    monkeypatch.setattr(optim.stages.Momentum, "__call__", watched)
    steps(optim.Muon, monkeypatch, True, count=1)
    assert max(sizes) <= 10_007 * torch.get_num_threads() and sum(sizes) == 2 * 96 * 3000


def test_decay_after_the_update(monkeypatch):
    """``(p + u)·k`` and ``p·k + u·k`` are the same."""
    p, u = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    got = p.clone()
    add_decayed(got, u, 0.9, after=True)
    torch.testing.assert_close(got, (p + u) * 0.9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("cautious", [False, True])
def test_decay_and_update_round_once(dtype, tensor, cautious):
    g = torch.Generator().manual_seed(0)
    p, u = torch.randn(5000, generator=g).to(dtype), torch.randn(5000, generator=g).to(dtype) * 0.1
    keep = 1 - 3e-3  # what bfloat16 cannot hold
    kept = torch.full_like(p, keep, dtype=torch.float64)
    if cautious:
        kept = torch.where(u * p <= 0, kept, 1.0)
    truth = p.double() * kept + u.double()
    ours = torch.nn.Parameter(p.clone())
    version = ours._version
    with torch.no_grad():
        add_decayed(
            ours, u, torch.tensor(keep, dtype=torch.float64) if tensor else keep, cautious=cautious
        )
    twice = (p * kept.to(dtype) if cautious else p.clone().mul_(keep)).add_(u)
    mine = (ours.detach().double() - truth).abs().max()
    # truth itself is rounded twice, in float64
    slack = 1e-15 if dtype == torch.float64 else 0.0
    assert mine <= (twice.double() - truth).abs().max() + slack
    if dtype.itemsize < 4:
        assert torch.equal(ours.detach(), truth.float().to(dtype))
    assert ours._version == version + 1  # one in-place operation: one read and one write


def test_compiled_graphs_fuse_the_elementwise_part():
    """Inductor's code for momentum is one loop over the matrix, writing state and direction."""
    from torch._inductor.utils import run_and_get_code

    p = torch.nn.Parameter(torch.randn(64, 96))
    p.grad = torch.randn(64, 96)
    opt = optim.Muon([p], lr=0.02, weight_decay=0.1, compile=True)
    pipeline.COMPILED._entries.clear()
    _, code = run_and_get_code(opt.step)
    text = "\n".join(code)
    if "cpp_fused" not in text:
        pytest.skip("served from Inductor's cache without its source")
    before = text[: text.index("normfuse_optim.orthogonalize")]
    body = before[before.rindex("def call") :]
    assert body.count("cpp_fused") == 1, body


class Traffic(TorchDispatchMode):
    """Entries read from and written to each of some tensors (views of them included), by storage, and
    how many operators made another tensor of that size."""

    def __init__(self, tensors):
        super().__init__()
        self.names = {t.untyped_storage()._cdata: name for name, t in tensors.items()}
        self.size = next(iter(tensors.values())).numel()
        self.read = dict.fromkeys(tensors, 0)
        self.written = dict.fromkeys(tensors, 0)
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = [a.alias_info for a in func._schema.arguments]
        if any(v is not None and not v.is_write for v in views):
            return out  # a view moves nothing
        if "new_" in func._schema.name or "_like" in func._schema.name:
            self.made += out.numel() >= self.size
            return out  # reads a shape
        given = [*args, *(kwargs or {}).values()]
        for spec, value in zip(func._schema.arguments, args, strict=False):
            self.count(self.read, value if not spec.is_out else None)
            self.count(self.written, value if spec.is_write else None)
        for key, value in (kwargs or {}).items():
            self.count(self.written if key == "out" else self.read, value)
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and not any(t is g for g in given):
                self.made += t.numel() >= self.size
        return out

    def count(self, table, value):
        if isinstance(value, torch.Tensor):
            name = self.names.get(value.untyped_storage()._cdata)
            if name is not None:
                table[name] += value.numel()


@pytest.mark.parametrize(
    "label,stage,grad_reads",
    [
        ("norms of its lines, update", stages.NormalizeSecondMoment(), 2),
        ("norms of its lines, update", stages.NormalizeLines(), 2),
        ("largest entry, squares, update", stages.Sinkhorn(), 3),
        ("norm, update", stages.UnitRMS(), 2),
    ],
)
def test_passes_of_a_tail(label, stage, grad_reads, monkeypatch):
    """The parameter is read and written once, what is scaled is never written, only read this often."""
    made = Algorithm(
        "tail",
        lambda group: Pipeline((stage, stages.Scale("original")), ("beta2",)),
        {"lr": 0.1, "weight_decay": 0.1, "beta2": 0.9},
    )
    monkeypatch.setattr(buckets, "CACHE_BYTES", 1)
    monkeypatch.setattr(buckets, "PIECE", 10_007)
    monkeypatch.setattr(stages, "_SWEEP_BYTES", 2**16)
    # the operator's own function: a mode sees an operator, not what runs in it
    monkeypatch.setattr(stages, "sinkhorn_factors", stages.sinkhorn_factors._init_fn)

    class Tail(MatrixOptimizer):
        algorithm = made

        def __init__(self, params):
            super().__init__(params, {}, non_finite="propagate")

    p = torch.nn.Parameter(torch.randn(BIG))
    opt = Tail([p])
    p.grad = torch.randn(BIG)
    with Traffic({"param": p.detach(), "grad": p.grad}) as traffic:
        opt.step()
    n = p.numel()
    assert traffic.read == {"param": n, "grad": grad_reads * n}, label
    assert traffic.written == {"param": n, "grad": 0}
    assert traffic.made == (1 if isinstance(stage, stages.Sinkhorn) else 0)  # the squares
