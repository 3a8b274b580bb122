"""Sharded steps in 2 and 4 gloo processes against one process; checkpoints across world sizes."""

import copy
import os
import signal
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from normfuse import optim
from normfuse.optim.adaptive import Dampened
from normfuse.optim.pipeline import Pipeline
from normfuse.optim.stages import UnitRMS
from torch import nn

MEMBERS = {
    "Muon": {"weight_decay": 0.1},
    "NorMuon": {},
    "SinkGD": {"weight_decay": 0.1},
    "Conda": {"gap": 2, "weight_decay": 0.1},
    "ARO": {},
    "AdamP": {"weight_decay": 0.1},
}
SHAPES = [(7, 6), (7, 6), (7, 6), (5, 9)]


def parameters():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in SHAPES]


def gradients(step):
    g = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in SHAPES]


def make(name, values):
    ps = [nn.Parameter(v) for v in values[:-1]]
    other = nn.Parameter(values[-1])
    groups = [{"params": ps}, {"params": [other], "algorithm": "adamw", "lr": 0.01}]
    return [*ps, other], getattr(optim, name)(groups, lr=0.05, **MEMBERS[name])


def reference(name, steps):
    ps, opt = make(name, parameters())
    for i in range(steps):
        for p, g in zip(ps, gradients(i), strict=True):
            p.grad = g
        opt.step()
    return [p.detach() for p in ps]


def worker(rank, world, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous{world}", rank=rank, world_size=world
    )
    try:
        check(world, folder)
    finally:
        dist.destroy_process_group()


