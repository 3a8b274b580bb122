"""Plans and the cost model: arithmetic that must hold for every size and device."""

import pytest
import torch
from normfuse.runtime import devices
from normfuse.runtime.kernels import plans


@pytest.mark.parametrize("cols", [1, 2, 17, 128, 1000, 4096, 8193, 16384, 16385, 200_000])
@pytest.mark.parametrize("rows", [1, 7, 64, 100_000])
def test_norm_plans_cover_the_row(rows, cols):
    p = plans.norm_forward(rows, cols, 132)
    if p.regime == "tile":
        assert p.block_c >= cols and p.block_r * p.block_c <= 16384 and p.splits == 1
    else:
        assert cols > 8192 and 1 <= p.splits <= 32
    b = plans.norm_backward(rows, cols, 132)
    assert 1 <= b.splits <= 264
    if b.regime == "tile":
        assert b.block_c >= cols
    for n in (p.block_c, p.block_r, p.num_warps, b.block_c, b.block_r, b.num_warps):
        assert n & (n - 1) == 0


def test_split_only_where_rows_are_few():
    assert plans.norm_forward(1, 65536, 132).splits > 1
    assert plans.norm_forward(4096, 65536, 132).splits == 1


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("m", [1, 16, 64, 65, 512, 4096])
def test_product_plans(m, itemsize):
    for dual in (False, True):
        p = plans.gemm(m, 4096, 4096, itemsize, 132, dual=dual)
        assert p.block_m >= 16 and p.block_n >= 16 and p.block_k >= 16
        # operands of all stages fit the smallest shared memory of the table's NVIDIA devices
        width = p.block_m + p.block_n * (2 if dual else 1)
        assert width * p.block_k * itemsize * (p.num_stages - 1) <= 163 * 1024
        assert (p.regime == "decode") == (m <= 64)
        if m > 64:
            assert p.splits == 1
    assert (plans.gemm(m, 64, 65536, itemsize, 132).splits > 1) == (m <= 64)


def test_table():
    assert devices.by_name("NVIDIA H200").name == "H200"
    assert devices.by_name("NVIDIA A100-SXM4-80GB").name == "A100"
    assert devices.by_name("AMD Instinct MI300X").name == "MI300"
    assert devices.by_name("some other device") is None
    assert devices.find(torch.device("cpu")) is None


@pytest.mark.parametrize(
    "major, hip, triton_has, wanted",
    [(9, None, True, True), (10, None, True, True), (8, None, True, False),
     (9, "6.4", True, False), (9, None, False, False)],
)  # fmt: skip
def test_descriptors_need_the_hardware_and_the_triton(monkeypatch, major, hip, triton_has, wanted):
    language = pytest.importorskip("triton.language")

    class Properties:
        pass

    Properties.major = major
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(devices, "_properties", lambda index: Properties)
    if not triton_has:
        monkeypatch.delattr(language, "make_tensor_descriptor")
    devices.descriptors.cache_clear()
    assert devices.descriptors(torch.device("cuda", 0)) is wanted
    assert not devices.descriptors(torch.device("cpu"))
    devices.descriptors.cache_clear()


@pytest.mark.parametrize("device", devices.TABLE, ids=lambda d: d.name)
def test_model_takes_small_and_declines_large(device):
    wide, gated = devices.Layer(16384), devices.Layer(16384, dual=True, epilogue=True)
    for m in (8, 64):
        assert devices.norm_linear(device, m, 4096, 2, [wide], deferred=True).use
    for m in (8192, 65536):
        for layers in ([wide], [gated]):
            decision = devices.norm_linear(device, m, 4096, 2, layers)
            assert not decision.use and "not predicted faster" in decision.reason
    assert devices.gated(device, 16384, 4096, 16, 2).use
    assert devices.norm_linear(device, 8, 4096, 2, [wide]).kernel_seconds > 0


def test_rows_wider_than_the_weights_are_read_as_they_are():
    h100 = devices.by_name("NVIDIA H100")
    few = [devices.norm_linear(h100, 8, 4096, 2, [devices.Layer(16384)], size) for size in (2, 4)]
    assert few[0].kernel_seconds < few[1].kernel_seconds
    assert few[0].inductor_seconds < few[1].inductor_seconds
    # a cast is written beside the statistic, which spares nothing
    one, two = (
        devices.norm_linear(h100, 8, 4096, 2, [devices.Layer(16384)], 4, deferred=d)
        for d in (False, True)
    )
    assert two.inductor_seconds >= one.inductor_seconds


def test_a_second_kernel_counts():
    """Split K costs one more launch, which a product without anything behind it does not earn."""
    h100 = devices.by_name("NVIDIA H100")
    narrow = devices.Layer(4096)
    assert plans.gemm(8, 4096, 4096, 2, h100.processors).splits > 1
    assert not devices.norm_linear(h100, 8, 4096, 2, [narrow]).use


def test_one_norm_is_counted_once_for_all_its_layers():
    h100 = devices.by_name("NVIDIA H100")
    one, three = (
        devices.norm_linear(h100, 64, 4096, 2, [devices.Layer(16384)] * n) for n in (1, 3)
    )
    assert three.kernel_seconds == pytest.approx(3 * one.kernel_seconds)
    assert three.inductor_seconds < 3 * one.inductor_seconds
