// A low-rank gate on rows of width d, and its gradients:
//
//     out = y * scale * sigmoid(silu(y * down') * up')
//
// Blocks of rows go through the width a strip at a time. What a library's products and elementwise loops
// write to memory and read again between them, here stays in registers and the first cache: the logits,
// their gradient, and the strip's weights, laid out as products want them. Rows are shared out in chunks
// that depend on their number only, and sums over rows are taken chunk by chunk, so results do not depend
// on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#include "transpose.h"

namespace {

constexpr int LANES = 8, VECTORS = 2, COLUMNS = LANES * VECTORS;
// Rows of a tile: with twice as many accumulators, two vectors and one entry, sixteen registers.
constexpr int ROWS = 6;
// Rows that share a strip's weights, and columns of a strip; both as measured, and neither matters much.
constexpr int64_t BLOCK = 11 * ROWS, STRIP = 16 * COLUMNS;
// Rows of a chunk, of one of two, and how many chunks there are at most: each has sums of its own.
constexpr int64_t CHUNK = 64, HALF = 24, MOST_CHUNKS = 64;

typedef float Vector __attribute__((vector_size(32)));
typedef float Unaligned __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(32)));

#define ALWAYS_INLINE inline __attribute__((always_inline))

ALWAYS_INLINE Vector load(const float* from) { return *(const Unaligned*)from; }
ALWAYS_INLINE void store(float* to, Vector value) { *(Unaligned*)to = value; }

// Taylor's series after reduction to half of ln 2: 5e-9 relative. NaN stays, the rest ends at e^+-87.
ALWAYS_INLINE Vector exponential(Vector x) {
  x = x > 87.f ? Vector{} + 87.f : x;
  x = x < -87.f ? Vector{} - 87.f : x;
  constexpr float LOG2_E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  constexpr float SHIFT = 12582912.f + 127.f;  // adding it rounds, and leaves the exponent's bits last
  Vector shifted = x * LOG2_E + SHIFT;
  Vector n = shifted - SHIFT;
  Vector r = x - n * LN2_HIGH - n * LN2_LOW;
  Vector sum = r * (1.f / 5040) + 1.f / 720;
  sum = sum * r + 1.f / 120;
  sum = sum * r + 1.f / 24;
  sum = sum * r + 1.f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.f;
  sum = sum * r + 1.f;
  return sum * (Vector)((Integers)shifted << 23);
}

ALWAYS_INLINE Vector sigmoid(Vector x) {
  Vector value = 1.f / (1.f + exponential(-x));
  return x < -87.f ? Vector{} : value;
}

template <int N>
struct Tile {
  Vector at[N][VECTORS];

  ALWAYS_INLINE void zero() {
#pragma GCC unroll 6
    for (int i = 0; i < N; i++)
      for (int j = 0; j < VECTORS; j++) at[i][j] = Vector{};
  }
  ALWAYS_INLINE void plus(const float* addend, int64_t row) {
#pragma GCC unroll 6
    for (int i = 0; i < N; i++)
      for (int j = 0; j < VECTORS; j++) at[i][j] += load(addend + i * row + j * LANES);
  }
  ALWAYS_INLINE void write(float* to, int64_t row) const {
#pragma GCC unroll 6
    for (int i = 0; i < N; i++)
      for (int j = 0; j < VECTORS; j++) store(to + i * row + j * LANES, at[i][j]);
  }
  // Adds left * right; entry (i, k) of left is at i * row + k * step.
  ALWAYS_INLINE void add(int64_t depth, const float* left, int64_t row, int64_t step, const float* right,
                         int64_t right_row) {
    for (int64_t k = 0; k < depth; k++, left += step, right += right_row) {
      Vector line[VECTORS];
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; j++) line[j] = load(right + j * LANES);
#pragma GCC unroll 6
      for (int i = 0; i < N; i++) {
        float entry = left[i * row];
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; j++) at[i][j] += entry * line[j];
      }
    }
  }
};

