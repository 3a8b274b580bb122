"""The certified bands printed in the guide are the ones the code certifies."""

import re
from pathlib import Path

import pytest
import torch
from normfuse.optim import coefficients as co
from normfuse.optim import newton_schulz as ns

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


def test_flops_in_the_guide():
    schedule = co.resolve((3.4445, -4.7750, 2.0315))
    rows = re.findall(r"^\| (\d+)×(\d+) \| (.*)$", GUIDE.read_text(), re.MULTILINE)
    assert len(rows) >= 9
    for rows_, cols_, rest in rows:
        r, c = int(rows_), int(cols_)
        form, over, under, without = (x.strip() for x in rest.strip("|").split("|"))
        plan = ns.make_plan(r, c, schedule, torch.float32, "cpu", native=True)
        library = ns.make_plan(r, c, schedule, torch.float32, "cpu")
        assert form.lower() == plan.method
        floor = min(ns.flops(r, c, schedule, x, 0.5) for x in (None, ()))
        written = 5 * (4 * r * r * c + 2 * r**3)
        assert float(over) == pytest.approx(plan.flops / floor, abs=6e-3)
        assert float(without) == pytest.approx(library.flops / floor, abs=6e-3)
        assert float(under) == pytest.approx(written / plan.flops, abs=6e-3)
