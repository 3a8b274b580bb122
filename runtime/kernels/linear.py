"""``norm(x) wᵀ + bias`` and its activation as ONE matrix product; the same kernel scales by given rows.

``out = act(rstd·(x wᵀ - mean·Σₖw) + bias)``, FlashNorm (2024, section 2) with the statistic taken in
the K-loop. Floor: bytes ``(M·K + N·K + M·N)·e``, FLOPs ``2·M·N·K``. What it spares beside a norm
followed by a product is ``2·M·K·e`` bytes (the normed tensor written and read), one launch, and for
LayerNorm's mean nothing but arithmetic.

Rows are independent: a row of NaN spoils that row only.

LayerNorm cancels when ``|mean|`` is large beside the deviation: ``Σx²/K - mean²`` loses
``log2(1 + mean²/var)`` of float32's 24 bits. Tiles with a row beyond ``LIMIT`` (a bound on
``mean²/var``) are computed again with the mean subtracted first, in the same kernel and without a
host decision.

Weights are ``[N, K]``. With ``DUAL`` there are two of equal shape and strides (of one merged weight or
of two layers), and the result is ``act(x wᵀ…)·(x w2ᵀ…)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import activation, centered_product, centered_row, product, tile_of


@triton.jit
def epilogue(
    acc,
    acc2,
    rstd,
    mean,
    colsum,
    colsum2,
    bias,
    bias2,
    n,
    n_mask,
    CENTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DUAL: tl.constexpr,
    ACT: tl.constexpr,
):
    """Mean, scale, bias and activation applied to the product."""
    acc = affine_rows(acc, rstd, mean, colsum, bias, n, n_mask, CENTER, HAS_BIAS)
    acc = activation(acc, ACT)
    if DUAL:
        acc *= affine_rows(acc2, rstd, mean, colsum2, bias2, n, n_mask, CENTER, HAS_BIAS)
    return acc


@triton.jit
def affine_rows(
    acc, rstd, mean, colsum, bias, n, n_mask, CENTER: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """``rstd·(acc - mean·colsum) + bias``."""
    if CENTER:
        acc -= mean[:, None] * tl.load(colsum + n, mask=n_mask, other=0.0)[None, :]
    acc = acc * rstd[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def store_tile(
    acc,
    acc2,
    s1,
    s2,
    x,
    w,
    w2,
    colsum,
    colsum2,
    bias,
    bias2,
    scale,
    out,
    stats,
    m,
    n,
    is_first,
    M,
    N,
    K,
    x_stride,
    w_stride,
    w_stride_k,
    EPS: tl.constexpr,
    LIMIT: tl.constexpr,
    STATS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DUAL: tl.constexpr,
    ACT: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """From products and sums to results; a LayerNorm tile that cancels is multiplied again, centered.

    ``m``, ``n`` are the tile's int64 row and column numbers; statistics are stored if ``is_first``.
    """
    m_mask = m < M
    n_mask = n < N
    # what the epilogue subtracts is the mean of what was multiplied
    shift = s1 / K
    second = shift
    if STATS == 0:
        rstd = tl.load(scale + m, mask=m_mask, other=0.0).to(tl.float32)
    elif STATS == 1:
        rstd = tl.rsqrt(s2 / K + EPS)
    elif STATS == 3:
        rstd = tl.rsqrt((s2 + s1 * s1) / (K + 1) + EPS)
        second = s1
    else:
        var = tl.maximum(s2 / K - shift * shift, 0.0)
        if tl.max((shift * shift > LIMIT * var).to(tl.int32), axis=0) > 0:
            acc, acc2, s1, s2 = centered_product(
                x,
                w,
                w2,
                m,
                n,
                m_mask,
                n_mask,
                K,
                shift,
                x_stride,
                w_stride,
                w_stride_k,
                DUAL,
                EVEN_K,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
            shift = s1 / K
            var = s2 / K - shift * shift
        rstd = tl.rsqrt(var + EPS)
    y = epilogue(
        acc,
        acc2,
        rstd,
        shift,
        colsum,
        colsum2,
        bias,
        bias2,
        n,
        n_mask,
        STATS == 2,
        HAS_BIAS,
        DUAL,
        ACT,
    )
    tl.store(out + m[:, None] * N + n[None, :], y, mask=m_mask[:, None] & n_mask[None, :])
    if STATS >= 1:
        first = m_mask & is_first
        tl.store(stats + m, rstd, mask=first)
        if STATS >= 2:
            tl.store(stats + M + m, second, mask=first)


@triton.jit
def norm_linear_kernel(
    x,
    w,
    w2,
    colsum,
    colsum2,
    bias,
    bias2,
    scale,
    out,
    stats,
    M,
    N,
    K,
    x_stride,
    w_stride,
    w_stride_k,
    EPS: tl.constexpr,
    LIMIT: tl.constexpr,
    STATS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DUAL: tl.constexpr,
    ACT: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One output tile. ``STATS``: 0 scale by ``scale[M]``, 1 RMSNorm, 2 LayerNorm, 3 CRMSNorm.

    ``stats`` (``[1 or 2, M]``, rstd, then mean or sum) is written by the first column of tiles.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask = m < M
    n_mask = n < N
    acc, acc2, s1, s2 = product(
        x,
        w,
        w2,
        m,
        n,
        m_mask,
        n_mask,
        0,
        K,
        x_stride,
        w_stride,
        w_stride_k,
        STATS,
        DUAL,
        EVEN_K,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    store_tile(
        acc,
        acc2,
        s1,
        s2,
        x,
        w,
        w2,
        colsum,
        colsum2,
        bias,
        bias2,
        scale,
        out,
        stats,
        m,
        n,
        tile_n == 0,
        M,
        N,
        K,
        x_stride,
        w_stride,
        w_stride_k,
        EPS,
        LIMIT,
        STATS,
        HAS_BIAS,
        DUAL,
        ACT,
        EVEN_K,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )


@triton.jit
def norm_linear_split(
    x,
    w,
    w2,
    partial,
    sums,
    M,
    N,
    K,
    x_stride,
    w_stride,
    w_stride_k,
    span,
    STATS: tl.constexpr,
    DUAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A few rows against a long K: programs ``(tile, split)`` write ``partial[split, (1|2), M, N]``
    and, from the first column of tiles, ``sums[split, 2, M]`` (``Σx``, ``Σx²``). No atomics, hence
    deterministic."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, 1)
    split = tl.program_id(1)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask = m < M
    n_mask = n < N
    begin = split * span
    end = tl.minimum(begin + span, K)
    acc, acc2, s1, s2 = product(
        x,
        w,
        w2,
        m,
        n,
        m_mask,
        n_mask,
        begin,
        end,
        x_stride,
        w_stride,
        w_stride_k,
        STATS,
        DUAL,
        EVEN_K,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    mask = m_mask[:, None] & n_mask[None, :]
    plane = tl.cast(M, tl.int64) * N
    at = m[:, None] * N + n[None, :]
    if DUAL:
        tl.store(partial + split * 2 * plane + at, acc, mask=mask)
        tl.store(partial + (split * 2 + 1) * plane + at, acc2, mask=mask)
    else:
        tl.store(partial + split * plane + at, acc, mask=mask)
    if STATS >= 1:
        first = m_mask & (tile_n == 0)
        tl.store(sums + split * 2 * M + m, s1, mask=first)
        tl.store(sums + (split * 2 + 1) * M + m, s2, mask=first)


@triton.jit
def norm_linear_finish(
    partial,
    sums,
    x,
    w,
    w2,
    colsum,
    colsum2,
    bias,
    bias2,
    scale,
    out,
    stats,
    M,
    N,
    K,
    x_stride,
    w_stride,
    w_stride_k,
    EPS: tl.constexpr,
    LIMIT: tl.constexpr,
    STATS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DUAL: tl.constexpr,
    ACT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum the splits of one row's span in a fixed order, then the epilogue; ``(row, columns)``.

    A LayerNorm row that cancels is multiplied again here, centered, element by element.
    """
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    plane = tl.cast(M, tl.int64) * N
    acc = tl.zeros((1, BLOCK_N), tl.float32)
    acc2 = tl.zeros((1, BLOCK_N), tl.float32)
    s1 = tl.zeros((1,), tl.float32)
    s2 = tl.zeros((1,), tl.float32)
    for s in range(SPLITS):
        at = m * N + n[None, :]
        if DUAL:
            acc += tl.load(partial + s * 2 * plane + at, mask=n_mask[None, :], other=0.0)
            acc2 += tl.load(partial + (s * 2 + 1) * plane + at, mask=n_mask[None, :], other=0.0)
        else:
            acc += tl.load(partial + s * plane + at, mask=n_mask[None, :], other=0.0)
        if STATS >= 1:
            s1 += tl.load(sums + s * 2 * M + m)
            s2 += tl.load(sums + (s * 2 + 1) * M + m)
    shift = s1 / K
    second = shift
    if STATS == 0:
        rstd = shift + tl.load(scale + m).to(tl.float32)
    elif STATS == 1:
        rstd = tl.rsqrt(s2 / K + EPS)
    elif STATS == 3:
        rstd = tl.rsqrt((s2 + s1 * s1) / (K + 1) + EPS)
        second = s1
    else:
        var = tl.maximum(s2 / K - shift * shift, 0.0)
        if tl.max((shift * shift > LIMIT * var).to(tl.int32), axis=0) > 0:
            acc, acc2, s1, s2 = centered_row(
                x + m * x_stride,
                w,
                w2,
                n,
                n_mask,
                K,
                shift,
                w_stride,
                w_stride_k,
                DUAL,
                BLOCK_N,
                BLOCK_K,
            )
            shift = s1 / K
            var = s2 / K - shift * shift
        rstd = tl.rsqrt(var + EPS)
    y = epilogue(
        acc,
        acc2,
        rstd,
        shift,
        colsum,
        colsum2,
        bias,
        bias2,
        n,
        n_mask,
        STATS == 2,
        HAS_BIAS,
        DUAL,
        ACT,
    )
    if STATS >= 1:
        if tl.program_id(1) == 0:
            tl.store(stats + m + tl.arange(0, 1), rstd)
            if STATS >= 2:
                tl.store(stats + M + m + tl.arange(0, 1), second)
    tl.store(out + m * N + n[None, :], y, mask=n_mask[None, :])
