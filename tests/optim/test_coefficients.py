"""Coefficient sets: published numbers, and bands certified against an independent evaluation."""

import numpy as np
import pytest
import sympy
import torch
from normfuse.optim import coefficients as co

ALL = [n for n in co.NAMES]


def test_generator_reproduces_the_published_tables():
    raw = co.polar_express(8, safety=0.0)
    assert raw[0] == pytest.approx((8.28721201814563, -23.595886519098837, 17.300387312530933))
    assert raw[4] == pytest.approx((2.300652019954817, -1.6689039845747493, 0.4188073119525673))
    assert raw[7] == pytest.approx((1.875, -1.25, 0.375), abs=1e-6)
    dion = co.polar_express(5, safety=0.02, cushion=0.02)
    assert dion[1] == pytest.approx((4.042929935166739, -2.808917465908714, 0.5000178451051316))
    assert dion[4] == pytest.approx((2.3465413258596377, -1.7097828382687081, 0.42323551169305323))
    torch_main = co.polar_express(10, safety=0.01, cushion=0.02)
    assert torch_main[5] == pytest.approx((1.876381, -1.234790, 0.358919), abs=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("interval", [(1e-3, 1.0), (1e-2, 0.9), (0.0, 1.004)])
def test_certified_band_encloses_samples_and_is_attained(name, interval):
    schedule = co.resolve(name)
    band = co.certify(schedule, *interval)
    if not np.isfinite(band.high):
        pytest.skip("diverges on this interval")
    sigma = np.linspace(*interval, 400_001)
    if band.high < 10:
        values = co.scalar_map(schedule, sigma)
        assert values.min() >= band.low - 1e-9
        assert values.max() <= band.high + 1e-9
        # not only an enclosure: the band's ends are reached
        assert values.min() == pytest.approx(band.low, abs=2e-4)
        assert values.max() == pytest.approx(band.high, abs=2e-4)
    else:  # an exploding composition: exact rational arithmetic at the upper end
        x = sympy.Rational(interval[1])
        for a, b, c in schedule:
            a, b, c = (sympy.Rational(v) for v in (a, b, c))
            x = a * x + b * x**3 + c * x**5
        assert abs(x) <= max(abs(band.low), abs(band.high)) * (1 + 1e-9)
        assert max(abs(band.low), abs(band.high)) > 2


def test_bands_of_the_literature():
    band = co.certify(co.resolve("you"), 1e-2, 1.0)
    assert (band.low, band.high) == pytest.approx((0.978, 1.032), abs=1e-3)
    band = co.certify(co.resolve("jordan"), 1e-2, 1.0)
    assert (band.low, band.high) == pytest.approx((0.682, 1.134), abs=1e-3)
    assert co.certify(co.resolve("aol"), 1e-3, 1.0).low < -1.0


def test_guards():
    # flips the sign of singular values near 1: shrunk below the flip
    scale = co.input_scale(co.resolve("aol"), torch.float32)
    assert 0.87 < scale < 0.884
    assert co.certify(co.resolve("aol"), 0.0, scale).low >= -1e-12
    # explodes just above 1: shrunk by the head room of the dtype only
    assert 0.991 < co.input_scale(co.resolve("cans"), torch.bfloat16) < 0.997
    assert co.input_scale(co.resolve("jordan"), torch.bfloat16) == 1.0
    with pytest.raises(ValueError, match="unstable"):
        co.input_scale(((-1.0, 0.0, 0.0),), torch.float32)
    with pytest.raises(ValueError, match="unstable"):
        co.input_scale(((10.0, 0.0, 0.0),) * 3, torch.float32)


def test_resolve_rules():
    assert co.resolve((3.0, -2.0, 1.0), 3) == ((3.0, -2.0, 1.0),) * 3
    assert co.resolve([(3.0, -2.0, 1.0), (2, -1.5, 0.5)], 3)[1:] == ((2.0, -1.5, 0.5),) * 2
    assert co.resolve("you", 7)[5] == co.resolve("you")[0]  # cycles
    assert co.resolve("cans", 7)[6] == co.resolve("cans")[4]  # repeats
    assert len(co.resolve("deepseekv4")) == 10
    for bad in ("nope", (1.0, 2.0), [(1.0, float("nan"), 0.0)], []):
        with pytest.raises(ValueError):
            co.resolve(bad, 5)
    with pytest.raises(ValueError):
        co.resolve("jordan", 100)


def test_cubic_rows_and_exact_identity():
    assert co.certify(((1.0, 0.0, 0.0),), 0.25, 0.5).low == pytest.approx(0.25, abs=1e-12)
    cubic = co.certify(((1.5, -0.5, 0.0),), 0.0, 1.5)  # maximum 1 at the inner critical point
    assert cubic.high == pytest.approx(1.0, abs=1e-12)
