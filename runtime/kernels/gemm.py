"""The matrix-product core shared by every kernel that multiplies: ``x wᵀ`` with row statistics.

The K-loop loads every element of a row of ``x`` anyway, so ``Σx²`` and ``Σx`` cost arithmetic only:
``2·BLOCK_M·BLOCK_K`` FLOPs a step beside the product's ``2·BLOCK_M·BLOCK_N·BLOCK_K``, and no bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Grouped ordering: ``GROUP`` row tiles share each column tile while it is in the L2 cache."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP * tiles_n)
    first = group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    inside = pid % (GROUP * tiles_n)
    return first + inside % size, inside // size


@triton.jit
def load_tile(
    base, r, k, r_stride, k_stride, r_mask, K_END, EVEN_K: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """``[rows, k]`` of a matrix (``[k, rows]`` if ``TRANSPOSED``), zero beyond its edges."""
    if TRANSPOSED:
        at = base + r[None, :] * r_stride + k[:, None] * k_stride
        mask = r_mask[None, :]
        if not EVEN_K:
            mask = mask & (k[:, None] < K_END)
    else:
        at = base + r[:, None] * r_stride + k[None, :] * k_stride
        mask = r_mask[:, None]
        if not EVEN_K:
            mask = mask & (k[None, :] < K_END)
    return tl.load(at, mask=mask, other=0.0)


# What belongs together goes from helper to helper as one tuple:
#   operands  (x, w, w2): pointers to rows [M, K] and to one or two weights [N, K]
#   strides   of x along rows and K, of the weights along rows and K
#   at        (m, n, their masks): int64 numbers of a tile's rows and columns
# Flags stay outside: inside a tuple they count as true whatever they are.


@triton.jit
def product(
    operands,
    strides,
    at,
    k_begin,
    k_end,
    STATS: tl.constexpr,
    DUAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``x wᵀ`` (and ``x w2ᵀ`` if ``DUAL``) over ``[k_begin, k_end)``, with ``Σx`` and ``Σx²``.

    Returns ``(acc, acc2, Σx, Σx²)`` in float32; what was not asked for is zero (``STATS``: 0 none, 1
    ``Σx²``, 2 and 3 both). Where ``x`` has another dtype it is multiplied in that of the weights; the
    sums are of ``x`` as it comes.
    """
    x, w, w2 = operands
    x_stride, x_stride_k, w_stride, w_stride_k = strides
    m, n, m_mask, n_mask = at
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    s1 = tl.zeros((BLOCK_M,), tl.float32)
    s2 = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(k_begin, k_end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = load_tile(x, m, k, x_stride, x_stride_k, m_mask, k_end, EVEN_K, False)
        b = load_tile(w, n, k, w_stride, w_stride_k, n_mask, k_end, EVEN_K, True)
        low = a.to(b.dtype)
        acc = tl.dot(low, b, acc, input_precision=PRECISION)
        if DUAL:
            b2 = load_tile(w2, n, k, w_stride, w_stride_k, n_mask, k_end, EVEN_K, True)
            acc2 = tl.dot(low, b2, acc2, input_precision=PRECISION)
        if STATS >= 1:
            f = a.to(tl.float32)
            s2 += tl.sum(f * f, axis=1)
        if STATS >= 2:
            s1 += tl.sum(f, axis=1)
    return acc, acc2, s1, s2


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr):
    """``acc + a b``; a single row, which ``dot`` does not take, in float32."""
    if BLOCK_M == 1:
        acc += tl.sum(tl.trans(a) * b.to(tl.float32), axis=0)[None, :]
    else:
        acc = tl.dot(a.to(b.dtype), b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def centered_product(
    operands,
    strides,
    at,
    K,
    mean,
    DUAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``(x - mean) wᵀ`` with the mean subtracted before the product, ``Σ(x - mean)`` and its squares.

    The slow, safe form for rows whose mean is large beside their deviation. Rows with a mean of zero come
    out as in :func:`product`.
    """
    x, w, w2 = operands
    x_stride, x_stride_k, w_stride, w_stride_k = strides
    m, n, m_mask, n_mask = at
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    s1 = tl.zeros((BLOCK_M,), tl.float32)
    s2 = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = load_tile(x, m, k, x_stride, x_stride_k, m_mask, K, EVEN_K, False)
        f = tl.where(k[None, :] < K, a.to(tl.float32) - mean[:, None], 0.0)
        s1 += tl.sum(f, axis=1)
        s2 += tl.sum(f * f, axis=1)
        b = load_tile(w, n, k, w_stride, w_stride_k, n_mask, K, EVEN_K, True)
        acc = multiply(f, b, acc, PRECISION, BLOCK_M)
        if DUAL:
            b2 = load_tile(w2, n, k, w_stride, w_stride_k, n_mask, K, EVEN_K, True)
            acc2 = multiply(f, b2, acc2, PRECISION, BLOCK_M)
    return acc, acc2, s1, s2


@triton.jit
def activation(v, ACT: tl.constexpr):
    """0 identity, 1 relu, 2 silu, 3 gelu, 4 gelu with tanh, 5 sigmoid; float32 in and out."""
    if ACT == 1:
        # not maximum(): NaN must stay NaN
        v = tl.where(v < 0.0, 0.0, v)
    elif ACT == 2:
        v = v * tl.sigmoid(v)
    elif ACT == 3:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACT == 4:
        t = 0.7978845608028654 * (v + 0.044715 * v * v * v)
        v = v * tl.sigmoid(2.0 * t)
    elif ACT == 5:
        v = tl.sigmoid(v)
    return v
