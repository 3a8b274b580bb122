"""``orthogonalize``: the polar factor of one matrix, a batch, or a list, by Newton–Schulz.

Rules that hold for every form, dtype and device:

- the caller's tensors are only read;
- the norm is taken in float64 (one pass), so the result does not depend on the input's scale from
  the dtype's smallest normal number up, unless ``eps`` says otherwise;
- a zero matrix gives a zero matrix; a matrix holding NaN or Inf gives zeros (``non_finite="skip"``)
  or an error (``"raise"``), and never touches the matrices batched with it;
- the cast to ``ns_dtype`` happens after normalization, where everything is at most 1.

Distance of the result from the exact polynomial in float64 (Frobenius, relative), the bands tested:
float64 1e-9; float32 3e-4 in the direct form and 5e-4 in the Gram form on well-conditioned input,
1e-3 on input of condition 1e3 (3e-3 for ``cans``, whose first row is steep, and 2e-2 over twenty
steps); float16 2e-2 and bfloat16 3e-2, on condition 1e3 5e-2 and 0.12. On rank-deficient input bfloat16
fills the null space with noise. Common sets (``jordan``, ``you``, ``polar_express``) reach 1e-5 in
float32 direct form.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import kernel_products, threads
from . import newton_schulz as ns
from .coefficients import CoefficientSpec, Schedule, input_scale, resolve
from .products import scratch

NORMALIZATIONS = ("frobenius", "schatten", "aol")
NON_FINITE = ("skip", "raise")

#: Scratch of one batched call; larger batches run in slices. On CPUs slices that stay in cache are
#: up to a tenth faster than one call.
MAX_SCRATCH_BYTES = 512 * 2**20
CPU_SCRATCH_BYTES = 8 * 2**20


class Settings(NamedTuple):
    """Everything that fixes the map, resolved and validated; hashable."""

    schedule: Schedule
    method: str = "auto"
    normalization: str = "frobenius"
    eps: float = 0.0
    dtype: torch.dtype | None = None
    non_finite: str = "skip"
    restarts: tuple[int, ...] | None = None

    def working_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype inside the iteration for input ``x``."""
        if self.dtype is not None:
            return self.dtype
        if x.dtype == torch.float64:
            return torch.float64
        # float16 after float32 normalization is several times more accurate than bfloat16 at the
        # same speed on GPUs; on CPUs it is emulated and slow, and float32 has the tight band.
        return torch.float32 if x.device.type == "cpu" else torch.float16


def settings(
    *,
    coefficients: CoefficientSpec = "polar_express",
    steps: int | None = 5,
    method: str = "auto",
    normalization: str = "frobenius",
    eps: float = 0.0,
    ns_dtype: torch.dtype | None = None,
    non_finite: str = "skip",
    restarts: Sequence[int] | None = None,
) -> Settings:
    """Validate the user's arguments; raises ``ValueError`` with the reason."""
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}")
    if non_finite not in NON_FINITE:
        raise ValueError(f"non_finite must be one of {NON_FINITE}, got {non_finite!r}")
    if method not in ns.METHODS:
        raise ValueError(f"method must be one of {ns.METHODS}, got {method!r}")
    if not (isinstance(eps, (int, float)) and 0 <= eps < float("inf")):
        raise ValueError(f"eps must be finite and >= 0, got {eps}")
    if ns_dtype is not None and ns_dtype not in ns.DTYPES:
        raise ValueError(f"ns_dtype must be a real floating dtype, got {ns_dtype}")
    schedule = resolve(coefficients, steps)
    input_scale(schedule, ns_dtype or torch.float16)  # refuses unstable sets now, not in step()
    return Settings(
        schedule,
        method,
        normalization,
        float(eps),
        ns_dtype,
        non_finite,
        None if restarts is None else tuple(int(i) for i in restarts),
    )


# What ``torch.compiler.assume_constant_result`` does, which would import Dynamo: in a compiled caller the
# settings are made once, while tracing.
settings._dynamo_marked_constant = True  # type: ignore[attr-defined]

#: Frobenius norms for which float32 squares lose nothing that matters to underflow or overflow.
_PLAIN_NORMS = (1e-12, 1e15)
_TINY = torch.finfo(torch.float32).tiny


