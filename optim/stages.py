"""Stages: what optimizers are made of. A stage is a pure function on a batch of same-shape matrices.

A stage takes a :class:`Batch` and returns a new one; it reads and replaces ``update`` and its own
entries of ``state``, never writes into a tensor, and never branches on a value (data-dependent
choices are ``torch.where``), so any list of stages can be traced and compiled. Stages are frozen
dataclasses: their fields are static and enter the compile cache's key, while hyper-parameters that a
scheduler may move are 0-d tensors in ``Batch.hyper``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import polar
from .products import scratch
from .quantile import abs_quantile


@dataclass(frozen=True)
class StateSpec:
    """One state tensor per matrix: trailing ``shape``, initial value, dtype.

    ``fill`` is a number or ``"eye"``; ``dtype=None`` means the parameter's, else that dtype whatever
    the parameter's (statistics that half precision would ruin).
    """

    shape: tuple[int, int]
    fill: float | str = 0.0
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Batch:
    """What flows through the stages; ``B`` matrices of one shape ``[r, c]``.

    Attributes:
        direction: ``[B, r, c]``, with ``factors`` the update so far (descent is its negative); starts
            as the gradient.
        grad: ``[B, r, c]``, the gradient, in the computing dtype.
        param: ``[B, r, c]`` if a stage reads parameters, else None.
        state: name to ``[B, *spec.shape]``, in the computing dtype.
        hyper: name to 0-d tensor: ``lr``, ``weight_decay`` and the algorithm's own.
        constants: name to ``[B, 1, 1]``: per-matrix numbers fixed by the original shape.
        step: ``[B, 1, 1]``, number of this step from 1, if a stage counts steps.
        decay: ``[B, 1, 1]`` multiplier of the weight decay of each matrix, None for 1.
        factors: numbers, ``[B, 1, 1]``, ``[B, r, 1]`` or ``[B, 1, c]`` that multiply ``direction``. The
            last ones are multiplied where the parameter is updated: a scaling costs no pass over memory.
    """

    direction: Tensor
    grad: Tensor
    param: Tensor | None
    state: Mapping[str, Tensor]
    hyper: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]
    step: Tensor | None = None
    decay: Tensor | None = None
    factors: tuple[Tensor | float, ...] = ()

    @property
    def update(self) -> Tensor:
        """``[B, r, c]``, the direction with its factors multiplied."""
        return times(self.direction, self.factors)

    def with_(self, update: Tensor, **state: Tensor) -> Batch:
        """This batch with a new update and the named states replaced."""
        return replace(self, direction=update, factors=(), state={**self.state, **state})

    def scaled(self, *factors: Tensor | float) -> Batch:
        """This batch with its update multiplied by numbers, ``[B, 1, 1]`` or line factors."""
        return replace(self, factors=(*self.factors, *factors))


@dataclass(frozen=True)
class Stage:
    """Base class. Subclasses are frozen dataclasses implementing ``__call__``.

    Class attributes: ``elementwise`` (each entry on its own: needs no matrix), ``transposable``
    (commutes with transposition, so a shape and its transpose may share a batch), ``reads_param`` (reads
    ``param``, or ``grad`` after a stage that replaced the update), ``counts_steps``, ``reads_ndim``
    (wants the constant ``is_vector``: 1 for 0-D and 1-D parameters).
    """

    elementwise: ClassVar[bool] = False
    transposable: ClassVar[bool] = False
    reads_param: ClassVar[bool] = False
    counts_steps: ClassVar[bool] = False
    reads_ndim: ClassVar[bool] = False

    @property
    def period(self) -> int | None:
        """Every so many steps :meth:`refresh` runs first, outside any graph; None: never."""
        return None

    def refresh(self, batch: Batch) -> dict[str, Tensor]:
        """New values of states, computed rarely and eagerly (a singular value decomposition)."""
        return {}

    def states(self, rows: int, cols: int) -> dict[str, StateSpec]:
        return {}

    def constants(self, rows: int, cols: int) -> dict[str, float]:
        """Numbers fixed by the matrix's original (untransposed) shape."""
        return {}

    def flops(self, rows: int, cols: int) -> float:
        """About what one matrix costs, to share matrices out to threads evenly; here, what could be
        computed while its entries are read and written."""
        return 100.0 * rows * cols

    def __call__(self, batch: Batch) -> Batch:
        raise NotImplementedError


