"""FoldBatchNorm: into the producer, else into the readers, in every layout; refusals."""

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from normfuse import passes
from normfuse.passes import Context, PassManager, ir
from normfuse.passes.exact import FoldBatchNorm
from normfuse.passes.verify import relative_error
from torch import nn

aten = torch.ops.aten


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            if not t.is_floating_point():
                continue
            noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
            t.copy_(noise.abs() + 0.1 if "running_var" in name else noise)
    return model.eval()


def fold(model, x, context=None):
    gm = passes.capture(model, (x,))
    gm, report = PassManager([FoldBatchNorm()], context).run(gm)
    ir.check(gm)
    return gm, report


def batch_norms(gm):
    return [n for n in gm.graph.nodes if ir.is_call(n, aten.batch_norm, aten.instance_norm)]


def test_identities_are_proved():
    for left, right in FoldBatchNorm.identity():
        assert sympy.simplify(left - right) == sympy.zeros(*left.shape)


@given(
    spatial=st.integers(0, 3),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    affine=st.booleans(),
    padding=st.sampled_from([0, 1, "same"]),
    after=st.booleans(),
    transposed=st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_value_and_gradient_in_float64(spatial, groups, bias, affine, padding, after, transposed):
    norm_type = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[spatial]
    if spatial == 0:
        layer, transposed = nn.Linear(4, 4, bias=bias), False
    else:
        transposed = transposed and padding != "same"
        names = ("ConvTranspose", "Conv")
        conv = getattr(nn, f"{names[not transposed]}{spatial}d")
        layer = conv(4, 4, 3, padding=padding, groups=groups, bias=bias)
    norm = norm_type(4, affine=affine)
    model = nn.Sequential(*((norm, layer) if after else (layer, norm))).double()
    randomize(model)
    x = torch.randn(2, 4, *[5] * spatial, dtype=torch.float64)
    gm, report = fold(model, x)
    pads = spatial > 0 and (transposed or padding != 0)
    if after and pads:
        assert not report.applied and "pads" in report.refused[0][2]
    else:
        assert report.applied and not batch_norms(gm)
    assert relative_error(gm(x), model(x)) <= 1e-10
    model.zero_grad()
    gm(x).square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model(x).square().sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(grads[n], p.grad, rtol=1e-9, atol=1e-9)
    _, again = PassManager([FoldBatchNorm()]).run(gm)
    assert not again.applied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_working_precision_is_no_worse_than_eager(dtype):
    model = randomize(nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))).to(dtype)
    x = torch.randn(4, 8, 9, 9).to(dtype)
    gm, report = fold(model, x)
    assert report.applied
    eager, ours = model(x), gm(x)
    truth = model.double()(x.double())
    assert relative_error(ours, truth) <= 1.5 * relative_error(eager, truth)


def test_training_mode_is_refused_and_running_statistics_still_update():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    x = torch.randn(2, 3, 4, 4)
    gm, report = fold(model, x)
    assert not report.applied and "eval()" in report.refused[0][2]
    before = model[1].running_mean.clone()
    gm(x)
    assert not torch.equal(gm.get_buffer("1.running_mean"), before)


def test_shared_input_goes_to_the_readers():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.r1, self.r2 = nn.Conv2d(4, 2, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x):
            y = self.conv(x)
            z = self.norm(y)
            return self.r1(z) + self.r2(z), y

    model, x = randomize(Shared()), torch.randn(1, 3, 5, 5)
    gm, report = fold(model, x)
    assert report.applied == [("norm", "fold_batch_norm")]
    for a, b in zip(gm(x), model(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("between", [nn.Flatten(), nn.AdaptiveAvgPool2d(1)])
def test_readers_behind_ops_that_treat_channels_alike(between):
    n = 3 if isinstance(between, nn.AdaptiveAvgPool2d) else 3 * 4 * 5
    model = nn.Sequential(
        nn.ReLU(), nn.BatchNorm2d(3), between, nn.Flatten(), nn.Dropout(), nn.Linear(n, 6)
    )
    model, x = randomize(model.double()), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    gm, report = fold(model, x)
    assert report.applied == [("1", "fold_batch_norm")] and not batch_norms(gm)
    assert relative_error(gm(x), model(x)) <= 1e-10


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU()), "not a linear layer"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
            "statistics",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4)), "statistics of its input"),
    ],
)
def test_refusals_name_the_reason(model, reason):
    x = torch.randn(2, 3, 4, 4)
    gm, report = fold(randomize(model), x)
    assert not report.applied and reason in report.refused[0][2]
    torch.testing.assert_close(gm(x), model(x))


def test_gradients_on_declines_under_pays():
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    _, report = fold(model, torch.randn(2, 3, 4, 4), Context(policy="pays", training=True))
    assert not report.applied and "recomputed" in report.refused[0][2]


@pytest.mark.parametrize("after", [False, True])
def test_the_report_predicts_what_is_saved(after):
    norm, layer = nn.BatchNorm1d(4), nn.Linear(4, 4)
    model = randomize(nn.Sequential(*((norm, layer) if after else (layer, norm))).double())
    _, report = fold(model, torch.randn(3, 4, dtype=torch.float64))
    [site] = [s for s in report.sites if s.applied]
    # 3×4 values of 8 bytes, read and written once less, neither multiplied nor added to
    assert (site.bytes_saved, site.flops_saved) == (2 * 3 * 4 * 8, 2 * 3 * 4)
