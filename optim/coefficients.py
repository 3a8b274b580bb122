"""Newton–Schulz coefficient sets and the certified scalar map of each.

One iteration ``X ← a·X + (b·A + c·A²)·X`` with ``A = X·Xᵀ`` maps every singular value through
``p(σ) = a·σ + b·σ³ + c·σ⁵``; a schedule is a composition of such polynomials. What a schedule does to
a matrix is therefore known exactly once its effect on an interval of singular values is known. That
band is computed here, not sampled: the image of an interval under a continuous map is an interval,
whose ends lie at the ends or at critical points, and the roots of ``p'`` are closed forms. All of it
runs in interval arithmetic with outward rounding, so the result is an enclosure.

Sources: Jordan's and You's sets (public Muon implementations), Polar Express (arXiv 2505.16932; the
generator reproduces its published tables), CANS (arXiv 2506.10935), the "aol" sets used with
Turbo-Muon (arXiv 2512.04632), the ten-step hybrid of DeepSeek-V4, the cubic set of arXiv 2606.00371.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

Triple = tuple[float, float, float]
Schedule = tuple[Triple, ...]

#: What callers may pass: a set's name, one ``(a, b, c)`` repeated, or a list of them.
CoefficientSpec = str | Sequence[float] | Sequence[Sequence[float]]

#: A schedule whose output passes this bound is refused: an optimizer step would be this many times
#: too long along one direction.
MAX_GAIN = 2.0

#: Head room above 1 that a schedule must survive: normalization and one rounding to the dtype move a
#: singular value by far less, but near the point of escape the map is too steep to be accurate.
HEAD_ROOM = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 2e-3,
    torch.bfloat16: 8e-3,
}

_JORDAN: Triple = (3.4445, -4.7750, 2.0315)

_YOU: Schedule = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

_CANS: Schedule = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)

_AOL: Schedule = (
    (4.0098, -7.0585, 2.4635),
    (3.4585, -5.5479, 2.5959),
    (2.7573, -3.2939, 1.4254),
    (2.7215, -3.0494, 1.3169),
)

_AOL_EARLY: Schedule = (
    (4.6051, -9.6552, 5.6769),
    (4.7505, -6.0861, 2.1790),
    (2.7763, -2.3190, 0.5523),
    (2.4231, -2.2861, 0.8193),
)

_CUBIC5: Schedule = (
    (3.3656576, -3.3420992, 0.0),
    (2.5744352, -1.4957376, 0.0),
    (2.5368962, -1.4312570, 0.0),
    (2.4418906, -1.2764040, 0.0),
    (2.2230472, -0.9630650, 0.0),
)


@dataclass(frozen=True)
class CoefficientSet:
    """A named schedule. ``extend`` says what follows the last row: ``"repeat"`` it or ``"cycle"``."""

    name: str
    rows: Schedule
    extend: str
    note: str

    def schedule(self, steps: int | None = None) -> Schedule:
        steps = len(self.rows) if steps is None else steps
        last = len(self.rows) - 1
        pick = (lambda i: min(i, last)) if self.extend == "repeat" else (lambda i: i % (last + 1))
        return tuple(self.rows[pick(i)] for i in range(steps))


SETS: dict[str, CoefficientSet] = {
    s.name: s
    for s in (
        CoefficientSet("jordan", (_JORDAN,) * 5, "cycle", "one triple repeated; torch.optim.Muon"),
        CoefficientSet("you", _YOU, "cycle", "tightest five steps on well-conditioned matrices"),
        CoefficientSet("cans", _CANS, "repeat", "no safety factor: guarded in half precision"),
        CoefficientSet("aol", _AOL, "cycle", "changes sign above 0.88: always guarded"),
        CoefficientSet("aol_early", _AOL_EARLY, "cycle", "positive up to 1.1"),
        CoefficientSet(
            "deepseekv4", (_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2, "repeat", "ten steps, converges"
        ),
        CoefficientSet("cubic5", _CUBIC5, "cycle", "c = 0: one product less per step"),
    )
}

#: Every accepted name; ``polar_express*`` are generated for the number of steps asked for.
NAMES = (*SETS, "polar_express", "polar_express_dion", "polar_express_raw")

#: (safety, cushion, safety on the last row too) of the generated sets, all with lower bound 1e-3.
_POLAR_EXPRESS = {
    "polar_express": (0.01, 0.02407327424182761),
    "polar_express_dion": (0.02, 0.02),
    "polar_express_raw": (0.0, 0.02407327424182761),
}


def _optimal_quintic(low: float, high: float) -> Triple:
    """The odd quintic closest to 1 on ``[low, high]`` in the maximum norm (a small Remez loop)."""
    if low / high >= 1 - 5e-6:
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    q, r = (3 * low + high) / 4, (low + 3 * high) / 4
    error, signs = math.inf, (1.0, -1.0, 1.0, -1.0)
    a = b = c = 0.0
    for _ in range(100):  # |ΔE| may stagnate just above the tolerance on some BLAS
        rows = [[x, x**3, x**5, s] for x, s in zip((low, q, r, high), signs, strict=True)]
        a, b, c, new = (float(v) for v in np.linalg.solve(np.array(rows), np.ones(4)))
        if abs(new - error) <= 1e-15:
            break
        error = new
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c


@lru_cache(maxsize=64)
def polar_express(
    steps: int = 5,
    *,
    lower: float = 1e-3,
    safety: float = 0.01,
    cushion: float = 0.02407327424182761,
    safety_on_last: bool = False,
) -> Schedule:
    """The Polar Express schedule: greedily optimal quintics for singular values in ``[lower, 1]``.

    Args:
        lower: smallest singular value (after normalization) that should reach 1.
        safety: rows are composed with ``σ/(1+safety)`` so that rounding cannot leave the interval.
        cushion: a row is never fitted below ``cushion`` times the upper end, which keeps early
            slopes finite; the row is then re-centred around 1.
        safety_on_last: also apply ``safety`` to the last row.
    """
    if steps < 1 or not 0 < lower < 1 or safety < 0 or not 0 <= cushion < 1:
        raise ValueError(
            f"polar_express needs steps >= 1, 0 < lower < 1, safety >= 0, 0 <= cushion < 1; got "
            f"{steps=}, {lower=}, {safety=}, {cushion=}"
        )
    low, high = lower, 1.0
    out: list[Triple] = []
    for i in range(steps):
        a, b, c = _optimal_quintic(max(low, cushion * high), high)
        if cushion * high > low:
            centre = 2 / (_value((a, b, c), low) + _value((a, b, c), high))
            a, b, c = a * centre, b * centre, c * centre
        if i < steps - 1 or safety_on_last:
            s = 1 + safety
            a, b, c = a / s, b / s**3, c / s**5
        out.append((a, b, c))
        low = _value((a, b, c), low)
        high = 2 - low
    return tuple(out)


def _value(p: Triple, x: float) -> float:
    return p[0] * x + p[1] * x**3 + p[2] * x**5


def scalar_map(schedule: Schedule, sigma: np.ndarray | float) -> np.ndarray:
    """The composed polynomial, in float64: what the iteration does to singular values."""
    x = np.asarray(sigma, dtype=np.float64)
    for a, b, c in schedule:
        y = x * x
        x = x * (a + y * (b + c * y))
    return x


def resolve(spec: CoefficientSpec, steps: int | None = None) -> Schedule:
    """A tuple of ``steps`` triples from a name, one triple (repeated) or a list of triples.

    A list shorter than ``steps`` repeats its last entry; a longer one is cut. ``steps=None`` means
    the length of the list or set, 5 for a single triple and for generated sets.
    """
    if steps is not None and (type(steps) is not int or not 0 <= steps < 100):
        raise ValueError(f"ns_steps must be an integer between 0 and 99, got {steps!r}")
    if isinstance(spec, str):
        if spec in _POLAR_EXPRESS:
            if steps == 0:
                return ()
            safety, cushion = _POLAR_EXPRESS[spec]
            return polar_express(5 if steps is None else steps, safety=safety, cushion=cushion)
        if spec not in SETS:
            raise ValueError(f"unknown coefficient set {spec!r}; known: {', '.join(NAMES)}")
        return SETS[spec].schedule(steps)
    items: list[Any] = list(spec)
    if len(items) == 3 and all(isinstance(v, (int, float)) for v in items):
        rows: list[Triple] = [_triple(items)]
        steps = 5 if steps is None else steps
    else:
        if not items:
            raise ValueError("ns_coefficients is an empty list")
        rows = [_triple(row) for row in items]
        steps = len(rows) if steps is None else steps
    return tuple(rows[min(i, len(rows) - 1)] for i in range(steps))


def _triple(row: Any) -> Triple:
    try:
        a, b, c = (float(v) for v in row)
        if all(math.isfinite(v) for v in (a, b, c)):
            return a, b, c
    except (TypeError, ValueError):
        pass
    raise ValueError(f"coefficients must be a tuple of exactly 3 finite values, got {row!r}")


@dataclass(frozen=True)
class Band:
    """Certified image of the singular values ``[lower, upper]``: all of it lies in ``[low, high]``."""

    lower: float
    upper: float
    low: float
    high: float
    slope: float

    def __str__(self) -> str:
        return f"[{self.lower:g}, {self.upper:g}] -> [{self.low:.4f}, {self.high:.4f}]"


@lru_cache(maxsize=1024)
def certify(schedule: Schedule, lower: float = 0.0, upper: float = 1.0) -> Band:
    """Exact output band of ``schedule`` over the input band, as a rigorous enclosure.

    Works step by step: the image of an interval is spanned by the images of its ends and of the
    critical points inside it, ``x² = (-3b ± √(9b²-20ac)) / 10c``. Interval arithmetic with 100 bits
    makes the enclosure about 1e-25 wider than the truth.
    """
    from mpmath.ctx_iv import MPIntervalContext  # comes with sympy

    if not 0 <= lower <= upper:
        raise ValueError(f"need 0 <= lower <= upper, got [{lower}, {upper}]")
    iv = MPIntervalContext()
    iv.prec = 100
    low, high, slope = iv.mpf(lower), iv.mpf(upper), 1.0
    for row in schedule:
        a, b, c = (iv.mpf(v) for v in row)
        slope *= row[0]

        def p(x: Any, a: Any = a, b: Any = b, c: Any = c) -> Any:
            y = x * x
            return x * (a + y * (b + c * y))

        images = [p(low), p(high)]
        for x in _critical_points(iv, a, b, c):
            inside = iv.mpf([max(x.a, low.a), min(x.b, high.b)]) if _meet(x, low, high) else None
            if inside is not None:
                images.append(p(inside))
        low = iv.mpf([min(v.a for v in images)] * 2)
        high = iv.mpf([max(v.b for v in images)] * 2)
        if float(high.b) > 1e100 or float(low.a) < -1e100:
            return Band(lower, upper, -math.inf, math.inf, slope)
    return Band(
        lower,
        upper,
        math.nextafter(float(low.a), -math.inf),
        math.nextafter(float(high.b), math.inf),
        slope,
    )


def _meet(x: Any, low: Any, high: Any) -> bool:
    return bool(x.b >= low.a and x.a <= high.b)


def _critical_points(iv: Any, a: Any, b: Any, c: Any) -> list[Any]:
    """Enclosures of the real roots of ``a + 3b·x² + 5c·x⁴``, negative ones included."""
    squares: list[Any] = []
    if float(c.a) == 0.0:
        if float(b.a) != 0.0:
            squares.append(-a / (3 * b))
    else:
        disc = 9 * b * b - 20 * a * c
        if disc.b >= 0:
            root = iv.sqrt(iv.mpf([max(disc.a, 0), disc.b]))
            squares += [(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)]
    out: list[Any] = []
    for s in squares:
        if s.b >= 0:
            x = iv.sqrt(iv.mpf([max(s.a, 0), s.b]))
            out += [x, -x]
    return out


@lru_cache(maxsize=256)
def input_scale(schedule: Schedule, dtype: torch.dtype) -> float:
    """The factor by which normalized input must shrink so that ``schedule`` is safe in ``dtype``.

    Safe means certified: over ``[0, scale·(1 + head room)]`` no singular value changes sign, ends
    above :data:`MAX_GAIN`, or (at the top) almost vanishes. 1.0 for sets that need no guard; a set
    that no shrinking down to one half
    makes safe is refused with its band.
    """
    margin = 1 + HEAD_ROOM.get(dtype, 8e-3)

    def safe(scale: float) -> bool:
        band = certify(schedule, 0.0, scale * margin)
        end = float(scalar_map(schedule, scale * margin))  # just before a change of sign it is 0
        return band.low >= -1e-12 and band.high <= MAX_GAIN and end >= 0.2 * band.high

    if safe(1.0):
        return 1.0
    if not safe(0.5):
        band = certify(schedule, 0.0, margin)
        raise ValueError(
            f"these Newton–Schulz coefficients are unstable: singular values {band}; a schedule must "
            f"keep [0, 1] inside [0, {MAX_GAIN:g}]: check the signs and the number of steps "
            f"({len(schedule)})"
        )
    good, bad = 0.5, 1.0
    for _ in range(24):
        middle = (good + bad) / 2
        good, bad = (middle, bad) if safe(middle) else (good, middle)
    return good