# -- momentum --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Momentum(Stage):
    """Heavy ball (``buf = μ·buf + g``) or average (``ema``: ``buf += (1-μ)(g - buf)``), Nesterov.

    Nesterov blends once more: ``g + μ·buf`` or ``g + μ·(buf - g)``.
    """

    style: str = "ema"
    nesterov: bool = True
    elementwise: ClassVar[bool] = True
    transposable: ClassVar[bool] = True

    def states(self, rows: int, cols: int) -> dict[str, StateSpec]:
        return {"momentum_buffer": StateSpec((rows, cols))}

    def __call__(self, batch: Batch) -> Batch:
        g, mu = batch.update, batch.hyper["momentum"]
        buf = batch.state["momentum_buffer"]
        if self.style == "ema":
            buf = torch.lerp(buf, g, (1 - mu).to(g.dtype))
            out = torch.lerp(g, buf, mu.to(g.dtype)) if self.nesterov else buf
        else:
            buf = mu * buf + g
            out = g + mu * buf if self.nesterov else buf
        return batch.with_(out, momentum_buffer=buf)


# -- denoise ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipOutliers(Stage):
    """ROOT's soft-threshold residual: entries are clamped to the ``quantile`` of their magnitudes."""

    quantile: float = 0.9
    eps: float = 1e-9
    transposable: ClassVar[bool] = True

    def __call__(self, batch: Batch) -> Batch:
        bound = abs_quantile(batch.update, self.quantile) + self.eps
        return batch.with_(torch.maximum(torch.minimum(batch.update, bound), -bound))


# -- direction -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Orthogonalize(Stage):
    """Newton–Schulz polar factor of every matrix; see :func:`normfuse.optim.orthogonalize`."""

    settings: polar.Settings
    transposable: ClassVar[bool] = True

    def flops(self, rows: int, cols: int) -> float:
        return polar.flops(rows, cols, self.settings)

    def __call__(self, batch: Batch) -> Batch:
        return batch.with_(polar.apply_settings(batch.update, self.settings))


@dataclass(frozen=True)
class UnitFrobenius(Stage):
    """``u / ‖u‖_F`` per matrix, 0 for 0."""

    eps: float = 0.0
    transposable: ClassVar[bool] = True

    def __call__(self, batch: Batch) -> Batch:
        u = batch.update
        return batch.with_(u).scaled(safe_inverse(frobenius(u), self.eps))


@dataclass(frozen=True)
class DivideByCosh(Stage):
    """AuON's contrast: divide by ``RMS(cosh(factor·u)) + eps`` over the matrix."""

    factor: float = 1.0
    eps: float = 1e-8
    transposable: ClassVar[bool] = True

    def __call__(self, batch: Batch) -> Batch:
        u = batch.update
        # cosh(x)² = (1 + cosh 2x)/2 = 1 + sinh²x; the second form keeps q-1 ~ 1/(2N) exact
        excess = torch.sinh(self.factor * u).square().mean((-2, -1), keepdim=True)
        return batch.with_(u).scaled(1 / (torch.sqrt(1 + excess) + self.eps))


@dataclass(frozen=True)
class NormalizeLines(Stage):
    """Scale each row (``dim=-1``) or column (``dim=-2``) to RMS 1; zero lines stay zero."""

    dim: int = -1
    eps: float = 1e-8

    def __call__(self, batch: Batch) -> Batch:
        u = batch.update
        return batch.with_(u).scaled(1 / line_rms(u, self.dim).clamp(min=self.eps))