// Memory of one thread, kept from call to call.
struct Scratch {
  std::unique_ptr<float[]> memory;
  int64_t size = 0;
  float* need(int64_t entries) {
    if (entries > size) {
      memory.reset(new float[entries]);
      size = entries;
    }
    return memory.get();
  }
};

struct Gate {
  int64_t width, rank, padded;  // rank, and rank to a whole number of tiles
  float scale;
  const float *down, *up;  // [rank][width] and [width][rank]
};

struct Rows {
  const float* data;
  int64_t stride;
  Rows operator+(int64_t row) const { return {data + row * stride, stride}; }
};

// [lines][length] to [length][lines], rows `from_row` and `to_row` apart.
__attribute__((noinline, noclone)) void transpose(const float* from, int64_t from_row, int64_t lines, int64_t length,
                                                  float* to, int64_t to_row) {
  constexpr int STEP = Square<float>::STEP;
  int64_t i = 0;
  for (; i + STEP <= lines; i += STEP) {
    int64_t k = 0;
    for (; k + STEP <= length; k += STEP)
      Square<float>::transpose(from + i * from_row + k, from_row, to + k * to_row + i, to_row);
    for (; k < length; k++)
      for (int64_t line = i; line < i + STEP; line++) to[k * to_row + line] = from[line * from_row + k];
  }
  for (; i < lines; i++)
    for (int64_t k = 0; k < length; k++) to[k * to_row + i] = from[i * from_row + k];
}

// `step(N, row)` for tiles of N rows, constants all.
template <typename Step>
ALWAYS_INLINE void in_tiles(int64_t rows, const Step& step) {
  int64_t row = 0;
  for (; row + ROWS <= rows; row += ROWS) step(std::integral_constant<int, ROWS>(), row);
  switch (rows - row) {
    case 5: return step(std::integral_constant<int, 5>(), row);
    case 4: return step(std::integral_constant<int, 4>(), row);
    case 3: return step(std::integral_constant<int, 3>(), row);
    case 2: return step(std::integral_constant<int, 2>(), row);
    case 1: return step(std::integral_constant<int, 1>(), row);
  }
}

// Adds left * right, [lines][wide], to what is there, unless `fresh`; entry (i, k) of left is at
// i * row + k * step.
ALWAYS_INLINE void multiply(int64_t lines, int64_t wide, int64_t depth, const float* left, int64_t row, int64_t step,
                            const float* right, int64_t right_row, bool fresh, float* to, int64_t to_row) {
  in_tiles(lines, [&](auto count, int64_t line) {
    for (int64_t c = 0; c < wide; c += COLUMNS) {
      Tile<decltype(count)::value> sum;
      sum.zero();
      sum.add(depth, left + line * row, row, step, right + c, right_row);
      if (!fresh) sum.plus(to + line * to_row + c, to_row);
      sum.write(to + line * to_row + c, to_row);
    }
  });
}

// What a thread works on. A value, inlined: stores through vectors may alias whatever has an address.
struct Block {
  Gate g;
  int64_t rows;
  float *inner, *dt, *dinner;  // [BLOCK][padded]
  float *dz, *weights;         // [BLOCK][STRIP], [STRIP][padded]

  static int64_t size(const Gate& g) { return 3 * BLOCK * g.padded + BLOCK * STRIP + STRIP * g.padded; }
  Block(const Gate& g, int64_t rows, float* memory) : g(g), rows(rows) {
    inner = memory;
    dt = inner + BLOCK * g.padded;
    dinner = dt + BLOCK * g.padded;
    dz = dinner + BLOCK * g.padded;
    weights = dz + BLOCK * STRIP;
    std::memset(inner, 0, 3 * BLOCK * g.padded * sizeof(float));
  }

  ALWAYS_INLINE void silu(const float* from) const {
    for (int64_t k = 0; k < rows * g.padded; k += LANES) {
      Vector value = load(from + k);
      store(inner + k, value * sigmoid(value));
    }
  }

