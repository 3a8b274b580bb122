// A low-rank gate on rows of width d, and its gradients:
//
//     out = y * scale * sigmoid(silu(y * down') * up')
//
// Between the two thin products and the elementwise parts, one row's values stay in registers and the
// first caches: what a library's products and loops of their own write to memory and read again. Rows are
// shared out in chunks that depend on their number only, and sums over rows are taken chunk by chunk, so
// results do not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

namespace {

constexpr int LANES = 8, VECTORS = 2, COLUMNS = LANES * VECTORS;
// Rows of a tile: with twice as many accumulators, two vectors and one entry, sixteen registers.
constexpr int ROWS = 6;
// Rows whose outer products are summed at a time.
constexpr int BLOCK = 4 * ROWS;
constexpr int64_t CHUNK = 48, MOST_CHUNKS = 64;

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
  ALWAYS_INLINE void read(const float* from, int64_t row) {
#pragma GCC unroll 6
    for (int i = 0; i < N; i++)
      for (int j = 0; j < VECTORS; j++) at[i][j] = load(from + i * row + j * LANES);
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
    if (entries > size) memory.reset(new float[size = entries]);
    return memory.get();
  }
};

struct Gate {
  int64_t rows, width, rank, padded;  // rank, and rank to a whole number of tiles
  float scale;
  // as [width][padded] and [padded][width], with zeros behind the rank
  const float *down_across, *down_along, *up_across, *up_along;
};

int64_t padded_rank(int64_t rank) { return (rank + COLUMNS - 1) / COLUMNS * COLUMNS; }

void transpose(const float* from, int64_t lines, int64_t length, float* to, int64_t to_row) {
  constexpr int64_t SIDE = 16;
  for (int64_t left = 0; left < length; left += SIDE)
    for (int64_t i = 0; i < lines; i++)
      for (int64_t k = left; k < std::min(left + SIDE, length); k++) to[k * to_row + i] = from[i * length + k];
}

// down is [rank][width], up [width][rank]; the memory of what is made lasts until the thread's next call.
Gate prepare(int64_t rows, int64_t width, int64_t rank, const float* down, const float* up, float scale) {
  static thread_local Scratch scratch;
  const int64_t padded = padded_rank(rank), size = padded * width;
  float* memory = scratch.need(4 * size);
  if (padded != rank) std::memset(memory, 0, 4 * size * sizeof(float));
  float *down_across = memory, *up_along = memory + size, *down_along = up_along + size, *up_across = down_along + size;
  transpose(down, rank, width, down_across, padded);
  transpose(up, width, rank, up_along, width);
  std::memcpy(down_along, down, rank * width * sizeof(float));
  for (int64_t i = 0; i < width; i++) std::memcpy(up_across + i * padded, up + i * rank, rank * sizeof(float));
  return {rows, width, rank, padded, scale, down_across, down_along, up_across, up_along};
}

int64_t chunks_of(int64_t rows) {
  int64_t chunks = 1;
  while (chunks < MOST_CHUNKS && 2 * chunks * CHUNK <= rows) chunks *= 2;
  return chunks;
}

// `step(N, row)` for tiles of N rows, constants all.
template <typename Step>
ALWAYS_INLINE void in_tiles(int64_t begin, int64_t end, const Step& step) {
  int64_t row = begin;
  for (; row + ROWS <= end; row += ROWS) step(std::integral_constant<int, ROWS>(), row);
  switch (end - row) {
    case 5: return step(std::integral_constant<int, 5>(), row);
    case 4: return step(std::integral_constant<int, 4>(), row);
    case 3: return step(std::integral_constant<int, 3>(), row);
    case 2: return step(std::integral_constant<int, 2>(), row);
    case 1: return step(std::integral_constant<int, 1>(), row);
  }
}

// lines * across, [N][padded]. One sum over the whole width would round as often.
template <int N>
ALWAYS_INLINE void narrow(const Gate& g, const float* lines, int64_t stride, const float* across, float* to) {
  constexpr int64_t PART = 128;
  for (int64_t c = 0; c < g.padded; c += COLUMNS)
    for (int64_t k = 0; k < g.width; k += PART) {
      Tile<N> sum;
      sum.zero();
      sum.add(std::min(PART, g.width - k), lines + k, stride, 1, across + k * g.padded + c, g.padded);
      if (k) sum.plus(to + c, g.padded);
      sum.write(to + c, g.padded);
    }
}

template <int N>
void forward_rows(const Gate& g, const float* y, int64_t stride, float* out, float* t_out, float* inner) {
  narrow<N>(g, y, stride, g.down_across, inner);
  for (int i = 0; i < N; i++) std::memcpy(t_out + i * g.rank, inner + i * g.padded, g.rank * sizeof(float));
  for (int64_t k = 0; k < N * g.padded; k += LANES) {
    Vector t = load(inner + k);
    store(inner + k, t * sigmoid(t));
  }
  for (int64_t c = 0; c < g.width; c += COLUMNS) {
    Tile<N> logits;
    logits.zero();
    logits.add(g.rank, inner, g.padded, 1, g.up_along + c, g.width);
    for (int i = 0; i < N; i++)
      for (int j = 0; j < VECTORS; j++) {
        const int64_t at = c + j * LANES;
        store(out + i * g.width + at, load(y + i * stride + at) * (sigmoid(logits.at[i][j]) * g.scale));
      }
  }
}

