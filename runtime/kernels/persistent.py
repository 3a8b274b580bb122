"""``norm_linear`` for many rows on devices with a tensor memory accelerator (compute capability 9.0 on).

The same product and epilogue as ``linear.norm_linear_kernel``, fed by tensor descriptors: tiles arrive
in shared memory by bulk copies that need no addresses, masks or registers, and zeros come from beyond
the edges. One program per processor walks over the tiles, so that the loads of the next tile run during
the epilogue of the last. Floor and algebra as there.

Descriptors need rows that begin at multiples of 16 bytes, and a workspace of 128 bytes a descriptor and
program, which the launcher provides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import tile_of
from .linear import store_tile


@triton.jit
def describe(
    w, N, K, w_stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Tiles of a weight ``[N, K]`` (of its memory ``[K, N]`` if ``TRANSPOSED``)."""
    if TRANSPOSED:
        tiles = tl.make_tensor_descriptor(w, [K, N], [w_stride, 1], [BLOCK_K, BLOCK_N])
    else:
        tiles = tl.make_tensor_descriptor(w, [N, K], [w_stride, 1], [BLOCK_N, BLOCK_K])
    return tiles


@triton.jit
def load_weight(tiles, n, k, TRANSPOSED: tl.constexpr):
    """``[k, n]``."""
    if TRANSPOSED:
        b = tiles.load([k, n])
    else:
        b = tiles.load([n, k]).T
    return b


@triton.jit
def norm_linear_persistent(
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
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Arguments as of ``norm_linear_kernel``; ``TRANSPOSED``: the weights' memory is ``[K, N]``."""
    x_tiles = tl.make_tensor_descriptor(x, [M, K], [x_stride, 1], [BLOCK_M, BLOCK_K])
    stride = w_stride_k if TRANSPOSED else w_stride
    w_tiles = describe(w, N, K, stride, BLOCK_N, BLOCK_K, TRANSPOSED)
    if DUAL:
        w2_tiles = describe(w2, N, K, stride, BLOCK_N, BLOCK_K, TRANSPOSED)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        at_m = tile_m * BLOCK_M
        at_n = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        s1 = tl.zeros((BLOCK_M,), tl.float32)
        s2 = tl.zeros((BLOCK_M,), tl.float32)
        for k in range(0, K, BLOCK_K):
            a = x_tiles.load([at_m, k])
            b = load_weight(w_tiles, at_n, k, TRANSPOSED)
            low = a.to(b.dtype)
            acc = tl.dot(low, b, acc, input_precision=PRECISION)
            if DUAL:
                b2 = load_weight(w2_tiles, at_n, k, TRANSPOSED)
                acc2 = tl.dot(low, b2, acc2, input_precision=PRECISION)
            if STATS >= 1:
                f = a.to(tl.float32)
                s2 += tl.sum(f * f, axis=1)
            if STATS >= 2:
                s1 += tl.sum(f, axis=1)
        m = at_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        n = at_n.to(tl.int64) + tl.arange(0, BLOCK_N)
        store_tile(
            (acc, acc2, s1, s2), (x, w, w2), (x_stride, 1, w_stride, w_stride_k),
            (m, n, m < M, n < N), (colsum, colsum2, bias, bias2, scale, out, stats), tile_n == 0,
            M, N, K, EPS, LIMIT, STATS, HAS_BIAS, DUAL, ACT, EVEN_K, PRECISION, BLOCK_M, BLOCK_N,
            BLOCK_K,
        )  # fmt: skip