  // The up weights of columns from `left` on as [tile][rank][COLUMNS].
  ALWAYS_INLINE void up_panels(int64_t left, int64_t wide) const {
    for (int64_t c = 0; c < wide; c += COLUMNS)
      transpose(g.up + (left + c) * g.rank, g.rank, COLUMNS, g.rank, weights + c * g.padded, COLUMNS);
  }

  // `finish(row, column, logits)` for every vector of logits in the strip that `up_panels` prepared.
  template <typename Finish>
  ALWAYS_INLINE void logits(int64_t wide, const Finish& finish) const {
    in_tiles(rows, [&](auto count, int64_t row) {
      constexpr int N = decltype(count)::value;
      for (int64_t c = 0; c < wide; c += COLUMNS) {
        Tile<N> sum;
        sum.zero();
        sum.add(g.rank, inner + row * g.padded, g.padded, 1, weights + c * g.padded, COLUMNS);
        for (int i = 0; i < N; i++)
          for (int j = 0; j < VECTORS; j++) finish(row + i, c + j * LANES, sum.at[i][j]);
      }
    });
  }

  ALWAYS_INLINE void forward(Rows y, float* out, float* t) const {
    for (int64_t left = 0; left < g.width; left += STRIP) {
      const int64_t wide = std::min(STRIP, g.width - left);
      if (g.rank != g.padded) std::memset(weights, 0, STRIP * g.padded * sizeof(float));
      transpose(g.down + left, g.width, g.rank, wide, weights, g.padded);
      multiply(rows, g.padded, wide, y.data + left, y.stride, 1, weights, g.padded, false, inner, g.padded);
    }
    for (int64_t i = 0; i < rows; i++) std::memcpy(t + i * g.rank, inner + i * g.padded, g.rank * sizeof(float));
    silu(inner);
    for (int64_t left = 0; left < g.width; left += STRIP) {
      const int64_t wide = std::min(STRIP, g.width - left);
      up_panels(left, wide);
      logits(wide, [&](int64_t row, int64_t c, Vector z) {
        store(out + row * g.width + left + c, load(y.data + row * y.stride + left + c) * (sigmoid(z) * g.scale));
      });
    }
  }

  // ddown [rank][width] and dup [width][padded] are sums over blocks; `fresh`: this is the first one.
  ALWAYS_INLINE void backward(Rows y, Rows dout, const float* t, float* dy, float* ddown, float* dup,
                              bool fresh) const {
    for (int64_t i = 0; i < rows; i++) std::memcpy(dt + i * g.padded, t + i * g.rank, g.rank * sizeof(float));
    silu(dt);
    for (int64_t left = 0; left < g.width; left += STRIP) {
      const int64_t wide = std::min(STRIP, g.width - left);
      up_panels(left, wide);
      logits(wide, [&](int64_t row, int64_t c, Vector z) {
        Vector gate = sigmoid(z);
        Vector around = load(dout.data + row * dout.stride + left + c) * (gate * g.scale);
        store(dy + row * g.width + left + c, around);
        store(dz + row * STRIP + c, around * load(y.data + row * y.stride + left + c) * (1.f - gate));
      });
      multiply(wide, g.padded, rows, dz, 1, STRIP, inner, g.padded, fresh, dup + left * g.padded, g.padded);
      const float* lines = g.up + left * g.rank;
      if (g.rank != g.padded) {
        std::memset(weights, 0, wide * g.padded * sizeof(float));
        for (int64_t c = 0; c < wide; c++)
          std::memcpy(weights + c * g.padded, lines + c * g.rank, g.rank * sizeof(float));
        lines = weights;
      }
      multiply(rows, g.padded, wide, dz, STRIP, 1, lines, g.padded, false, dinner, g.padded);
    }
    for (int64_t k = 0; k < rows * g.padded; k += LANES) {
      Vector value = load(dt + k), gate = sigmoid(value);
      store(dt + k, load(dinner + k) * (gate * (1.f + value * (1.f - gate))));
    }
    for (int64_t left = 0; left < g.width; left += STRIP) {
      const int64_t wide = std::min(STRIP, g.width - left);
      for (int64_t k = 0; k < g.rank; k++)
        std::memcpy(weights + k * STRIP, g.down + k * g.width + left, wide * sizeof(float));
      multiply(rows, wide, g.rank, dt, g.padded, 1, weights, STRIP, false, dy + left, g.width);
      multiply(g.rank, wide, rows, dt, 1, g.padded, y.data + left, y.stride, fresh, ddown + left, g.width);
    }
  }
};