def check(world, folder):
    import torch._inductor.config
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    line = init_device_mesh("cpu", (world,))
    layouts = [(line, [Shard(0)]), (line, [Shard(1)]), (line, [Replicate()])]
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        layouts = [(grid, [Replicate(), Shard(0)]), (grid, [Shard(0), Shard(1)]), *layouts[:1]]

    def sharded(name, mesh, where):
        return make(name, [distribute_tensor(v, mesh, where) for v in parameters()])

    def train(ps, opt, mesh, where, steps):
        for i in steps:
            for p, g in zip(ps, gradients(i), strict=True):
                p.grad = distribute_tensor(g, mesh, where)
            opt.step()

    for name in MEMBERS if world == 2 else ("Muon", "NorMuon", "AdamP"):
        want = reference(name, 4)
        for mesh, where in layouts if name in ("Muon", "NorMuon") else layouts[:1]:
            ps, opt = sharded(name, mesh, where)
            train(ps, opt, mesh, where, range(4))
            for p, w in zip(ps, want, strict=True):
                torch.testing.assert_close(p.detach().full_tensor(), w, rtol=1e-8, atol=1e-8)

    # a fused matrix: each part is a matrix, wherever the shards end
    cases = [
        ("Muon", (12, 6), 3, "matrix"),
        ("NorMuon", (12, 6), 3, "matrix"),
        ("NorMuon", (12, 6), [7, 4, 1], "matrix"),
        ("Muon", (12, 6), (1, [4, 2]), "matrix"),
        ("Conda", (12, 6), [7, 5], "matrix"),
        ("NorMuon", (9, 4, 3, 2), (1, [3, 1]), "flatten"),
        ("SinkGD", (3, 8, 6), (1, [5, 3]), "batch"),
        ("NorMuon", (3, 8, 6), (-1, [2, 4]), "batch"),
    ]
    g = torch.Generator().manual_seed(3)
    for name, shape, split, view in cases:
        fused, *grads = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(4))
        kw = {"lr": 0.05, "weight_decay": 0.1} | ({"gap": 2} if name == "Conda" else {})
        want = nn.Parameter(fused.clone())
        alone = getattr(optim, name)([{"params": [want], "split": split, "view": view}], **kw)
        for grad in grads:
            want.grad = grad
            alone.step()
        for where in ([Shard(0)], [Shard(1)], [Replicate()]):
            p = nn.Parameter(distribute_tensor(fused, line, where))
            opt = getattr(optim, name)([{"params": [p], "split": split, "view": view}], **kw)
            for i, grad in enumerate(grads):
                if i == 1:  # states of parts, saved and loaded
                    saved = copy.deepcopy(opt.state_dict())
                    opt = getattr(optim, name)(
                        [{"params": [p], "split": split, "view": view}], **kw
                    )
                    opt.load_state_dict(saved)
                p.grad = distribute_tensor(grad, line, where)
                opt.step()
            torch.testing.assert_close(p.detach().full_tensor(), want, rtol=1e-8, atol=1e-8)
    p = nn.Parameter(distribute_tensor(fused, line, [Shard(0)]))
    for split, view, period, message in (
        (3, "flatten", 5, "block_period=1"),
        ([2, 1], "flatten", 5, "block_period=1"),
        ([2, 1], "batch", 1, "w is a DTensor whose split .* counts its matrices"),
    ):
        with pytest.raises(ValueError, match=message):
            group = {"params": [("w", p)], "split": split, "view": view}
            optim.Muon([group], block_period=period)

    # what cannot be traced is said by name, and stepped as it was
    q = nn.Parameter(distribute_tensor(fused, line, [Shard(0)]))
    q.grad = q.detach().clone()
    traced = optim.compile(torch.optim.SGD([("w", q)], 0.5), strict=True)
    with pytest.raises(optim.trace.TraceRefused, match=r"w is a DTensor.*members"):
        traced.step()
    with pytest.warns(UserWarning, match="w is a DTensor"):
        optim.compile(torch.optim.SGD([("w", q)], 0.5)).step()
    torch.testing.assert_close(q.detach().full_tensor(), fused / 2)

    # a multiplier of the decay that an elementwise stage gives
    tail = optim.base.Algorithm(
        "dampened",
        lambda group: Pipeline(
            (Dampened(0.1), UnitRMS()) if group["whole"] else (Dampened(0.1),), ("momentum",)
        ),
        {"momentum": 0.9, "whole": False},
    )
    for whole in (False, True):
        cls = type("Tail", (optim.base.MatrixOptimizer,), {"algorithm": tail})
        want = nn.Parameter(parameters()[0])
        p = nn.Parameter(distribute_tensor(parameters()[0], line, [Shard(0)]))
        kw = {"lr": 0.05, "weight_decay": 0.1, "whole": whole}
        alone, opt = cls([want], kw), cls([p], kw)
        for i in range(2):
            want.grad = gradients(i)[0]
            p.grad = distribute_tensor(want.grad, line, [Shard(0)])
            alone.step()
            opt.step()
        torch.testing.assert_close(p.detach().full_tensor(), want.detach())

    # wrappers
    q = nn.Parameter(distribute_tensor(fused, line, [Shard(0)]))
    norm = fused.norm()
    inner = optim.Muon([{"params": [q], "view": "batch"}], lr=0.5, weight_decay=0.0)
    for opt in (optim.NormalizeAndProject(inner), optim.CautiousWeightDecay(inner, 0.1)):
        q.grad = distribute_tensor(fused, line, [Shard(0)])
        opt.step()
        if isinstance(opt, optim.NormalizeAndProject):
            torch.testing.assert_close(q.detach().full_tensor().norm(), norm)

    # compiled: the local stages are one graph, those on whole matrices another
    if world == 2:
        from normfuse.optim.pipeline import COMPILED

        torch._inductor.config.compile_threads = 1  # no pool of workers in each process
        ps, opt = make("NorMuon", [distribute_tensor(v, line, [Shard(0)]) for v in parameters()])
        opt._options["compile"] = True
        train(ps, opt, line, [Shard(0)], range(4))
        for p, w in zip(ps, reference("NorMuon", 4), strict=True):
            torch.testing.assert_close(p.detach().full_tensor(), w, rtol=1e-8, atol=1e-8)
        assert (
            1 <= COMPILED.misses <= 3
        )  # momentum; AdamW; whole matrices, where this rank has some

    # a non-finite shard on one rank skips the matrix on all
    mesh, where = line, [Shard(0)]
    ps, opt = sharded("Muon", mesh, where)
    before = ps[0].detach().full_tensor()
    for p, g in zip(ps, gradients(0), strict=True):
        p.grad = distribute_tensor(g, mesh, where)
    if mesh.get_local_rank() == 0:
        ps[0].grad.to_local()[0, 0] = float("nan")
    opt.step()
    assert torch.equal(ps[0].detach().full_tensor(), before)
    assert torch.isfinite(ps[1].detach().full_tensor()).all()

    # saved by 2 processes, resumed by 4, each step equal to one process's
    name = "NorMuon"
    ps, opt = sharded(name, mesh, where)

    def named():
        out = {}
        for i, p in enumerate(ps):
            out[f"p{i}"] = p.detach()
            out.update({f"s{i}.{k}": v for k, v in opt.state[p].items()})
        return out

    if world == 2:
        train(ps, opt, mesh, where, range(2))
        dcp.save(named(), checkpoint_id=f"{folder}/checkpoint")
    else:
        dcp.load(named(), checkpoint_id=f"{folder}/checkpoint")
        train(ps, opt, mesh, where, range(2, 4))
        for p, w in zip(ps, reference(name, 4), strict=True):
            torch.testing.assert_close(p.detach().full_tensor(), w, rtol=1e-8, atol=1e-8)

    # each whole matrix is orthogonalized on one rank only, and its shards travel by all-to-all
    from normfuse.optim import polar
    from torch.distributed.tensor.debug import CommDebugMode

    ps, opt = sharded("Muon", line, [Shard(0)])
    for p, g in zip(ps, gradients(0), strict=True):
        p.grad = distribute_tensor(g, line, [Shard(0)])
    sizes = []
    original = polar.orthogonalize_batch
    polar.orthogonalize_batch = lambda x, s: (sizes.append(len(x)), original(x, s))[1]
    comm = CommDebugMode()
    try:
        with comm:
            opt.step()
    finally:
        polar.orthogonalize_batch = original
    done = torch.tensor(sum(sizes))
    dist.all_reduce(done)
    assert int(done) == 3 and sum(sizes) <= 2
    counts = {str(k): v for k, v in comm.get_comm_counts().items()}
    assert sum(v for k, v in counts.items() if "alltoall" in k) == 2, counts
    assert not any("gather" in k for k in counts), counts

    # the block-periodic mode: shards in between, whole matrices at every third step
    for where in ([Shard(0)], [Shard(1)]):
        values = parameters()
        ps = [nn.Parameter(distribute_tensor(v, line, where)) for v in values[:3]]
        opt = optim.Muon(ps, lr=0.05, weight_decay=0.1, block_period=3, block_lr=0.5)
        lone = [nn.Parameter(v.clone()) for v in values[:3]]
        ref = optim.Muon(lone, lr=0.05, weight_decay=0.1)
        dim = where[0].dim
        for i in range(5):
            if i == 2:  # the phase is saved with the groups
                saved = opt.state_dict()
                opt = optim.Muon(ps, lr=0.05, weight_decay=0.1, block_period=3, block_lr=0.5)
                opt.load_state_dict(saved)
            before = [p.detach().clone() for p in lone]
            for p, q, g in zip(ps, lone, gradients(i)[:3], strict=True):
                p.grad = distribute_tensor(g, line, where)
                q.grad = g
            opt.step()
            ref.step()  # its momentum is the sharded one's; its update only in the whole steps
            if i % 3:
                for q, b in zip(lone, before, strict=True):
                    buf, g = ref.state[q]["momentum_buffer"], q.grad
                    blocks = torch.chunk(torch.lerp(g, buf, 0.95), world, dim)
                    jordan = {"coefficients": (3.4445, -4.7750, 2.0315)}
                    turned = [
                        optim.orthogonalize(x, **jordan) * max(1, x.shape[0] / x.shape[1]) ** 0.5
                        for x in blocks
                    ]
                    with torch.no_grad():
                        q.copy_(b * (1 - 0.05 * 0.1) - 0.025 * torch.cat(turned, dim))
            for p, q in zip(ps, lone, strict=True):
                torch.testing.assert_close(p.detach().full_tensor(), q.detach())

    # FSDP2: a model, its own gradients
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
    lone = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
    lone.load_state_dict(model.state_dict())
    fully_shard(model, mesh=line)
    x = torch.randn(8, 6)
    opts = []
    for m in (model, lone):
        weights = [p for p in m.parameters() if p.ndim == 2]
        biases = [p for p in m.parameters() if p.ndim == 1]
        opts.append(
            optim.Muon([{"params": weights}, {"params": biases, "algorithm": "adamw"}], lr=0.05)
        )
    for _ in range(3):
        for m, o in zip((model, lone), opts, strict=True):
            o.zero_grad()
            m(x).square().mean().backward()
            o.step()
    for p, q in zip(model.parameters(), lone.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-4, atol=1e-5)