// The logits' gradient into `dz`, silu(t) and t's gradient into `inner` and `dt`; y's gradient.
template <int N>
void backward_rows(const Gate& g, const float* y, int64_t y_stride, const float* dout, int64_t dout_stride,
                   const float* t, float* dy, float* dz, float* inner, float* dt, float* dinner) {
  std::memset(dt, 0, N * g.padded * sizeof(float));
  for (int i = 0; i < N; i++) std::memcpy(dt + i * g.padded, t + i * g.rank, g.rank * sizeof(float));
  for (int64_t k = 0; k < N * g.padded; k += LANES) {
    Vector value = load(dt + k);
    store(inner + k, value * sigmoid(value));
  }
  for (int64_t c = 0; c < g.width; c += COLUMNS) {
    Tile<N> logits;
    logits.zero();
    logits.add(g.rank, inner, g.padded, 1, g.up_along + c, g.width);
    for (int i = 0; i < N; i++)
      for (int j = 0; j < VECTORS; j++) {
        const int64_t at = c + j * LANES;
        Vector gate = sigmoid(logits.at[i][j]);
        Vector around = load(dout + i * dout_stride + at) * (gate * g.scale);
        store(dy + i * g.width + at, around);
        store(dz + i * g.width + at, around * load(y + i * y_stride + at) * (1.f - gate));
      }
  }
  narrow<N>(g, dz, g.width, g.up_across, dinner);
  for (int64_t k = 0; k < N * g.padded; k += LANES) {
    Vector value = load(dt + k), gate = sigmoid(value);
    store(dt + k, load(dinner + k) * (gate * (1.f + value * (1.f - gate))));
  }
  for (int64_t c = 0; c < g.width; c += COLUMNS) {
    Tile<N> sum;
    sum.zero();
    sum.add(g.rank, dt, g.padded, 1, g.down_along + c, g.width);
    sum.plus(dy + c, g.width);
    sum.write(dy + c, g.width);
  }
}

// Adds left' * right to [width][padded]: `rows` outer products.
ALWAYS_INLINE void outer(const Gate& g, int64_t rows, const float* left, int64_t stride, const float* right,
                         bool fresh, float* to) {
  in_tiles(0, g.width, [&](auto count, int64_t column) {
    for (int64_t c = 0; c < g.padded; c += COLUMNS) {
      Tile<decltype(count)::value> sum;
      if (fresh)
        sum.zero();
      else
        sum.read(to + column * g.padded + c, g.padded);
      sum.add(rows, left + column, 1, stride, right + c, g.padded);
      sum.write(to + column * g.padded + c, g.padded);
    }
  });
}

}  // namespace

// sizes: rows, width (a multiple of 16), rank. Rows of y and dout are `stride` apart, all else is contiguous.
extern "C" void normfuse_gate(const int64_t* sizes, const float* y, int64_t y_stride, const float* down,
                              const float* up, double scale, float* out, float* t, int threads) {
  const Gate g = prepare(sizes[0], sizes[1], sizes[2], down, up, float(scale));
  const int64_t chunks = chunks_of(g.rows), height = (g.rows + chunks - 1) / chunks;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && chunks > 1)
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    static thread_local Scratch scratch;
    float* inner = scratch.need(ROWS * g.padded);
    in_tiles(chunk * height, std::min((chunk + 1) * height, g.rows), [&](auto count, int64_t row) {
      forward_rows<decltype(count)::value>(g, y + row * y_stride, y_stride, out + row * g.width, t + row * g.rank,
                                           inner);
    });
  }
}

extern "C" void normfuse_gate_backward(const int64_t* sizes, const float* y, int64_t y_stride, const float* dout,
                                       int64_t dout_stride, const float* down, const float* up, const float* t,
                                       double scale, float* dy, float* ddown, float* dup, int threads) {
  static thread_local Scratch partial;
  const Gate g = prepare(sizes[0], sizes[1], sizes[2], down, up, float(scale));
  const int64_t chunks = chunks_of(g.rows), height = (g.rows + chunks - 1) / chunks, size = g.width * g.padded;
  float* sums = partial.need(2 * chunks * size);
#pragma omp parallel num_threads(threads) if (threads > 1 && chunks > 1)
  {
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      static thread_local Scratch scratch;
      float* dz = scratch.need(BLOCK * (g.width + 2 * g.padded) + ROWS * g.padded);
      float *inner = dz + BLOCK * g.width, *dt = inner + BLOCK * g.padded, *dinner = dt + BLOCK * g.padded;
      float *ddown_sum = sums + 2 * chunk * size, *dup_sum = ddown_sum + size;
      const int64_t begin = chunk * height, end = std::min(begin + height, g.rows);
      if (begin >= end) std::memset(ddown_sum, 0, 2 * size * sizeof(float));
      for (int64_t top = begin; top < end; top += BLOCK) {
        const int64_t bottom = std::min(top + BLOCK, end);
        in_tiles(top, bottom, [&](auto count, int64_t row) {
          const int64_t in = row - top;
          backward_rows<decltype(count)::value>(g, y + row * y_stride, y_stride, dout + row * dout_stride, dout_stride,
                                                t + row * g.rank, dy + row * g.width, dz + in * g.width,
                                                inner + in * g.padded, dt + in * g.padded, dinner);
        });
        outer(g, bottom - top, dz, g.width, inner, top == begin, dup_sum);
        outer(g, bottom - top, y + top * y_stride, y_stride, dt, top == begin, ddown_sum);
      }
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < g.width; c++)
      for (int64_t k = 0; k < g.rank; k++) {
        float down_total = 0, up_total = 0;
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
          const float* of = sums + 2 * chunk * size + c * g.padded + k;
          down_total += of[0];
          up_total += of[size];
        }
        ddown[k * g.width + c] = down_total;
        dup[c * g.rank + k] = up_total;
      }
  }
}
