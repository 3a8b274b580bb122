// Products of batches of small and middling matrices, whole or symmetric, one addend included:
//
//     out = alpha * a * b + beta * base
//
// A symmetric product computes the tiles that touch the lower triangle and copies them to the upper
// one: half the FLOPs. What a library's GEMM does is done here for any part of the result: b is packed
// into panels that stay in the first cache, a tile of the result stays in registers, k is cut so that
// both fit. No entry's sum depends on the number of threads or on how a result is shared out.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "transpose.h"

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, ROWS = 12;
#else  // AVX2: twelve accumulators, two vectors of b and one entry of a fill its sixteen registers
constexpr int VECTOR_BYTES = 32, ROWS = 6;
#endif
constexpr int VECTORS = 2;
// Depth of a panel, columns of b and rows of a that are packed at a time.
constexpr int64_t DEPTH = 256, PANEL_COLUMNS = 512, PANEL_ROWS = 24 * ROWS;

template <typename T>
struct Matrix {
  T* data;
  int64_t batch, row, column;  // strides
  T* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
  Matrix operator[](int64_t index) const { return {data ? data + index * batch : data, batch, row, column}; }
};

struct Range {
  int64_t begin, end;
};

template <typename T>
struct Products {
  static constexpr int LANES = VECTOR_BYTES / sizeof(T), COLUMNS = LANES * VECTORS;
  typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  typedef Vector Tile[ROWS][VECTORS];

  struct Operands {
    int64_t rows, columns, depth;
    Matrix<const T> a, b, base;
    Matrix<T> out;  // columns next to each other, like those of base
    T alpha, beta;
    bool symmetric;

    Operands operator[](int64_t i) const {
      return {rows, columns, depth, a[i], b[i], base[i], out[i], alpha, beta, symmetric};
    }
  };

  // Packed panels of one thread, kept from call to call.
  struct Panels {
    std::unique_ptr<char[]> memory;
    T *a, *b;
    Panels() : memory(new char[(PANEL_ROWS + PANEL_COLUMNS + COLUMNS) * DEPTH * sizeof(T) + 64]) {
      a = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
      b = a + PANEL_ROWS * DEPTH;
    }
  };

  static constexpr int STEP = Square<T>::STEP;

  // Lines along k into [k][WIDTH].
  template <int WIDTH>
  static void pack_along(int64_t depth, int lines, const T* from, int64_t stride, T* to) {
    int64_t k = 0;
    if (lines == WIDTH && WIDTH % STEP == 0)
      for (; k + STEP <= depth; k += STEP)
        for (int line = 0; line < WIDTH; line += STEP)
          Square<T>::transpose(from + line * stride + k, stride, to + k * WIDTH + line, WIDTH);
    for (; k < depth; k++)
      for (int line = 0; line < WIDTH; line++)
        to[k * WIDTH + line] = line < lines ? from[line * stride + k] : T(0);
  }

  // Lines across k into [k][WIDTH]: copies.
  template <int WIDTH>
  static void pack_across(int64_t depth, int lines, const T* from, int64_t stride, T* to) {
    for (int64_t k = 0; k < depth; k++, from += stride, to += WIDTH)
      if (lines == WIDTH)
        for (int line = 0; line < WIDTH; line++) to[line] = from[line];
      else
        for (int line = 0; line < WIDTH; line++) to[line] = line < lines ? from[line] : T(0);
  }

  template <int WIDTH>
  static void pack(int64_t lines, int64_t depth, const T* from, int64_t line_stride, int64_t k_stride, T* to) {
    for (int64_t line = 0; line < lines; line += WIDTH, to += WIDTH * depth) {
      int width = int(std::min<int64_t>(WIDTH, lines - line));
      if (k_stride == 1)
        pack_along<WIDTH>(depth, width, from + line * line_stride, line_stride, to);
      else
        pack_across<WIDTH>(depth, width, from + line, k_stride, to);
    }
  }

