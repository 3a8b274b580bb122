"""Batched products for Newton–Schulz: ``alpha·x wᵀ + beta·base``, symmetric results at half the work.

With ``SYMMETRIC`` only tiles on and below the diagonal are computed, and each is stored twice, the
second time transposed: ``X Xᵀ``, and ``s·t`` for symmetric matrices that commute (``bA + cA²`` is
``x = w = base = A``). With ``T`` tiles a side that is ``T(T+1)/2`` of ``T²`` tiles. Inside a diagonal
tile the upper half is a copy of the lower one, so results are symmetric bit for bit whatever the
order in which the hardware adds up. Without ``SYMMETRIC`` it is the application ``a·X + B·X``.

Floor, a matrix of side ``m``: FLOPs ``m²·k`` (an application: ``2·m²·n``); bytes ``(m·k + m²)·e``, and
once more the result's for a base. Beside ``baddbmm`` it spares half the FLOPs of a symmetric product,
and of every product with a base the copy of that base into the result.

Matrices are independent: NaN in one reaches no other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import product, tile_of


@triton.jit
def row_of(number):
    """Row of entry ``number`` of a lower triangle that is numbered row by row."""
    row = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # float32 may miss by one
    row = tl.where(row * (row + 1) // 2 > number, row - 1, row)
    return tl.where((row + 1) * (row + 2) // 2 <= number, row + 1, row)


@triton.jit
def triangle_tile(pid, tiles, GROUP: tl.constexpr):
    """Row and column of tile ``pid`` of the lower triangle of ``tiles × tiles``.

    Bands of ``GROUP`` rows of tiles one after another; within a band column by column, so that the rows
    of a band share each column tile while it is in the L2 cache.
    """
    first = row_of(pid) // GROUP * GROUP
    size = tl.minimum(tiles - first, GROUP)
    inside = pid - first * (first + 1) // 2
    # left of the band's own triangle stand ``first`` whole columns
    corner = tl.maximum(inside - first * size, 0)
    row = row_of(corner)
    whole = inside < first * size
    tile_m = tl.where(whole, inside % size, row)
    tile_n = tl.where(whole, inside // size, first + corner - row * (row + 1) // 2)
    return first + tile_m, tile_n


@triton.jit
def batched_product(
    x,
    w,
    base,
    out,
    M,
    N,
    K,
    x_batch_stride,
    x_stride,
    x_stride_k,
    w_batch_stride,
    w_stride,
    w_stride_k,
    base_batch_stride,
    base_stride,
    base_stride_n,
    alpha,
    beta,
    SYMMETRIC: tl.constexpr,
    HAS_BASE: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one matrix: ``out[b] = alpha·x[b] w[b]ᵀ + beta·base[b]``.

    ``x[B, M, K]``, ``w[B, N, K]`` and ``base[B, M, N]`` in any strides, ``out[B, M, N]`` contiguous.
    ``SYMMETRIC`` needs ``M == N`` and ``BLOCK_M == BLOCK_N`` and reads only the lower triangle of
    ``base``. ``WIDE``: offsets inside one matrix pass 2³¹ (those of matrices
    in a batch always may).
    """
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    if SYMMETRIC:
        each = tiles_m * (tiles_m + 1) // 2
        tile_m, tile_n = triangle_tile(pid % each, tiles_m, GROUP)
    else:
        each = tiles_m * tl.cdiv(N, BLOCK_N)
        tile_m, tile_n = tile_of(pid % each, M, N, BLOCK_M, BLOCK_N, GROUP)
    batch = (pid // each).to(tl.int64)
    if WIDE:
        tile_m = tile_m.to(tl.int64)
        tile_n = tile_n.to(tl.int64)
        begin = tl.full((), 0, tl.int64)
    else:
        begin = 0
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask = m < M
    n_mask = n < N
    acc, _, _, _ = product(
        (x + batch * x_batch_stride, w + batch * w_batch_stride, w),
        (x_stride, x_stride_k, w_stride, w_stride_k), (m, n, m_mask, n_mask), begin, K, 0, False,
        EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    # Inductor passes Python numbers as float64, in which a whole tile would be computed
    y = acc * tl.cast(alpha, tl.float32)
    mask = m_mask[:, None] & n_mask[None, :]
    if HAS_BASE:
        base += batch * base_batch_stride
        at = base + m[:, None] * base_stride + n[None, :] * base_stride_n
        y += tl.cast(beta, tl.float32) * tl.load(at, mask=mask, other=0.0).to(tl.float32)
    y = y.to(out.dtype.element_ty)
    out += batch * M * N
    if SYMMETRIC:
        mirrored = tl.trans(y)
        if tile_m == tile_n:
            y = tl.where(m[:, None] >= n[None, :], y, mirrored)
        else:
            turned = n_mask[:, None] & m_mask[None, :]
            tl.store(out + n[:, None] * N + m[None, :], mirrored, mask=turned)
    tl.store(out + m[:, None] * N + n[None, :], y, mask=mask)
