"""What verification finds, and what the module is after it."""

import copy

import normfuse
import pytest
import torch
from models import Mixed, Transformer, ids, logits, trained_like, wrong_recognition
from normfuse.passes import CaptureError, Pass, PassResult, VerificationError, canonical, ir
from torch import nn

WEIGHTS = ["live", "baked"]


@pytest.fixture
def model():
    return trained_like(Transformer()).eval()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_verification_sees_a_wrong_recognition(model, monkeypatch, weights):
    monkeypatch.setattr(canonical, "canonicalize", wrong_recognition)
    kwargs = {"policy": "always", "weights": weights}
    new, report = normfuse.rewrite(model, (ids(),), **kwargs)
    assert report.failed_verification and not report.applied
    assert any("after recognition" in n and "first at blocks.0.norm1" in n for n in report.notes)
    torch.testing.assert_close(logits(new, ids()), logits(model, ids()))
    with pytest.raises(VerificationError, match=r"blocks\.0\.norm1.*models\.py:\d+"):
        normfuse.rewrite(model, (ids(),), strict=True, **kwargs)


class Rounded(Pass):
    """A pass whose result is right in float64 and loses half of float32's digits."""

    name = "rounded"

    def run(self, gm, context):
        result = PassResult()
        norm = next(iter(ir.norm_nodes(gm)))

        def plan():
            def commit():
                like, x = norm.meta["val"], norm
                for op, value in (
                    (torch.ops.aten.add.Scalar, 1000.0),
                    (torch.ops.aten.sub.Scalar, 1000.0),
                ):
                    with gm.graph.inserting_after(x):
                        x = gm.graph.call_function(op, (x, value))
                    x.meta["val"] = like
                norm.replace_all_uses_with(x, delete_user_cb=lambda u: u is not x.args[0])

            return commit

        self.attempt(context, result, norm.meta["site"], plan)
        return result


def test_verification_compares_the_working_error_with_eagers(model):
    _, report = normfuse.rewrite(model, (ids(),), passes=[Rounded()])
    error = report.working_error
    assert report.max_relative_error <= 1e-10 and error["rewritten"] > 4 * error["eager"]
    assert report.failed_verification
    assert any("working dtype" in n and f"{error['rewritten']:.1e}" in n for n in report.notes)
    with pytest.raises(VerificationError, match="working dtype"):
        normfuse.rewrite(model, (ids(),), passes=[Rounded()], strict=True)


class RoundedMean(nn.Module):
    """An RMSNorm whose ``1/d`` is a tensor, and so not quite ``1/d``."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, x):
        square = (x * x).sum(-1, keepdim=True) * torch.tensor(1 / 6, dtype=x.dtype)
        return self.f(x * torch.rsqrt(square + 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rounded_constant_is_no_wrong_recognition(dtype):
    model, x = RoundedMean().eval().to(dtype), torch.randn(3, 6).to(dtype)
    _, report = normfuse.rewrite(model, (x,), policy="always", strict=True)
    assert [s.kind for s in report.sites] == ["rms_norm"] and report.applied
    assert report.max_relative_error <= 1e-10


@pytest.mark.parametrize("inplace", [False, True])
def test_verification_leaves_running_statistics_alone(inplace):
    model = trained_like(Mixed()).double().train()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 8, dtype=torch.float64)
    normfuse.explain(model, (x,), policy="always", verify=True)
    new, report = normfuse.rewrite(model, (x,), policy="always", inplace=inplace)
    assert not report.failed_verification
    for name, value in new.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


class AsksWhoCalls(nn.Module):
    """Computes something else while it is exported, and writes what a call must not leave behind."""

    def __init__(self, asks):
        super().__init__()
        self.norm, self.f, self.asks = nn.LayerNorm(6), nn.Linear(6, 6), asks
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        y = self.norm(x)
        return self.f(y.flip(0) if self.asks and torch.compiler.is_compiling() else y)


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verification_sees_a_capture_that_is_not_what_is_called(asks, dtype):
    model, x = AsksWhoCalls(asks).to(dtype), torch.randn(3, 6, dtype=dtype)
    if asks:
        with pytest.raises(CaptureError, match="not what the model computes when it is called"):
            normfuse.rewrite(model, (x,), policy="always")
    else:
        _, report = normfuse.rewrite(model, (x,), policy="always", strict=True, inplace=True)
        assert report.applied
    assert model.calls == 0
