"""Sharded steps in 2 and 4 gloo processes against one process; checkpoints across world sizes."""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from normfuse import optim
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


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_then_four_processes():
    with tempfile.TemporaryDirectory() as folder:
        for world in (2, 4):
            mp.spawn(worker, (world, folder), nprocs=world)