  // One tile of a * b; a is packed as [k][ROWS], or lies in rows `stride` apart.
  template <bool PACKED>
  static inline __attribute__((always_inline)) void multiply(
      int64_t depth, const T* a, int64_t stride, const T* b, Tile& out) {
    Tile sum;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; j++) sum[i][j] = Vector{};
    for (int64_t k = 0; k < depth; k++, a += PACKED ? ROWS : 1, b += COLUMNS) {
      Vector line[VECTORS];
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; j++) line[j] = *(const Vector*)(b + j * LANES);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        T entry = PACKED ? a[i] : a[i * stride];
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; j++) sum[i][j] += entry * line[j];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; j++) out[i][j] = sum[i][j];
  }

  // out = alpha * tile + beta * addend; if `cut`, the first `first` + i columns of row i.
  static inline __attribute__((always_inline)) void store(
      const Tile& tile, int rows, int columns, bool cut, int64_t first, T alpha, const T* addend,
      int64_t addend_stride, T beta, T* out, int64_t stride) {
    if (rows == ROWS && columns == COLUMNS && !cut) {
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; j++) {
          Vector value = tile[i][j] * alpha;
          if (addend) value += beta * *(const Unaligned*)(addend + i * addend_stride + j * LANES);
          *(Unaligned*)(out + i * stride + j * LANES) = value;
        }
      return;
    }
    for (int i = 0; i < rows; i++) {
      int end = cut ? int(std::min<int64_t>(columns, first + i)) : columns;
      const T* sum = reinterpret_cast<const T*>(tile[i]);
      for (int j = 0; j < end; j++) {
        T value = sum[j] * alpha;
        if (addend) value += beta * addend[i * addend_stride + j];
        out[i * stride + j] = value;
      }
    }
  }

  // The rows and columns of one result that `rows` and `columns` say; of a symmetric one, their part of
  // the lower triangle, and its mirror image. Compiled once: copies for other callers may round otherwise.
  __attribute__((noinline, noclone)) static void part(const Operands& o, Range rows, Range columns) {
    static thread_local Panels panels;
    const bool along = o.a.column == 1;
    for (int64_t left = columns.begin; left < columns.end; left += PANEL_COLUMNS) {
      int64_t right = std::min(left + PANEL_COLUMNS, columns.end);
      for (int64_t k = 0, depth; k < o.depth; k += depth) {
        int64_t rest = o.depth - k;
        depth = rest <= DEPTH ? rest : rest < 2 * DEPTH ? (rest + 1) / 2 : DEPTH;
        pack<COLUMNS>(right - left, depth, o.b.at(k, left), o.b.column, o.b.row, panels.b);
        for (int64_t top = rows.begin; top < rows.end; top += PANEL_ROWS) {
          int64_t bottom = std::min(top + PANEL_ROWS, rows.end);
          if (o.symmetric && bottom <= left) continue;
          if (!along) pack<ROWS>(bottom - top, depth, o.a.at(top, k), o.a.row, o.a.column, panels.a);
          for (int64_t j = left; j < right; j += COLUMNS)
            for (int64_t i = top; i < bottom; i += ROWS) {
              if (o.symmetric && i + ROWS <= j) continue;
              int height = int(std::min<int64_t>(ROWS, bottom - i));
              int width = int(std::min<int64_t>(COLUMNS, right - j));
              const T* b = panels.b + (j - left) * depth;
              Tile tile;
              if (!along) {
                multiply<true>(depth, panels.a + (i - top) * depth, 0, b, tile);
              } else if (height == ROWS) {
                multiply<false>(depth, o.a.at(i, k), o.a.row, b, tile);
              } else {
                pack_along<ROWS>(depth, height, o.a.at(i, k), o.a.row, panels.a);
                multiply<true>(depth, panels.a, 0, b, tile);
              }
              // entries above the diagonal are written by who mirrors those below it, and nobody else
              const bool cut = o.symmetric && j + width > i + 1;
              T* out = o.out.at(i, j);
              const T* addend = k ? out : o.base.data ? o.base.at(i, j) : nullptr;
              store(tile, height, width, cut, i - j + 1, o.alpha, addend, k ? o.out.row : o.base.row,
                    k ? T(1) : o.beta, out, o.out.row);
            }
        }
      }
    }
    if (o.symmetric) mirror(o.out, rows, columns);
  }

  // The lower triangle's part in these rows and columns to the upper triangle.
  static void mirror(const Matrix<T>& out, Range rows, Range columns) {
    constexpr int64_t BLOCK = 16;
    for (int64_t left = columns.begin; left < columns.end; left += BLOCK)
      for (int64_t top = std::max(rows.begin, left / BLOCK * BLOCK); top < rows.end; top += BLOCK) {
        int64_t right = std::min(left + BLOCK, columns.end), bottom = std::min(top + BLOCK, rows.end);
        if (top >= right && right == left + BLOCK && bottom == top + BLOCK) {
          for (int64_t i = top; i < bottom; i += STEP)
            for (int64_t j = left; j < right; j += STEP)
              Square<T>::transpose(out.at(i, j), out.row, out.at(j, i), out.row);
          continue;
        }
        for (int64_t j = left; j < right; j++)
          for (int64_t i = std::max(top, j + 1); i < bottom; i++) *out.at(j, i) = *out.at(i, j);
      }
  }

  static void run(int64_t batch, const Operands& o, int threads) {
    if (threads <= 1 || batch % threads == 0 || batch >= 8 * threads) {
      // the same thread gets the same matrix in the next product, and finds it in its cache
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
      for (int64_t i = 0; i < batch; i++) part(o[i], {0, o.rows}, {0, o.columns});
      return;
    }
    int64_t width = (o.columns / (4 * threads) + COLUMNS - 1) / COLUMNS * COLUMNS;
    width = std::max<int64_t>(4 * COLUMNS, width);
    int64_t across = (o.columns + width - 1) / width, height = o.rows;
    if (across < 3 * threads) height = o.rows * across / (3 * threads) / ROWS * ROWS;
    height = std::max<int64_t>(16 * ROWS, height);
    int64_t down = (o.rows + height - 1) / height, each = across * down;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t index = 0; index < batch * each; index++) {
      int64_t left = index % each / down * width, top = (down - 1 - index % down) * height;
      Range columns{left, std::min(left + width, o.columns)};
      Range rows{o.symmetric ? std::max(top, left / ROWS * ROWS) : top, std::min(top + height, o.rows)};
      if (rows.begin < rows.end) part(o[index / each], rows, columns);
    }
  }
};