def dying(rank, world, folder):
    """Train, saving after every step; rank 1 is killed inside the third step's orthogonalization."""
    import torch.distributed.checkpoint as dcp
    from normfuse.optim import polar
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    mesh, where = init_device_mesh("cpu", (world,)), [Shard(0)]
    ps, opt = make("NorMuon", [distribute_tensor(v, mesh, where) for v in parameters()])
    original = polar.orthogonalize_batch
    for i in range(4):
        for p, g in zip(ps, gradients(i), strict=True):
            p.grad = distribute_tensor(g, mesh, where)
        if i == 2 and rank == 1:

            def killed(x, s):
                os.kill(os.getpid(), signal.SIGKILL)

            polar.orthogonalize_batch = killed
        opt.step()
        polar.orthogonalize_batch = original
        dcp.save(state_of(ps, opt), checkpoint_id=f"{folder}/step{i}")
        dist.barrier()
        if rank == 0:
            with open(f"{folder}/latest", "w") as f:  # named only when every rank has written
                f.write(f"{folder}/step{i}")


def state_of(ps, opt):
    out = {}
    for i, p in enumerate(ps):
        out[f"p{i}"] = p.detach()
        out.update({f"s{i}.{k}": v for k, v in opt.state[p].items()})
    return out


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_a_process_killed_in_mid_step_leaves_a_checkpoint_that_resumes():
    import torch.distributed.checkpoint as dcp

    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(Exception, match=r"SIGKILL|terminated|signal"):
            mp.spawn(dying, (2, folder), nprocs=2)
        with open(f"{folder}/latest") as f:
            latest = f.read()
        assert latest.endswith("step1") and not os.path.exists(f"{folder}/step2/.metadata")
        ps, opt = make("NorMuon", parameters())  # one process takes over from two
        dcp.load(state_of(ps, opt), checkpoint_id=latest, no_dist=True)
        for i in (2, 3):
            for p, g in zip(ps, gradients(i), strict=True):
                p.grad = g
            opt.step()
        for p, w in zip(ps, reference("NorMuon", 4), strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-8, atol=1e-8)


def test_block_period_is_checked_and_harmless_on_plain_parameters():
    p, q = (nn.Parameter(torch.eye(4)) for _ in range(2))
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="block_period"):
            optim.Muon([p], block_period=bad)
    a, b = optim.Muon([p], lr=0.1, block_period=4, block_lr=0.1), optim.Muon([q], lr=0.1)
    for i in range(3):
        p.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(i))
        q.grad = p.grad.clone()
        a.step()
        b.step()
    assert torch.equal(p, q)


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_then_four_processes():
    with tempfile.TemporaryDirectory() as folder:
        for world in (2, 4):
            mp.spawn(worker, (world, folder), nprocs=world)
