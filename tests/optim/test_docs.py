"""The certified bands printed in the guide are the ones the code certifies."""

import re
from pathlib import Path

import pytest
from normfuse.optim import coefficients as co

GUIDE = Path(__file__).parents[2] / "docs" / "optim.md"


@pytest.mark.parametrize("name", co.NAMES)
def test_bands_in_the_guide(name):
    (line,) = [s for s in GUIDE.read_text().splitlines() if s.startswith(f"| `{name}` |")]
    cells = [c.strip() for c in line.strip("|").split("|")]
    schedule = co.resolve(name)
    assert int(cells[1]) == len(schedule)
    for cell, lower in ((cells[3], 1e-3), (cells[4], 1e-2)):
        band = co.certify(schedule, lower, 1.0)
        low, high = (float(v) for v in re.findall(r"-?[\d.]+\d", cell))
        assert (low, high) == pytest.approx((band.low, band.high), abs=6e-4)