@dataclass(frozen=True)
class Sinkhorn(Stage):
    """Alternate row and column RMS normalization, ``iterations`` times, ending with columns.

    The matrix is kept as ``diag(r)·G·diag(c)``: an iteration only reads ``G²``, once (on CPUs; its two
    halves are matrix–vector products on block rows), and the factors are multiplied where the parameter
    is updated: nothing but the parameter is written.
    """

    iterations: int = 5
    eps: float = 1e-8

    def __call__(self, batch: Batch) -> Batch:
        u = batch.update
        return batch.with_(u).scaled(*sinkhorn_factors(u, self.iterations, self.eps))


#: Rows of a sweep that stay in the last cache between its two halves.
_SWEEP_BYTES = 2**24


# An operator of its own: unrolled into a graph, its sweeps take a compiler minutes, and what it would
# gain is small, because they only read.
@torch.library.custom_op("normfuse_optim::sinkhorn_factors", mutates_args=())
def sinkhorn_factors(u: Tensor, iterations: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(s, r, c)``, ``[B, 1, 1]``, ``[B, r, 1]`` and ``[B, 1, c]``, for which ``u·s·r·c`` has row and
    column RMS 1."""
    rows, cols = u.shape[-2:]

    def renewed(old: Tensor, sums: Tensor, length: int) -> Tensor:
        # squares of factors, from the lines' sums of squares without them; a zero line keeps its own:
        # growing it every iteration would end in inf·0
        return torch.where(sums > 0, length / sums.maximum(eps * eps / old), old)

    size = rows
    if u.device.type == "cpu":
        size = max(1, _SWEEP_BYTES // (u.shape[0] * cols * u.itemsize))
    square = scratch("square", u.shape, u)
    r = torch.ones_like(u[..., :1], memory_format=torch.contiguous_format)
    c = torch.ones_like(u[..., :1, :], memory_format=torch.contiguous_format)
    blocks = list(zip(*(x.split(size, -2) for x in (u, square, r)), strict=True))
    # Entries spread over many orders of magnitude: squares are taken of u/max|u|.
    peaks = [_peak(source) for source, *_ in blocks]
    scale = safe_inverse(torch.cat(peaks, -1).amax(-1, keepdim=True))
    for source, block, _ in blocks:
        torch.mul(source, scale, out=block).square_()
    for _ in range(iterations):
        # a row's factor needs that row only, so one read of the matrix serves both halves
        weights, sums = c.mT, torch.zeros_like(c)
        for _, block, part in blocks:
            part.copy_(renewed(part, _right(block, weights), cols))
            sums += _left(part.mT, block)
        c = renewed(c, sums, rows)
    return scale, r.sqrt(), c.sqrt()


def _peak(u: Tensor) -> Tensor:
    """``max|u|`` of each matrix, ``[B, 1, 1]``."""
    if u.shape[0] > 1:
        return u.abs().amax((-2, -1), keepdim=True)
    low, high = torch.aminmax(u)  # one read; slow along a dimension
    return torch.maximum(-low, high).view(1, 1, 1)


def _right(matrix: Tensor, column: Tensor) -> Tensor:
    """``matrix·column``; the library has a product of one matrix and a vector, but none of batches."""
    if matrix.shape[0] > 1:
        return torch.bmm(matrix, column)
    return torch.mv(matrix[0], column.flatten())[None, :, None]


def _left(row: Tensor, matrix: Tensor) -> Tensor:
    """``row·matrix``."""
    if matrix.shape[0] > 1:
        return torch.bmm(row, matrix)
    return torch.mv(matrix[0].T, row.flatten())[None, None]


@sinkhorn_factors.register_fake
def _(u, iterations, eps):  # type: ignore[no-untyped-def]
    r, c = u[..., :1], u[..., :1, :]
    return c[..., :1].new_empty((u.shape[0], 1, 1)), r.new_empty(r.shape), c.new_empty(c.shape)


@dataclass(frozen=True)
class StandardizeRows(Stage):
    """SWAN's GradNorm: subtract each row's mean and divide by its (population) deviation."""

    eps: float = 1e-8

    def __call__(self, batch: Batch) -> Batch:
        u = batch.update
        centred = u - u.mean(-1, keepdim=True, dtype=torch.float64).to(u.dtype)
        return batch.with_(centred / (line_rms(centred, -1) + self.eps))


@dataclass(frozen=True)
class Whiten(Stage):
    """``(u·uᵀ)^{-1/2}·u`` by Newton's iteration for the inverse root, at the norm of ``u``.

    From ``Z = I``, ``Z ← (3I - Z·(u·uᵀ)·Z)·Z/2``: what it makes of ``u`` is the cubic Newton–Schulz
    iteration, which is how it is computed. (Products of the coupled form, which carries ``Z·u·uᵀ``
    along, are symmetric but for rounding; made symmetric they diverge.)
    """

    iterations: int = 10
    restore_norm: bool = True
    transposable: ClassVar[bool] = True

    def _settings(self, dtype: torch.dtype) -> polar.Settings:
        return polar.Settings(((1.5, -0.5, 0.0),) * self.iterations, dtype=dtype)

    def flops(self, rows: int, cols: int) -> float:
        return polar.flops(rows, cols, self._settings(torch.float32))

    def __call__(self, batch: Batch) -> Batch:
        u = batch.update
        out = polar.apply_settings(u, self._settings(u.dtype))
        if self.restore_norm:
            out = out * (frobenius(u) * safe_inverse(frobenius(out)))
        return batch.with_(out)


# -- second moment ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormalizeSecondMoment(Stage):
    """NorMuon: divide lines by the running RMS of the direction, then restore its Frobenius norm.

    Args:
        reduce: ``"cols"`` averages over the last dimension (one number per row, the released code),
            ``"rows"`` over the first, ``"short"`` over the shorter one (modded-nanogpt).
        form: ``"code"`` restores the norm from before; ``"paper"`` makes the update's RMS 0.2.
    """

    reduce: str = "cols"
    form: str = "code"
    eps: float = 1e-10

    def _dim(self, rows: int, cols: int) -> int:
        if self.reduce == "short":
            return -1 if rows >= cols else -2
        return -1 if self.reduce == "cols" else -2

    def states(self, rows: int, cols: int) -> dict[str, StateSpec]:
        shape = (rows, 1) if self._dim(rows, cols) == -1 else (1, cols)
        return {"second_momentum_buffer": StateSpec(shape, dtype=torch.float32)}

    def __call__(self, batch: Batch) -> Batch:
        o, beta2 = batch.update, batch.hyper["beta2"]
        dim = self._dim(*o.shape[-2:])
        length = o.shape[dim]
        # a norm, not a mean of squares: eager, it needs no matrix of squares
        mean = torch.linalg.vector_norm(o, dim=dim, keepdim=True).square() / length
        v = batch.state["second_momentum_buffer"]
        v = v + (1 - beta2) * (mean - v)
        s = 1 / (v.sqrt() + self.eps)
        # ‖o·s‖² from the line means: no second pass over the matrix
        after = (mean * s.square()).sum((-2, -1), keepdim=True).mul(length).sqrt()
        if self.form == "code":
            before = mean.sum((-2, -1), keepdim=True).mul(length).sqrt()
            restore = before / (after + self.eps)
        else:
            restore = 0.2 * math.sqrt(o.shape[-2] * o.shape[-1]) * safe_inverse(after)
        return batch.with_(o, second_momentum_buffer=v).scaled(s * restore)


# -- scale -----------------------------------------------------------------------------------------

#: Factor on the learning rate by matrix shape ``(rows, cols)``.
SCALE_RULES: dict[str, Callable[[int, int], float]] = {
    "original": lambda r, c: math.sqrt(max(1.0, r / c)),
    "match_rms_adamw": lambda r, c: 0.2 * math.sqrt(max(r, c)),
    "spectral": lambda r, c: math.sqrt(r / c),
    "none": lambda r, c: 1.0,
}


@dataclass(frozen=True)
class Scale(Stage):
    """Multiply by a constant and by the rule's factor for the matrix's shape."""

    rule: str = "none"
    factor: float = 1.0
    elementwise: ClassVar[bool] = True
    transposable: ClassVar[bool] = True

    def constants(self, rows: int, cols: int) -> dict[str, float]:
        if self.rule == "none":
            return {}
        return {f"scale_{self.rule}": self.factor * SCALE_RULES[self.rule](rows, cols)}

    def __call__(self, batch: Batch) -> Batch:
        factor = self.factor if self.rule == "none" else batch.constants[f"scale_{self.rule}"]
        return batch if isinstance(factor, float) and factor == 1.0 else batch.scaled(factor)


@dataclass(frozen=True)
class UnitSpectral(Stage):
    """Divide by an estimate of the largest singular value (power iteration from the row norms)."""

    iterations: int = 2
    transposable: ClassVar[bool] = True

    def __call__(self, batch: Batch) -> Batch:
        u = batch.update
        tall = u.shape[-2] > u.shape[-1]
        x = u.mT if tall else u
        norm = frobenius(x)
        x = x * safe_inverse(norm)
        gram = x @ x.mT
        # start: the heaviest row of the Gram matrix, which is never orthogonal to the top vector
        heaviest = gram.square().sum(-1).argmax(-1)
        v = gram.gather(-2, heaviest[:, None, None].expand(-1, 1, gram.shape[-1])).mT
        for _ in range(self.iterations):
            v = v * safe_inverse(v.norm(dim=-2, keepdim=True))
            v = gram @ v
        top = v.norm(dim=-2, keepdim=True).sqrt()
        return batch.with_(u).scaled(safe_inverse(norm), safe_inverse(top))


@dataclass(frozen=True)
class UnitRMS(Stage):
    """Scale each matrix to RMS ``target``; zero stays zero."""

    target: float = 0.2
    transposable: ClassVar[bool] = True

    def __call__(self, batch: Batch) -> Batch:
        u = batch.update
        size = math.sqrt(u.shape[-2] * u.shape[-1])
        return batch.with_(u).scaled(safe_inverse(frobenius(u)), self.target * size)


# -- helpers ---------------------------------------------------------------------------------------


def times(x: Tensor, factors: Sequence[Tensor | float]) -> Tensor:
    for factor in factors:
        x = x * factor
    return x


def frobenius(x: Tensor) -> Tensor:
    """``[B, 1, 1]`` Frobenius norms, free of overflow and underflow for every finite input."""
    if x.dtype == torch.float64:
        return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    return norm.to(x.dtype)


def line_rms(x: Tensor, dim: int) -> Tensor:
    """RMS of each row (``dim=-1``) or column (``-2``), free of overflow for every finite input."""
    if x.device.type == "cpu":
        return _line_rms(x, dim)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float64)
    return (norm / math.sqrt(x.shape[dim])).to(x.dtype)


# An operator, because it looks at values: float64 takes a CPU several times as long.
@torch.library.custom_op("normfuse_optim::line_rms", mutates_args=())
def _line_rms(x: Tensor, dim: int) -> Tensor:
    # a norm, not a mean of squares: it needs no matrix of squares
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    if not bool(torch.isfinite(norm).all()):
        norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float64)
    return (norm / math.sqrt(x.shape[dim])).to(x.dtype)


@_line_rms.register_fake
def _(x, dim):  # type: ignore[no-untyped-def]
    return torch.empty_like(x.narrow(dim, 0, 1), memory_format=torch.contiguous_format)


def safe_inverse(x: Tensor, eps: float = 0.0) -> Tensor:
    """``1/max(x, eps)``, and 0 where ``x`` is 0 (below the smallest normal number)."""
    tiny = torch.finfo(x.dtype).tiny
    usable = x >= tiny
    return torch.where(usable, 1 / torch.where(usable, x, 1.0).clamp(min=eps), 0.0)


def describe(stages: tuple[Stage, ...]) -> str:
    """One line per stage, for reports and error messages."""
    return " → ".join(_short(s) for s in stages)


def _short(stage: Any) -> str:
    name = type(stage).__name__
    fields = [f"{k}={v!r}" for k, v in vars(stage).items() if not isinstance(v, polar.Settings)]
    return f"{name}({', '.join(fields)})"
