// Transposes between rows in memory and tiles whose lanes are the rows.
#pragma once

#include <cstdint>
#include <utility>

#include "kernels/cpu/isa/simd.h"

namespace fathom::cpu::FATHOM_ISA {

template <typename T, int... i>
[[gnu::always_inline]] inline void interleave(Vec<T> a, Vec<T> b, Vec<T>& low, Vec<T>& high,
                                              std::integer_sequence<int, i...>) {
  constexpr int W = kLanes<T>;
  low = __builtin_shufflevector(a, b, (i / 2 + (i % 2) * W)...);
  high = __builtin_shufflevector(a, b, (W / 2 + i / 2 + (i % 2) * W)...);
}

/// Transposes the square of vectors in place: log2(lanes) perfect shuffles.
template <typename T>
[[gnu::always_inline]] inline void transpose_square(Vec<T> (&v)[kLanes<T>]) {
  constexpr int W = kLanes<T>;
#pragma GCC unroll 4
  for (int stage = 1; stage < W; stage *= 2) {
    Vec<T> next[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      interleave<T>(v[i], v[i + W / 2], next[2 * i], next[2 * i + 1], std::make_integer_sequence<int, W>{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = next[i];
  }
}

/// out[column][row] = in[row][column] * factor for `rows` x `columns` elements. Rows of `out` are padded with
/// zeros to whole vectors.
template <typename T>
void transpose_in(T* out, std::int64_t ld_out, const T* in, std::int64_t ld_in, std::int64_t rows,
                  std::int64_t columns, T factor) {
  constexpr int W = kLanes<T>;
  for (std::int64_t r = 0; r < rows; r += W) {
    const std::int64_t here = rows - r < W ? rows - r : W;
    std::int64_t c = 0;
    for (; c + W <= columns; c += W) {
      Vec<T> v[W];
      if (here == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) v[i] = load<T>(in + (r + i) * ld_in + c);
      } else {
        for (int i = 0; i < W; ++i) v[i] = i < here ? load<T>(in + (r + i) * ld_in + c) : Vec<T>{};
      }
      transpose_square<T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store<T>(out + (c + i) * ld_out + r, v[i] * factor);
    }
    for (; c < columns; ++c) {
      for (int i = 0; i < W; ++i)
        out[c * ld_out + r + i] = i < here ? in[(r + i) * ld_in + c] * factor : T(0);
    }
  }
}

/// out[row][column] = in[column][row] * factor[row] for `rows` x `columns` elements of out; rows of `in` and
/// `factor` are padded to whole vectors.
template <typename T>
void transpose_out(T* out, std::int64_t ld_out, const T* in, std::int64_t ld_in, std::int64_t rows,
                   std::int64_t columns, const T* factor) {
  constexpr int W = kLanes<T>;
  for (std::int64_t r = 0; r < rows; r += W) {
    const std::int64_t here = rows - r < W ? rows - r : W;
    const Vec<T> scale = load<T>(factor + r);
    std::int64_t c = 0;
    for (; c + W <= columns; c += W) {
      Vec<T> v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = load<T>(in + (c + i) * ld_in + r) * scale;
      transpose_square<T>(v);
      if (here == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store<T>(out + (r + i) * ld_out + c, v[i]);
      } else {
        for (int i = 0; i < here; ++i) store<T>(out + (r + i) * ld_out + c, v[i]);
      }
    }
    for (; c < columns; ++c) {
      for (int i = 0; i < here; ++i) out[(r + i) * ld_out + c] = in[c * ld_in + r + i] * factor[r + i];
    }
  }
}

}  // namespace fathom::cpu::FATHOM_ISA