template <typename T>
void product(const int64_t* sizes, const T* a, const int64_t* a_strides, const T* b, const int64_t* b_strides,
             const T* base, const int64_t* base_strides, T* out, const int64_t* out_strides, double alpha, double beta,
             int symmetric, int threads) {
  auto matrix = [](auto* data, const int64_t* strides) {
    using Entry = std::remove_pointer_t<decltype(data)>;
    return data ? Matrix<Entry>{data, strides[0], strides[1], strides[2]} : Matrix<Entry>{};
  };
  Products<T>::run(sizes[0],
                   {sizes[1], sizes[2], sizes[3], matrix(a, a_strides), matrix(b, b_strides),
                    matrix(base, base_strides), matrix(out, out_strides), T(alpha), T(beta), symmetric != 0},
                   threads);
}

}  // namespace

// sizes: batch, rows, columns, depth. Strides: of the batch, of rows, of columns; one of the last two is 1,
// in base and out the last. base may be null.
#define NORMFUSE_PRODUCT(NAME, T)                                                                             \
  extern "C" void NAME(const int64_t* sizes, const T* a, const int64_t* a_strides, const T* b,                \
                       const int64_t* b_strides, const T* base, const int64_t* base_strides, T* out,          \
                       const int64_t* out_strides, double alpha, double beta, int symmetric, int threads) {   \
    product<T>(sizes, a, a_strides, b, b_strides, base, base_strides, out, out_strides, alpha, beta,          \
               symmetric, threads);                                                                           \
  }

NORMFUSE_PRODUCT(normfuse_product_float32, float)
NORMFUSE_PRODUCT(normfuse_product_float64, double)