def _norms(x: Tensor) -> Tensor:
    """Frobenius norms ``[B, 1, 1]`` in float64 of matrices in a lower precision."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        # rows in float32, then float64: as accurate, and without a float64 copy of the matrix
        rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        norm = torch.linalg.vector_norm(rows, dim=-2, keepdim=True, dtype=torch.float64)
        low, high = _PLAIN_NORMS
        if bool(((norm > low) & (norm < high)).all()):
            return norm
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)


def _inverse_norms(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(1/‖x‖_F, finite)`` per matrix, float64 ``[B, 1, 1]``; 0 for zero and non-finite ones."""
    dims = (-2, -1)
    if x.dtype == torch.float64:
        peak = x.abs().amax(dims, keepdim=True)
        safe = torch.where((peak > 0) & torch.isfinite(peak), peak, 1.0)
        norm = torch.linalg.vector_norm(x / safe, dim=dims, keepdim=True) * safe
        finite = torch.isfinite(peak)
    else:
        norm = _norms(x)
        finite = torch.isfinite(norm)
    tiny = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).tiny
    usable = finite & (norm >= tiny)
    inverse = torch.where(usable, 1.0 / torch.where(usable, norm, 1.0).clamp(min=eps), 0.0)
    return inverse, finite


def _normalize(
    x: Tensor, s: Settings, dtype: torch.dtype, plan: ns.Plan
) -> tuple[Tensor, Tensor | None]:
    """Normalized copy of ``x`` in ``dtype``, and its Gram matrix if the normalization formed it."""
    inverse, finite = _inverse_norms(x, s.eps)
    scale = input_scale(s.schedule, dtype)
    accumulate = torch.float64 if torch.float64 in (x.dtype, dtype) else torch.float32
    if x.device.type == "cpu" and accumulate == torch.float32:
        if bool(((inverse > 0) & (inverse < _TINY)).any()):
            accumulate = torch.float64  # norms beyond float32: their inverses lose digits in it
    plain = s.normalization == "frobenius"
    factor = (inverse * scale if plain else inverse).to(accumulate)
    if x.dtype == accumulate == dtype:
        y = torch.mul(x, factor, out=scratch("y", x.shape, x))
    else:
        y = x.to(accumulate) * factor
    # NaN·0 is NaN, so masked matrices are selected away, not multiplied.
    if plan.kernels is not None or x.device.type != "cpu" or not bool(finite.all()):
        y = torch.where(finite, y, 0.0)
    y = y.to(dtype)
    if plain:
        return y, None
    # Tighter bounds on the spectral norm from the Gram matrix that step one needs anyway.
    tall = y.shape[-2] > y.shape[-1]
    side, ways = min(y.shape[-2:]), plan.batched(y)
    room = ways.room("first", (*y.shape[:-2], side, side), y)
    g = ways.gram(y, tall, room).to(accumulate)
    if s.normalization == "schatten":
        quad = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True)
        inv = torch.where(quad > 0, torch.rsqrt(torch.where(quad > 0, quad, 1.0)), 0.0) * scale
        return y * inv.to(dtype), (g * inv * inv).to(dtype)
    sums = g.abs().sum(-1, keepdim=True)
    inv = torch.where(sums > 0, torch.rsqrt(torch.where(sums > 0, sums, 1.0)), 0.0) * scale
    y = y * (inv.mT if tall else inv).to(dtype)
    return y, (g * inv * inv.mT).to(dtype)


def _scratch_each(x: Tensor, dtype: torch.dtype) -> int:
    """Bytes of scratch an iteration takes for each matrix of ``x``."""
    rows, cols = x.shape[-2:]
    side = min(rows, cols)
    return (3 * side * side + 3 * rows * cols) * dtype.itemsize


