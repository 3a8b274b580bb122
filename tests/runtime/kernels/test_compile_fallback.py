"""``torch.compile`` where kernels are wanted but cannot be compiled: here, where there is no GPU."""

import subprocess
import sys
import warnings

import pytest
import torch

pytest.importorskip("triton")

from normfuse.runtime import (
    autotune_cache,
    backend,
    devices,
    kernel_failures,
    lower_checks,
    lower_kernels,
)
from torch import nn

OPTIONS = {"kernels": True, "policy": "always"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv(autotune_cache.ENV, str(tmp_path))
    monkeypatch.setattr(lower_checks, "DEVICE", "cpu")
    monkeypatch.setattr(backend, "_warned", set())
    torch._dynamo.reset()
    backend.clear_reports()
    yield
    torch._dynamo.reset()


#: What Inductor says of a kernel without a GPU: in this process, or from one that compiles for it.
NO_GPU = ("active drivers", "SubprocException")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(16), nn.Linear(16, 24)

    def forward(self, x):
        return torch.relu(self.layer(self.norm(x)))


@pytest.mark.parametrize("training", [False, True])
def test_the_formulas_run_instead(training):
    """Inductor has no Triton for CPUs: the graph with kernels fails, the one with formulas runs."""
    torch.manual_seed(0)
    model, x = Block(), torch.randn(4, 16)
    nn.init.normal_(model.norm.weight)
    fast = torch.compile(model, backend="normfuse", options=OPTIONS)
    with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(training):
        warnings.simplefilter("always")
        y = fast(x)
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
        if training:
            ours = torch.autograd.grad(y.square().sum(), [*model.parameters()])
            truth = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
            torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-4)
        else:
            with torch.no_grad():
                model.layer.weight.mul_(3)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    ours = [str(w.message) for w in caught if "normfuse" in str(w.message)]
    assert len(ours) == 1 and "kernels did not compile" in ours[0], ours
    (report,) = backend.reports()
    assert any(n.startswith("kernel norm") for n in report.notes), report.notes
    # what `normfuse doctor` will say
    (kept,) = kernel_failures.known()
    assert "norm" in kept["kernel"] and "compiled graph" in kept["configuration"]
    assert any(word in kept["reason"] for word in NO_GPU), kept["reason"]
    # the exact passes still count: only the kernels are gone
    assert report.applied or training


def test_strict_raises():
    fast = torch.compile(Block(), backend="normfuse", options={**OPTIONS, "strict": True})
    with torch.no_grad(), pytest.raises(Exception, match="|".join(NO_GPU)):
        fast(torch.randn(4, 16))


def test_old_devices_get_no_kernels(monkeypatch):
    class Properties:
        name, major, minor = "NVIDIA V100", 7, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "_properties", lambda index: Properties)
    lower_kernels.kernels_for.cache_clear()
    device = torch.device("cuda", 0)
    with pytest.warns(UserWarning, match=r"V100 has compute capability 7\.0"):
        assert lower_kernels.kernels_for(device) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lower_kernels.kernels_for(device) is None
    lower_kernels.kernels_for.cache_clear()


def test_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import warnings, importlib.util\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'triton' else real(n, *a)\n"
        "from normfuse.runtime import lower_kernels\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    assert lower_kernels.kernels() is None and lower_kernels.kernels() is None\n"
        "assert [str(w.message) for w in caught] == "
        '["normfuse\'s GPU kernels are not used: triton is not installed"], caught\n'
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
