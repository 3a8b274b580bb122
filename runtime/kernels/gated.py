"""GatedNorm: ``y ⊙ gate·σ(silu(y downᵀ) upᵀ)`` with ``y = rms_norm(x)``, rank at most 64.

Floor: ``2·d·e`` bytes per row forward (x in, result out), ``3·d·e`` backward for dx and ``2·d·e`` more
for the gradients of the small weights; ``4·d·r`` FLOPs per row forward. A program holds 16 rows and
steps over their columns three times (statistic, down projection, gate): memory is asked once, the
other times answer from the caches (16 rows of 8192 bfloat16 are 256 KiB), and both weights stream
through them, ``2·d·r·e`` bytes shared by all programs.

Nothing of size ``[rows, d]`` is kept for backward: it recomputes y and the gate from ``rstd`` and
``t = y downᵀ`` (``[rows, r]``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .norms import affine, round_to

# Helpers take what belongs together as tuples: ``at`` = (rows, columns, their masks), ``vectors`` =
# (gain, bias). ``CASTS`` is one number, since flags inside a tuple count as true whatever they are:
# has gain, has bias (one bit each), rounding of the norm, of the gain, of the bias (two bits each).


@triton.jit
def load_rows(x, r, c, stride, r_mask, c_mask):
    """``[rows, columns]`` as float32."""
    mask = r_mask[:, None] & c_mask[None, :]
    return tl.load(x + r[:, None] * stride + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_up(up, c, k, rank, c_mask):
    """``up`` (``[d, r]``) as ``[columns, rank]``."""
    mask = c_mask[:, None] & (k[None, :] < rank)
    return tl.load(up + c[:, None] * rank + k[None, :], mask=mask, other=0.0)


@triton.jit
def load_down(down, c, k, cols, rank, c_mask):
    """``down`` (``[r, d]``) as ``[rank, columns]``."""
    mask = (k[:, None] < rank) & c_mask[None, :]
    return tl.load(down + k[:, None] * cols + c[None, :], mask=mask, other=0.0)


@triton.jit
def load_normed(x, vectors, rstd, at, stride, CASTS: tl.constexpr):
    """Of a chunk of columns: normalized x, and y after gain and bias, both float32."""
    r, c, r_mask, c_mask = at
    h = load_rows(x, r, c, stride, r_mask, c_mask) * rstd[:, None]
    y = affine(
        h,
        vectors[0],
        vectors[1],
        c,
        c_mask,
        CASTS & 1 == 1,
        CASTS & 2 == 2,
        CASTS >> 2 & 3,
        CASTS >> 4 & 3,
        CASTS >> 6 & 3,
    )
    return h, y


@triton.jit
def gated_fwd(
    x,
    gain,
    bias,
    down,
    up,
    out,
    t_out,
    stats,
    rows,
    cols,
    rank,
    x_stride,
    EPS: tl.constexpr,
    GATE: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM_DT: tl.constexpr,
    GAIN_DT: tl.constexpr,
    BIAS_DT: tl.constexpr,
    OUT_DT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``BLOCK_R`` rows. ``t_out`` is ``[rows, rank]`` float32, ``stats`` is ``[rows]`` (rstd)."""
    dtype = out.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    r_mask = r < rows
    vectors = (gain, bias)
    CASTS: tl.constexpr = HAS_GAIN + 2 * HAS_BIAS + 4 * NORM_DT + 16 * GAIN_DT + 64 * BIAS_DT
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, cols, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        h = load_rows(x, r, c, x_stride, r_mask, c < cols)
        total += tl.sum(h * h, axis=1)
    rstd = tl.rsqrt(total / cols + EPS)
    tl.store(stats + r, rstd, mask=r_mask)
    t = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(0, cols, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        c_mask = c < cols
        _, y = load_normed(x, vectors, rstd, (r, c, r_mask, c_mask), x_stride, CASTS)
        d = load_down(down, c, k, cols, rank, c_mask).to(dtype)
        t = tl.dot(y.to(dtype), tl.trans(d), t, input_precision=PRECISION)
    mask = r_mask[:, None] & (k[None, :] < rank)
    tl.store(t_out + r[:, None] * rank + k[None, :], t, mask=mask)
    s = (t * tl.sigmoid(t)).to(dtype)
    for start in range(0, cols, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        c_mask = c < cols
        _, y = load_normed(x, vectors, rstd, (r, c, r_mask, c_mask), x_stride, CASTS)
        u = load_up(up, c, k, rank, c_mask).to(dtype)
        z = tl.dot(s, tl.trans(u), input_precision=PRECISION)
        y = round_to(y, OUT_DT) * (GATE * tl.sigmoid(z))
        at = r[:, None] * cols + c[None, :]
        tl.store(out + at, y, mask=r_mask[:, None] & c_mask[None, :])


@triton.jit
def gate_chunk(
    x,
    dout,
    vectors,
    up,
    s,
    rstd,
    at,
    k,
    rank,
    strides,
    GATE: tl.constexpr,
    CASTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a chunk of columns, recomputed: normalized x, y, the gradient straight through the gate,
    the gradient of the gate's pre-activation, and the piece of ``up``."""
    r, c, r_mask, c_mask = at
    h, y = load_normed(x, vectors, rstd, at, strides[0], CASTS)
    do = load_rows(dout, r, c, strides[1], r_mask, c_mask)
    u = load_up(up, c, k, rank, c_mask).to(s.dtype)
    g = tl.sigmoid(tl.dot(s, tl.trans(u), input_precision=PRECISION))
    return h, y, do * (GATE * g), do * y * (GATE * g * (1.0 - g)), u


@triton.jit
def row_chunk(
    x,
    dout,
    vectors,
    down,
    up,
    s,
    dt,
    rstd,
    at,
    k,
    cols,
    rank,
    strides,
    GATE: tl.constexpr,
    CASTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a chunk of columns: normalized x, and the gradient that reaches it."""
    h, _y, dy, _dz, _u = gate_chunk(
        x, dout, vectors, up, s, rstd, at, k, rank, strides, GATE, CASTS, PRECISION
    )
    d = load_down(down, at[1], k, cols, rank, at[3]).to(s.dtype)
    w = tl.dot(dt, d, dy, input_precision=PRECISION)
    if CASTS & 1 == 1:
        w = w * tl.load(vectors[0] + at[1], mask=at[3], other=0.0).to(tl.float32)[None, :]
    return h, w


@triton.jit
def gated_bwd_rows(
    x,
    dout,
    gain,
    bias,
    down,
    up,
    t_in,
    stats,
    dx,
    dt_out,
    rows,
    cols,
    rank,
    x_stride,
    do_stride,
    GATE: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM_DT: tl.constexpr,
    GAIN_DT: tl.constexpr,
    BIAS_DT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx of ``BLOCK_R`` rows and ``dt`` (``[rows, rank]`` float32, gradient of ``y downᵀ``)."""
    dtype = dout.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    r_mask = r < rows
    t_mask = r_mask[:, None] & (k[None, :] < rank)
    vectors = (gain, bias)
    strides = (x_stride, do_stride)
    CASTS: tl.constexpr = HAS_GAIN + 2 * HAS_BIAS + 4 * NORM_DT + 16 * GAIN_DT + 64 * BIAS_DT
    rstd = tl.load(stats + r, mask=r_mask, other=0.0)
    t = tl.load(t_in + r[:, None] * rank + k[None, :], mask=t_mask, other=0.0)
    sig = tl.sigmoid(t)
    s = (t * sig).to(dtype)
    ds = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(0, cols, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        at = (r, c, r_mask, c < cols)
        _h, _y, _dy, dz, u = gate_chunk(
            x, dout, vectors, up, s, rstd, at, k, rank, strides, GATE, CASTS, PRECISION
        )
        ds = tl.dot(dz.to(dtype), u, ds, input_precision=PRECISION)
    dt = ds * (sig * (1.0 + t * (1.0 - sig)))
    tl.store(dt_out + r[:, None] * rank + k[None, :], dt, mask=t_mask)
    dt = dt.to(dtype)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, cols, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        at = (r, c, r_mask, c < cols)
        h, w = row_chunk(
            x, dout, vectors, down, up, s, dt, rstd, at, k, cols, rank, strides, GATE, CASTS, PRECISION
        )  # fmt: skip
        total += tl.sum(w * h, axis=1)
    total = total / cols
    for start in range(0, cols, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        at = (r, c, r_mask, c < cols)
        h, w = row_chunk(
            x, dout, vectors, down, up, s, dt, rstd, at, k, cols, rank, strides, GATE, CASTS, PRECISION
        )  # fmt: skip
        w = (w - h * total[:, None]) * rstd[:, None]
        mask = r_mask[:, None] & (c[None, :] < cols)
        tl.store(dx + r[:, None] * cols + c[None, :], w, mask=mask)


@triton.jit
def gated_bwd_columns(
    x,
    dout,
    gain,
    bias,
    down,
    up,
    t_in,
    dt_in,
    stats,
    dgain,
    dbias,
    ddown,
    dup,
    rows,
    cols,
    rank,
    x_stride,
    do_stride,
    rows_per_program,
    GATE: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM_DT: tl.constexpr,
    GAIN_DT: tl.constexpr,
    BIAS_DT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Shares of the weights' gradients; programs are ``(columns, rows)``.

    ``dgain``, ``dbias`` are ``[parts, cols]``, ``ddown``, ``dup`` are ``[parts, cols, rank]``.
    """
    dtype = dout.dtype.element_ty
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    c_mask = c < cols
    vectors = (gain, bias)
    strides = (x_stride, do_stride)
    CASTS: tl.constexpr = HAS_GAIN + 2 * HAS_BIAS + 4 * NORM_DT + 16 * GAIN_DT + 64 * BIAS_DT
    d = load_down(down, c, k, cols, rank, c_mask).to(dtype)
    sum_g = tl.zeros((BLOCK_C,), tl.float32)
    sum_b = tl.zeros((BLOCK_C,), tl.float32)
    sum_down = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    sum_up = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    begin = part * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    for start in range(begin, end, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        r_mask = r < end
        t_mask = r_mask[:, None] & (k[None, :] < rank)
        rstd = tl.load(stats + r, mask=r_mask, other=0.0)
        t = tl.load(t_in + r[:, None] * rank + k[None, :], mask=t_mask, other=0.0)
        s = (t * tl.sigmoid(t)).to(dtype)
        dt = tl.load(dt_in + r[:, None] * rank + k[None, :], mask=t_mask, other=0.0).to(dtype)
        at = (r, c, r_mask, c_mask)
        h, y, dy, dz, _u = gate_chunk(
            x, dout, vectors, up, s, rstd, at, k, rank, strides, GATE, CASTS, PRECISION
        )
        # a bias makes y of rows beyond the end non-zero, but their dt, dz and dy are zero
        sum_up = tl.dot(tl.trans(dz.to(dtype)), s, sum_up, input_precision=PRECISION)
        sum_down = tl.dot(tl.trans(y.to(dtype)), dt, sum_down, input_precision=PRECISION)
        if HAS_GAIN or HAS_BIAS:
            w = tl.dot(dt, d, dy, input_precision=PRECISION)
            sum_g += tl.sum(w * round_to(h, NORM_DT), axis=0)
            sum_b += tl.sum(w, axis=0)
    if HAS_GAIN:
        tl.store(dgain + part * cols + c, sum_g, mask=c_mask)
    if HAS_BIAS:
        tl.store(dbias + part * cols + c, sum_b, mask=c_mask)
    at = (part * cols + c)[:, None] * rank + k[None, :]
    mask = c_mask[:, None] & (k[None, :] < rank)
    tl.store(ddown + at, sum_down, mask=mask)
    tl.store(dup + at, sum_up, mask=mask)
