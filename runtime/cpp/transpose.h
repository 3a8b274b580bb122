// A square of STEP lines of STEP entries, 16 bytes each, transposed in registers.

#pragma once

#include <cstdint>
#include <type_traits>

template <typename T>
struct Square {
  static constexpr int STEP = 16 / sizeof(T);
  typedef T Short __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));

  static inline void transpose(const T* from, int64_t stride, T* to, int64_t to_stride) {
    using Int = std::conditional_t<STEP == 4, int32_t, int64_t>;
    typedef Int Order __attribute__((vector_size(16)));
    Short x0 = *(const Short*)from, x1 = *(const Short*)(from + stride);
    if constexpr (STEP == 4) {
      constexpr Order low{0, 4, 1, 5}, high{2, 6, 3, 7}, first{0, 1, 4, 5}, second{2, 3, 6, 7};
      Short x2 = *(const Short*)(from + 2 * stride), x3 = *(const Short*)(from + 3 * stride);
      Short low01 = __builtin_shuffle(x0, x1, low), low23 = __builtin_shuffle(x2, x3, low);
      Short high01 = __builtin_shuffle(x0, x1, high), high23 = __builtin_shuffle(x2, x3, high);
      *(Short*)to = __builtin_shuffle(low01, low23, first);
      *(Short*)(to + to_stride) = __builtin_shuffle(low01, low23, second);
      *(Short*)(to + 2 * to_stride) = __builtin_shuffle(high01, high23, first);
      *(Short*)(to + 3 * to_stride) = __builtin_shuffle(high01, high23, second);
    } else {
      constexpr Order first{0, 2}, second{1, 3};
      *(Short*)to = __builtin_shuffle(x0, x1, first);
      *(Short*)(to + to_stride) = __builtin_shuffle(x0, x1, second);
    }
  }
};
