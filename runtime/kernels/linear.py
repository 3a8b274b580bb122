"""``norm(x) wᵀ + bias`` and its activation as ONE matrix product; the same kernel scales by given rows.

``out = act(rstd·(x wᵀ - mean·Σₖw) + bias)``, FlashNorm (2024, section 2) with the statistic taken in
the K-loop. Floor: bytes ``(M·K + N·K + M·N)·e``, FLOPs ``2·M·N·K``. What it spares beside a norm
followed by a product is ``2·M·K·e`` bytes (the normed tensor written and read), one launch, and for
LayerNorm's mean nothing but arithmetic.

Rows are independent: what is in one (NaN, Inf, a large mean) changes no other.

LayerNorm cancels when ``|mean|`` is large beside the deviation: ``Σx²/K - mean²`` loses
``log2(1 + mean²/var)`` of float32's 24 bits. A tile with rows beyond ``LIMIT`` (a bound on
``mean²/var``) is multiplied again with the mean of those rows subtracted first, in the same kernel and
without a host decision.

Weights are ``[N, K]``. With ``DUAL`` there are two of equal shape and strides (of one merged weight or
of two layers), and the result is ``act(x wᵀ…)·(x w2ᵀ…)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import activation, centered_product, product, tile_of

# ``operands``, ``strides`` and ``at`` are those of ``gemm.product``. ``ending`` is what the epilogue
# reads and writes: (colsum, colsum2, bias, bias2, scale, out, stats); ``sums`` what a product made:
# (acc, acc2, Σx, Σx²).


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
    sums,
    operands,
    strides,
    at,
    ending,
    is_first,
    M,
    N,
    K,
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
    """From products and sums to results: what every kernel of this family ends with.

    ``stats`` (``[1 or 2, M]``: rstd, then mean or sum) is written if ``is_first``.
    """
    acc, acc2, s1, s2 = sums
    colsum, colsum2, bias, bias2, scale, out, stats = ending
    m, n, m_mask, n_mask = at
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
        square = shift * shift
        var = s2 / K - square
        # the variance of rows with Inf is NaN, and so are their results; that of others, if squares
        # left float32's range
        far = ((square > LIMIT * var) | (var != var)) & (tl.abs(shift) < float("inf"))
        if tl.max(far.to(tl.int32), axis=0) > 0:
            # for the other rows this is the same product once more
            acc, acc2, s1, s2 = centered_product(
                operands, strides, at, K, tl.where(far, shift, 0.0), DUAL, EVEN_K, PRECISION, BLOCK_M,
                BLOCK_N, BLOCK_K,
            )  # fmt: skip
            shift = s1 / K
            var = s2 / K - shift * shift
        rstd = tl.rsqrt(var + EPS)
    y = activation(
        affine_rows(acc, rstd, shift, colsum, bias, n, n_mask, STATS == 2, HAS_BIAS), ACT
    )
    if DUAL:
        y *= affine_rows(acc2, rstd, shift, colsum2, bias2, n, n_mask, STATS == 2, HAS_BIAS)
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
    """One output tile. ``STATS``: 0 scale by ``scale[M]``, 1 RMSNorm, 2 LayerNorm, 3 CRMSNorm."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    operands = (x, w, w2)
    strides = (x_stride, 1, w_stride, w_stride_k)
    at = (m, n, m < M, n < N)
    ending = (colsum, colsum2, bias, bias2, scale, out, stats)
    sums = product(
        operands, strides, at, 0, K, STATS, DUAL, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )
    store_tile(
        sums, operands, strides, at, ending, tile_n == 0, M, N, K, EPS, LIMIT, STATS, HAS_BIAS, DUAL,
        ACT, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


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
        (x, w, w2), (x_stride, 1, w_stride, w_stride_k), (m, n, m_mask, n_mask), begin, end, STATS,
        DUAL, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
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
    """Sum the splits of a part of one row in a fixed order, then the epilogue; ``(row, columns)``."""
    m = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask = m < M
    n_mask = n < N
    mask = m_mask[:, None] & n_mask[None, :]
    plane = tl.cast(M, tl.int64) * N
    cell = m[:, None] * N + n[None, :]
    acc = tl.zeros((1, BLOCK_N), tl.float32)
    acc2 = tl.zeros((1, BLOCK_N), tl.float32)
    s1 = tl.zeros((1,), tl.float32)
    s2 = tl.zeros((1,), tl.float32)
    for s in range(SPLITS):
        if DUAL:
            acc += tl.load(partial + s * 2 * plane + cell, mask=mask, other=0.0)
            acc2 += tl.load(partial + (s * 2 + 1) * plane + cell, mask=mask, other=0.0)
        else:
            acc += tl.load(partial + s * plane + cell, mask=mask, other=0.0)
        if STATS >= 1:
            s1 += tl.load(sums + s * 2 * M + m, mask=m_mask, other=0.0)
            s2 += tl.load(sums + (s * 2 + 1) * M + m, mask=m_mask, other=0.0)
    store_tile(
        (acc, acc2, s1, s2), (x, w, w2), (x_stride, 1, w_stride, w_stride_k), (m, n, m_mask, n_mask),
        (colsum, colsum2, bias, bias2, scale, out, stats), tl.program_id(1) == 0, M, N, K, EPS, LIMIT,
        STATS, HAS_BIAS, DUAL, ACT, False, "ieee", 1, BLOCK_N, BLOCK_K,
    )  # fmt: skip