Gate make(const int64_t* sizes, const float* down, const float* up, double scale) {
  const int64_t width = sizes[1], rank = sizes[2];
  return {width, rank, (rank + COLUMNS - 1) / COLUMNS * COLUMNS, float(scale), down, up};
}

ALWAYS_INLINE void add(const float* __restrict from, int64_t count, bool fresh, float* __restrict to) {
  for (int64_t i = 0; i < count; i++) to[i] = fresh ? from[i] : to[i] + from[i];
}

// `work(chunk, begin, end)` on several threads.
template <typename Work>
void in_chunks(int64_t rows, int64_t chunks, int threads, const Work& work) {
  const int64_t height = (rows + chunks - 1) / chunks;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && chunks > 1)
  for (int64_t chunk = 0; chunk < chunks; chunk++)
    work(chunk, std::min(chunk * height, rows), std::min((chunk + 1) * height, rows));
}

int64_t chunks_of(int64_t rows) {
  int64_t chunks = rows < 2 * HALF ? 1 : 2;
  while (chunks < MOST_CHUNKS && 2 * chunks * CHUNK <= rows) chunks *= 2;
  return chunks;
}

}  // namespace

// sizes: rows, width (a multiple of 16), rank. Rows of y and dout are `stride` apart, all else is contiguous.
extern "C" void normfuse_gate(const int64_t* sizes, const float* y, int64_t y_stride, const float* down,
                              const float* up, double scale, float* out, float* t, int threads) {
  const Gate g = make(sizes, down, up, scale);
  const Rows rows{y, y_stride};
  in_chunks(sizes[0], chunks_of(sizes[0]), threads, [&](int64_t, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    float* memory = scratch.need(Block::size(g));
    for (int64_t top = begin; top < end; top += BLOCK) {
      const Block block(g, std::min(BLOCK, end - top), memory);
      block.forward(rows + top, out + top * g.width, t + top * g.rank);
    }
  });
}

// Entries of `sums` that the backward wants to work in.
extern "C" int64_t normfuse_gate_sums(const int64_t* sizes) {
  return 2 * chunks_of(sizes[0]) * sizes[1] * make(sizes, nullptr, nullptr, 0).padded;
}

extern "C" void normfuse_gate_backward(const int64_t* sizes, const float* y, int64_t y_stride, const float* dout,
                                       int64_t dout_stride, const float* down, const float* up, const float* t,
                                       double scale, float* dy, float* ddown, float* dup, float* sums, int threads) {
  const Gate g = make(sizes, down, up, scale);
  const Rows rows{y, y_stride}, gradients{dout, dout_stride};
  const int64_t chunks = chunks_of(sizes[0]), size = g.width * g.padded;
  in_chunks(sizes[0], chunks, threads, [&](int64_t chunk, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    float *memory = scratch.need(Block::size(g)), *sum = sums + 2 * chunk * size;
    if (begin == end) std::memset(sum, 0, 2 * size * sizeof(float));
    for (int64_t top = begin; top < end; top += BLOCK) {
      const Block block(g, std::min(BLOCK, end - top), memory);
      block.backward(rows + top, gradients + top, t + top * g.rank, dy + top * g.width, sum, sum + size,
                     top == begin);
    }
  });
  in_chunks(g.width, std::min(chunks, g.width / COLUMNS), threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const float *down_sum = sums + 2 * chunk * size, *up_sum = down_sum + size;
      for (int64_t k = 0; k < g.rank; k++)
        add(down_sum + k * g.width + begin, end - begin, !chunk, ddown + k * g.width + begin);
      for (int64_t c = begin; c < end; c++) add(up_sum + c * g.padded, g.rank, !chunk, dup + c * g.rank);
    }
  });
}
