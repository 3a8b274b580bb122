"""DDP and FSDP2 models through the backend (gloo, one process: the wrappers are what matters)."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from models import Transformer, ids, trained_like
from normfuse.runtime import backend
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    torch._dynamo.reset()
    backend.clear_reports()
    yield
    torch._dynamo.reset()
    dist.destroy_process_group()


def gradients(model, wrapped):
    wrapped(ids(), ids(seed=2))["loss"].backward()
    full = [
        p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for p in model.parameters()
    ]
    return [g.clone() for g in full]


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_gradients_of_wrapped_models(group, wrap):
    model = trained_like(Transformer(layers=1))
    expected = gradients(model, copy.copy(model))
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="normfuse")
        if wrap == "ddp":
            wrapped = torch.compile(DistributedDataParallel(model), backend="normfuse")
        else:
            mesh = dist.init_device_mesh("cpu", (1,))
            fully_shard(model, mesh=mesh)
            wrapped = torch.compile(model, backend="normfuse")
        actual = gradients(model, wrapped)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_inference_through_ddp_is_rewritten(group):
    model = trained_like(Transformer(layers=1)).eval()
    fast = torch.compile(
        DistributedDataParallel(model), backend="normfuse", options={"strict": True}
    )
    with torch.no_grad():
        torch.testing.assert_close(
            fast(ids())["logits"], model(ids())["logits"], rtol=1e-4, atol=1e-5
        )
    assert any(report.applied for report in backend.reports())