def _slice(x: Tensor, dtype: torch.dtype) -> int:
    """How many matrices one batched call takes on a GPU."""
    return max(1, min(x.shape[0], MAX_SCRATCH_BYTES // _scratch_each(x, dtype)))


def flops(rows: int, cols: int, s: Settings) -> float:
    """About what one matrix takes, in the form that :func:`orthogonalize_batch` would choose."""
    return _plan((rows, cols), s, s.dtype or torch.float32, torch.device("cpu")).flops


def _kernels(x: Tensor, s: Settings) -> kernel_products.KernelProducts | None:
    """Which products of ``x`` go through our kernels."""
    if x.numel() == 0:
        return None
    dtype = s.working_dtype(x)
    rows, cols = x.shape[-2:]
    return kernel_products.choose(_slice(x, dtype), rows, cols, dtype, x.device)


def orthogonalize_batch(x: Tensor, s: Settings) -> Tensor:
    """``[B, r, c]`` to the same shape and dtype, every matrix on its own; ``x`` is only read."""
    out, tasks = _begin(x, s)
    if tasks:  # none in what Dynamo traces
        threads.run(tasks)
    return out


def _begin(x: Tensor, s: Settings) -> tuple[Tensor, list[threads.Task]]:
    """What :func:`orthogonalize_batch` returns, once the tasks are done."""
    if x.numel() == 0:
        return x.clone(), []
    if torch.compiler.is_dynamo_compiling() and s.non_finite == "skip":
        return _operator(x, s), []
    if s.non_finite == "raise":
        _, finite = _inverse_norms(x, s.eps)
        if not bool(finite.all()):
            bad = (~finite).flatten().nonzero().flatten().tolist()
            raise ValueError(f"matrices {bad} of the batch hold NaN or Inf")
    kernels = _kernels(x, s)
    if kernels is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        return out, _tasks(x, s, out)
    dtype = s.working_dtype(x)
    plan = _plan(x.shape, s, dtype, x.device, kernels)
    done = []
    for part in x.split(_slice(x, dtype)):
        y, gram = _normalize(part, s, dtype, plan)
        done.append(ns.iterate(y, s.schedule, plan, gram).to(x.dtype))
    return (done[0] if len(done) == 1 else torch.cat(done)).contiguous(), []


def _plan(
    shape: Sequence[int],
    s: Settings,
    dtype: torch.dtype,
    device: torch.device,
    kernels: kernel_products.KernelProducts | None = None,
) -> ns.Plan:
    rows, cols = shape[-2:]
    native = kernel_products.native(rows, cols, dtype, device)
    return ns.make_plan(
        rows, cols, s.schedule, dtype, device.type, s.method, s.restarts, kernels, native
    )


def _tasks(x: Tensor, s: Settings, out: Tensor) -> list[threads.Task]:
    """The polar factors of ``x`` into ``out``, a few matrices at a time."""
    dtype, count = s.working_dtype(x), x.shape[0]
    plan = _plan(x.shape, s, dtype, x.device)
    each = _scratch_each(x, dtype)
    if x.device.type != "cpu":
        size = _slice(x, dtype)
    elif plan.alone:  # normalizing them one by one keeps them in cache
        size = 1
    else:  # a batched product splits a batch over the threads
        cores = torch.get_num_threads()
        size = max(1, CPU_SCRATCH_BYTES // (each * cores)) * cores

    def some(low: int, high: int) -> None:
        y, gram = _normalize(x[low:high], s, dtype, plan)
        part = out[low:high]
        if dtype == out.dtype:
            ns.iterate(y, s.schedule, plan, gram, part)
        else:
            part.copy_(ns.iterate(y, s.schedule, plan, gram))

    tasks = []
    for low in range(0, count, size):
        high = min(low + size, count)
        flops = plan.flops if plan.alone else None
        call = functools.partial(some, low, high)
        tasks.append(threads.Task(call, flops, each * (high - low)))
    return tasks


# -- the same as an operator, so that a traced step holds one node ---------------------------------


def flatten_schedule(schedule: Schedule) -> list[float]:
    return [v for row in schedule for v in row]


def _settings_of(
    coefficients: Sequence[float],
    method: str,
    normalization: str,
    eps: float,
    dtype: torch.dtype | None,
    restarts: Sequence[int] | None,
) -> Settings:
    rows = tuple(
        (coefficients[i], coefficients[i + 1], coefficients[i + 2])
        for i in range(0, len(coefficients), 3)
    )
    kept = None if restarts is None else tuple(restarts)
    return Settings(rows, method, normalization, eps, dtype, "skip", kept)


@torch.library.custom_op("normfuse_optim::orthogonalize", mutates_args=())
def orthogonalize_op(
    x: Tensor,
    coefficients: Sequence[float],
    method: str,
    normalization: str,
    eps: float,
    dtype: torch.dtype | None,
    restarts: Sequence[int] | None,
) -> Tensor:
    """Operator form of :func:`orthogonalize_batch`; ``x`` is ``[B, r, c]``."""
    s = _settings_of(coefficients, method, normalization, eps, dtype, restarts)
    return orthogonalize_batch(x, s)


# what it calls is hidden from a counter that sees the operator
@register_flop_formula(torch.ops.normfuse_optim.orthogonalize)  # type: ignore[untyped-decorator]
def _count(shape, coefficients, method, normalization, eps, dtype, restarts, **_):  # type: ignore[no-untyped-def]
    s = _settings_of(coefficients, method, normalization, eps, dtype, restarts)
    return int(shape[0] * flops(shape[1], shape[2], s))


@orthogonalize_op.register_fake
def _(x, coefficients, method, normalization, eps, dtype, restarts):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def apply_settings(x: Tensor, s: Settings) -> Tensor:
    """:func:`orthogonalize_batch` as a traced step holds it, with ``non_finite`` as skip.

    One operator; where our kernels multiply, the iteration itself, so that a compiler sees their
    launches between the elementwise work around them.
    """
    if _kernels(x, s) is not None:
        return orthogonalize_batch(x, s._replace(non_finite="skip"))
    return _operator(x, s)


def _operator(x: Tensor, s: Settings) -> Tensor:
    return orthogonalize_op(
        x,
        flatten_schedule(s.schedule),
        s.method,
        s.normalization,
        s.eps,
        s.dtype,
        None if s.restarts is None else list(s.restarts),
    )


# -- the public function ----------------------------------------------------------------------------


def _check(g: Tensor, what: str) -> None:
    if not isinstance(g, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(g).__name__}")
    if g.layout != torch.strided:
        raise ValueError(f"{what} is {g.layout}; Newton–Schulz needs a dense matrix")
    if g.dtype not in ns.DTYPES:
        raise ValueError(
            f"{what} has dtype {g.dtype}; a real floating dtype from float16 to float64 is needed"
        )
    if g.ndim < 2:
        raise ValueError(f"{what} has shape {tuple(g.shape)}; a matrix or a batch is needed")


def _as_batch(g: Tensor) -> Tensor:
    return g.reshape(math.prod(g.shape[:-2]), *g.shape[-2:])


@torch.no_grad()
def orthogonalize(
    G: Tensor | Sequence[Tensor],
    steps: int | None = 5,
    method: str = "auto",
    *,
    coefficients: CoefficientSpec = "polar_express",
    normalization: str = "frobenius",
    eps: float = 0.0,
    ns_dtype: torch.dtype | None = None,
    non_finite: str = "skip",
    restarts: Sequence[int] | None = None,
) -> Any:
    """Approximate polar factor ``U·Vᵀ`` of each matrix ``U·diag(σ)·Vᵀ`` by Newton–Schulz.

    Args:
        G: ``[r, c]``, a batch ``[..., r, c]``, or a list of either, of any shapes and dtypes.
            Matrices of one shape, and of a shape and its transpose, are iterated together.
        steps: number of iterations; ``None`` takes the coefficient set's own length.
        method: ``"direct"``, ``"gram"`` or ``"auto"`` (fewest FLOPs among the accurate ones).
        coefficients: a set's name, one ``(a, b, c)``, or a list of them; see
            :mod:`normfuse.optim.coefficients`, which certifies what each does to singular values.
        normalization: ``"frobenius"``; ``"schatten"`` (Schatten-4, tighter, nearly free); ``"aol"``
            (rescales rows: an approximation whose polar factor differs from that of ``G``).
        eps: lower bound on the norm divided by; 0 means exact scale invariance.
        ns_dtype: dtype inside the iteration; ``None``: float64 for float64 input, else float32 on
            CPUs and float16 elsewhere.
        non_finite: ``"skip"`` (zeros) or ``"raise"`` for matrices holding NaN or Inf.
        restarts: iterations before which the Gram form re-forms the matrix; ``None`` chooses.

    Returns:
        New tensor(s) of the shape and dtype of ``G``.
    """
    s = settings(
        coefficients=coefficients,
        steps=steps,
        method=method,
        normalization=normalization,
        eps=eps,
        ns_dtype=ns_dtype,
        non_finite=non_finite,
        restarts=restarts,
    )
    if isinstance(G, Tensor):
        _check(G, "G")
        return orthogonalize_batch(_as_batch(G), s).reshape(G.shape)
    if not isinstance(G, Iterable):
        raise TypeError(f"G must be a tensor or a list of tensors, got {type(G).__name__}")
    matrices = list(G)
    for i, g in enumerate(matrices):
        _check(g, f"G[{i}]")
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, g in enumerate(matrices):
        r, c = g.shape[-2:]
        # Small matrices are worth turning, so that a shape and its transpose share one batch.
        turn = g.device.type != "cpu" or r * c <= ns.TURN_UP_TO
        shape = (min(r, c), max(r, c)) if turn else (r, c)
        groups.setdefault((shape, g.dtype, g.device), []).append(i)
    tasks: list[threads.Task] = []
    stacks: list[tuple[list[int], Tensor]] = []
    for (shape, *_), members in groups.items():
        parts = []
        for i in members:
            g = matrices[i]
            batch = _as_batch(g)
            parts.append(batch if tuple(batch.shape[-2:]) == shape else batch.mT)
        stack, more = _begin(parts[0] if len(parts) == 1 else torch.cat(parts), s)
        stacks.append((members, stack))
        tasks += more
    if tasks:
        threads.run(tasks)
    out: list[Tensor] = [torch.empty(0)] * len(matrices)
    for members, stack in stacks:
        counts = [math.prod(matrices[i].shape[:-2]) for i in members]
        for i, piece in zip(members, stack.split(counts), strict=True):
            g = matrices[i]
            piece = piece if piece.shape[-2:] == g.shape[-2:] else piece.mT
            out[i] = piece.reshape(g.shape).contiguous()
    return out
