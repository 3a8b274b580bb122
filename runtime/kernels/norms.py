"""RMSNorm and LayerNorm rows: forward, residual add, statistics only, backward.

Floor, per row of ``d`` elements of ``e`` bytes: forward reads and writes ``2·d·e`` bytes (``4·d·e``
with a residual add), statistics alone ``d·e``, backward ``3·d·e`` (reads x and dy, writes dx) plus
``4·d`` bytes of partial gain gradients for each of the (few) programs. About ``8·d`` FLOPs: always
bound by memory.

Saved for backward: one float32 per row (two for LayerNorm), never the normalized row, which backward
recomputes as ``(x - mean)·rstd``.

Statistics, scaling and all sums are float32. ``*_DT`` say how intermediate results are rounded, as the
vocabulary op demands: 0 float32 (not at all), 1 bfloat16, 2 float16. ``KIND``: 1 RMSNorm, 2
LayerNorm, 3 the RMS of a zero-mean row whose last element was dropped (minus the sum of the others).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to(v, DT: tl.constexpr):
    """Round float32 values to another dtype's precision and come back."""
    if DT == 1:
        v = v.to(tl.bfloat16).to(tl.float32)
    elif DT == 2:
        v = v.to(tl.float16).to(tl.float32)
    return v


@triton.jit
def load_sum(x, residual, at_x, at_r, mask, HAS_RESIDUAL: tl.constexpr, SUM_DT: tl.constexpr):
    """``x (+ residual)`` as float32, the sum rounded as eager PyTorch rounds it."""
    h = tl.load(x + at_x, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h = round_to(h + tl.load(residual + at_r, mask=mask, other=0.0).to(tl.float32), SUM_DT)
    return h


@triton.jit
def affine(
    y,
    gain,
    bias,
    c,
    c_mask,
    HAS_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM_DT: tl.constexpr,
    GAIN_DT: tl.constexpr,
    BIAS_DT: tl.constexpr,
):
    """Gain and bias in the op's cast order; ``y`` is ``[rows, columns]`` float32."""
    y = round_to(y, NORM_DT)
    if HAS_GAIN:
        g = tl.load(gain + c, mask=c_mask, other=0.0).to(tl.float32)
        y = round_to(y * g[None, :], GAIN_DT)
    if HAS_BIAS:
        b = tl.load(bias + c, mask=c_mask, other=0.0).to(tl.float32)
        y = round_to(y + b[None, :], BIAS_DT)
    return y


@triton.jit
def norm_fwd_tile(
    x,
    residual,
    gain,
    bias,
    y,
    stream,
    stats,
    rows,
    cols,
    x_stride,
    r_stride,
    EPS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WRITE_Y: tl.constexpr,
    SUM_DT: tl.constexpr,
    NORM_DT: tl.constexpr,
    GAIN_DT: tl.constexpr,
    BIAS_DT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Whole rows in registers. ``stats`` is ``[1 or 2, rows]``: rstd, then mean (or sum, kind 3)."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    r_mask = r < rows
    c_mask = c < cols
    mask = r_mask[:, None] & c_mask[None, :]
    at = r[:, None] * cols + c[None, :]
    at_x = r[:, None] * x_stride + c[None, :]
    at_r = r[:, None] * r_stride + c[None, :]
    h = load_sum(x, residual, at_x, at_r, mask, HAS_RESIDUAL, SUM_DT)
    if HAS_RESIDUAL:
        tl.store(stream + at, h, mask=mask)
    if KIND == 2:
        mean = tl.sum(h, axis=1) / cols
        h = tl.where(mask, h - mean[:, None], 0.0)
        # what rounding left of the mean: matters where it is large beside the deviation
        rest = tl.sum(h, axis=1) / cols
        h = tl.where(mask, h - rest[:, None], 0.0)
        mean += rest
        tl.store(stats + rows + r, mean, mask=r_mask)
    if KIND == 3:
        total = tl.sum(h, axis=1)
        rstd = tl.rsqrt((tl.sum(h * h, axis=1) + total * total) / (cols + 1) + EPS)
        tl.store(stats + rows + r, total, mask=r_mask)
    else:
        rstd = tl.rsqrt(tl.sum(h * h, axis=1) / cols + EPS)
    tl.store(stats + r, rstd, mask=r_mask)
    if WRITE_Y:
        out = affine(
            h * rstd[:, None], gain, bias, c, c_mask, HAS_GAIN, HAS_BIAS, NORM_DT, GAIN_DT, BIAS_DT
        )
        tl.store(y + at, out, mask=mask)


@triton.jit
def merge(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """Count, mean and centered sum of squares of two sets together (Chan et al., 1979)."""
    n = n_a + n_b
    share = tl.where(n > 0, n_b / tl.maximum(n, 1.0), 0.0)
    delta = mean_b - mean_a
    return n, mean_a + delta * share, m2_a + m2_b + delta * delta * (n_a * share)


@triton.jit
def norm_partials(
    x,
    residual,
    stream,
    partials,
    rows,
    cols,
    x_stride,
    r_stride,
    span,
    KIND: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SUM_DT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Statistics of one span of one row: ``partials[row, split] = (pivot, mean - pivot, centered Σ²)``.

    The pivot is the mean of the span's first block: small differences to it keep the digits that a
    large mean in one float32 would lose. Programs are ``(row, split)``. Without centering they are
    ``(0, Σx, Σx²)``.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    begin = split * span
    end = tl.minimum(begin + span, cols)
    n = 0.0
    pivot = 0.0
    mean = 0.0
    m2 = 0.0
    for start in range(begin, end, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = c < end
        h = load_sum(
            x, residual, row * x_stride + c, row * r_stride + c, mask, HAS_RESIDUAL, SUM_DT
        )
        if HAS_RESIDUAL:
            tl.store(stream + row * cols + c, h, mask=mask)
        if KIND == 2:
            count = tl.minimum(end - start, BLOCK_C).to(tl.float32)
            block_mean = tl.sum(h, axis=0) / count
            d = tl.where(mask, h - block_mean, 0.0)
            rest = tl.sum(d, axis=0) / count
            d = tl.where(mask, d - rest, 0.0)
            pivot = tl.where(start == begin, block_mean, pivot)
            rest += block_mean - pivot
            n, mean, m2 = merge(n, mean, m2, count, rest, tl.sum(d * d, axis=0))
        else:
            if KIND == 3:
                mean += tl.sum(h, axis=0)
            m2 += tl.sum(h * h, axis=0)
    at = (row * SPLITS + split) * 3
    tl.store(partials + at, pivot)
    tl.store(partials + at + 1, mean)
    tl.store(partials + at + 2, m2)


@triton.jit
def norm_apply(
    h_ptr,
    gain,
    bias,
    y,
    stats,
    partials,
    rows,
    cols,
    h_stride,
    span,
    EPS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WRITE_Y: tl.constexpr,
    NORM_DT: tl.constexpr,
    GAIN_DT: tl.constexpr,
    BIAS_DT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Combine a row's partial statistics and normalize one span; programs are ``(row, split)``."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    s = tl.arange(0, BLOCK_S)
    s_mask = s < SPLITS
    at = partials + (row * SPLITS + s) * 3
    m2 = tl.load(at + 2, mask=s_mask, other=0.0)
    pivot = 0.0
    mean = 0.0
    if KIND == 2:
        pivot = tl.load(partials + row * SPLITS * 3)
        means = tl.load(at, mask=s_mask, other=0.0) - pivot
        means += tl.load(at + 1, mask=s_mask, other=0.0)
        counts = tl.maximum(tl.minimum(cols - s * span, span), 0).to(tl.float32)
        counts = tl.where(s_mask, counts, 0.0)
        mean = tl.sum(means * counts, axis=0) / cols
        d = tl.where(s_mask, means - mean, 0.0)
        m2 += d * d * counts
    square = tl.sum(m2, axis=0)
    if KIND == 3:
        total = tl.sum(tl.load(at + 1, mask=s_mask, other=0.0), axis=0)
        rstd = tl.rsqrt((square + total * total) / (cols + 1) + EPS)
    else:
        rstd = tl.rsqrt(square / cols + EPS)
    if split == 0:
        tl.store(stats + row, rstd)
        if KIND == 2:
            tl.store(stats + rows + row, pivot + mean)
        if KIND == 3:
            tl.store(stats + rows + row, total)
    if WRITE_Y:
        begin = split * span
        end = tl.minimum(begin + span, cols)
        for start in range(begin, end, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            mask = c < end
            h = tl.load(h_ptr + row * h_stride + c, mask=mask, other=0.0).to(tl.float32)
            out = affine(
                ((h - pivot - mean) * rstd)[None, :],
                gain,
                bias,
                c,
                mask,
                HAS_GAIN,
                HAS_BIAS,
                NORM_DT,
                GAIN_DT,
                BIAS_DT,
            )
            tl.store(y + row * cols + c[None, :], out, mask=mask[None, :])


@triton.jit
def norm_bwd_tile(
    h_ptr,
    dy,
    dstream,
    gain,
    stats,
    dx,
    dgain,
    dbias,
    rows,
    cols,
    h_stride,
    dy_stride,
    ds_stride,
    rows_per_program,
    KIND: tl.constexpr,
    HAS_DSTREAM: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM_DT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx of whole rows, and this program's share of dgain and dbias (``[programs, cols]``).

    With ``h = x̂`` the normalized row and ``w = dy·gain``:
    ``dx = rstd·(w - x̂·mean(w·x̂) - mean(w))``; the last mean for LayerNorm only. Kind 3 has
    ``dx = rstd·(w - (x̂ + Σx̂)·Σ(w·x̂)/(d + 1))``.
    """
    pid = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    c_mask = c < cols
    if HAS_GAIN:
        g = tl.load(gain + c, mask=c_mask, other=0.0).to(tl.float32)
        sum_g = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_BIAS:
        sum_b = tl.zeros((BLOCK_C,), tl.float32)
    begin = pid * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    for start in range(begin, end, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        r_mask = r < end
        mask = r_mask[:, None] & c_mask[None, :]
        h = tl.load(h_ptr + r[:, None] * h_stride + c[None, :], mask=mask, other=0.0)
        w = tl.load(dy + r[:, None] * dy_stride + c[None, :], mask=mask, other=0.0)
        h = h.to(tl.float32)
        w = w.to(tl.float32)
        rstd = tl.load(stats + r, mask=r_mask, other=0.0)
        if KIND == 2:
            mean = tl.load(stats + rows + r, mask=r_mask, other=0.0)
            h = h - mean[:, None]
        h = tl.where(mask, h * rstd[:, None], 0.0)
        if HAS_BIAS:
            sum_b += tl.sum(w, axis=0)
        if HAS_GAIN:
            sum_g += tl.sum(w * round_to(h, NORM_DT), axis=0)
            w = w * g[None, :]
        dot = tl.sum(w * h, axis=1)
        if KIND == 3:
            total = tl.load(stats + rows + r, mask=r_mask, other=0.0)
            d = w - (h + (total * rstd)[:, None]) * (dot / (cols + 1))[:, None]
        else:
            d = w - h * (dot / cols)[:, None]
        if KIND == 2:
            d -= (tl.sum(w, axis=1) / cols)[:, None]
        d = d * rstd[:, None]
        if HAS_DSTREAM:
            at = r[:, None] * ds_stride + c[None, :]
            d += tl.load(dstream + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + r[:, None] * cols + c[None, :], d, mask=mask)
    if HAS_GAIN:
        tl.store(dgain + pid * cols + c, sum_g, mask=c_mask)
    if HAS_BIAS:
        tl.store(dbias + pid * cols + c, sum_b, mask=c_mask)


@triton.jit
def norm_bwd_loop(
    h_ptr,
    dy,
    dstream,
    gain,
    stats,
    dx,
    rows,
    cols,
    h_stride,
    dy_stride,
    ds_stride,
    KIND: tl.constexpr,
    HAS_DSTREAM: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx of one row of any length: one pass for the two means, one for the result."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(stats + row)
    mean = 0.0
    if KIND == 2:
        mean = tl.load(stats + rows + row)
    wh = tl.zeros((BLOCK_C,), tl.float32)
    ww = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, cols, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = c < cols
        h = tl.load(h_ptr + row * h_stride + c, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(dy + row * dy_stride + c, mask=mask, other=0.0).to(tl.float32)
        if HAS_GAIN:
            w = w * tl.load(gain + c, mask=mask, other=0.0).to(tl.float32)
        wh += tl.where(mask, w * ((h - mean) * rstd), 0.0)
        ww += w
    # dx = rstd·(w - x̂·c1 - c2)
    c1 = tl.sum(wh, axis=0) / cols
    c2 = 0.0
    if KIND == 2:
        c2 = tl.sum(ww, axis=0) / cols
    if KIND == 3:
        c1 = tl.sum(wh, axis=0) / (cols + 1)
        c2 = tl.load(stats + rows + row) * rstd * c1
    for start in range(0, cols, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = c < cols
        h = tl.load(h_ptr + row * h_stride + c, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(dy + row * dy_stride + c, mask=mask, other=0.0).to(tl.float32)
        if HAS_GAIN:
            w = w * tl.load(gain + c, mask=mask, other=0.0).to(tl.float32)
        d = (w - ((h - mean) * rstd) * c1 - c2) * rstd
        if HAS_DSTREAM:
            d += tl.load(dstream + row * ds_stride + c, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + row * cols + c, d, mask=mask)


@triton.jit
def norm_bwd_columns(
    h_ptr,
    dy,
    stats,
    dgain,
    dbias,
    rows,
    cols,
    h_stride,
    dy_stride,
    rows_per_program,
    KIND: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM_DT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Shares of dgain and dbias for rows too long for a tile; programs are ``(columns, rows)``."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1).to(tl.int64)
    c_mask = c < cols
    sum_g = tl.zeros((BLOCK_C,), tl.float32)
    sum_b = tl.zeros((BLOCK_C,), tl.float32)
    begin = part * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    for start in range(begin, end, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        r_mask = r < end
        mask = r_mask[:, None] & c_mask[None, :]
        w = tl.load(dy + r[:, None] * dy_stride + c[None, :], mask=mask, other=0.0)
        w = w.to(tl.float32)
        if HAS_GAIN:
            h = tl.load(h_ptr + r[:, None] * h_stride + c[None, :], mask=mask, other=0.0)
            h = h.to(tl.float32)
            if KIND == 2:
                h = h - tl.load(stats + rows + r, mask=r_mask, other=0.0)[:, None]
            h = h * tl.load(stats + r, mask=r_mask, other=0.0)[:, None]
            sum_g += tl.sum(tl.where(mask, w * round_to(h, NORM_DT), 0.0), axis=0)
        sum_b += tl.sum(w, axis=0)
    if HAS_GAIN:
        tl.store(dgain + part * cols + c, sum_g, mask=c_mask)
    if HAS_BIAS:
        tl.store(dbias + part * cols + c, sum_b, mask=c_mask)
