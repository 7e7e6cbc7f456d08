// Hadamard transforms of rows: Sylvester's part as butterflies, of neighbours within vectors and of others
// between them, and then the K x K part, sum by sum.
#include <utility>

#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/parallel.h"
#include "kernels/cpu/isa/simd.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

constexpr std::int64_t kMostFactor = 512;

template <typename T, int half, int... lane>
[[gnu::always_inline]] inline Vec<T> butterfly(Vec<T> v, std::integer_sequence<int, lane...>) {
  return Vec<T>{v[lane ^ half]...} + Vec<T>{((lane & half) != 0 ? T(-1) : T(1))...} * v;
}

/// x[i] and x[i + half] become their sum and their difference, half less than a vector's lanes: of vectors.
template <typename T, int half>
void neighbours(T* x, std::int64_t n) {
  constexpr int W = kLanes<T>;
  for (std::int64_t i = 0; i < n; i += W)
    store<T>(x + i, butterfly<T, half>(load<T>(x + i), std::make_integer_sequence<int, W>{}));
}

/// The same for any half that there is a vector for; false: nothing was done.
template <typename T, int half = 1>
bool try_neighbours(T* x, std::int64_t n, std::int64_t wanted) {
  if constexpr (half < kLanes<T>) {
    if (wanted != half) return try_neighbours<T, 2 * half>(x, n, wanted);
    neighbours<T, half>(x, n);
    return true;
  }
  return false;
}

template <typename T>
void butterflies(T* __restrict x, std::int64_t n, std::int64_t half) {
  for (std::int64_t i = 0; i < n; i += 2 * half) {
    T* __restrict low = x + i;
    T* __restrict high = x + i + half;
#pragma omp simd
    for (std::int64_t j = 0; j < half; ++j) {
      const T a = low[j], b = high[j];
      low[j] = a + b;
      high[j] = a - b;
    }
  }
}

/// The K x K part and the scale, on a block in place: `apart` elements from a vector's part to its next.
template <typename T>
void by_matrix(T* x, const float* matrix, std::int64_t factor, std::int64_t apart, T scale) {
  constexpr int W = kLanes<T>;
  T column[kMostFactor * W];
  for (std::int64_t j = 0; j < apart; j += W) {
    const std::int64_t lanes = apart - j < W ? apart - j : W;
    for (std::int64_t k = 0; k < factor; ++k) {
      const T* from = x + k * apart + j;
      if (lanes == W) {
        store<T>(column + k * W, load<T>(from) * scale);
        continue;
      }
      for (std::int64_t l = 0; l < W; ++l) column[k * W + l] = l < lanes ? from[l] * scale : T(0);
    }
    for (std::int64_t i = 0; i < factor; ++i) {
      Vec<T> sum = {};
      for (std::int64_t k = 0; k < factor; ++k)
        sum += broadcast<T>(static_cast<T>(matrix[i * factor + k])) * load<T>(column + k * W);
      T* to = x + i * apart + j;
      if (lanes == W) {
        store<T>(to, sum);
        continue;
      }
      for (std::int64_t l = 0; l < lanes; ++l) to[l] = sum[l];
    }
  }
}

template <typename T>
void transform_row(T* x, const float* matrix, const HadamardShape& s) {
  const std::int64_t n = s.width(), apart = s.power * s.inner;
  for (std::int64_t half = s.inner; half < apart; half *= 2) {
    if (n % kLanes<T> != 0 || !try_neighbours<T>(x, n, half)) butterflies<T>(x, n, half);
  }
  const T scale = T(1) / static_cast<T>(__builtin_sqrt(static_cast<double>(s.factor * s.power)));
  if (s.factor == 1) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) x[i] *= scale;
    return;
  }
  for (std::int64_t b = 0; b < s.blocks; ++b) by_matrix<T>(x + b * s.block(), matrix, s.factor, apart, scale);
}

}  // namespace

void CpuBackend::hadamard_forward(View y, ConstView x, ConstView matrix, const HadamardShape& s) {
  const char* op = "hadamard_forward";
  if (s.power < 1 || (s.power & (s.power - 1)) != 0) fail(op, "power", s.power, 1);
  if (s.factor < 1 || s.factor > kMostFactor) fail(op, "factor", s.factor, kMostFactor);
  if (s.blocks < 1 || s.inner < 1) fail(op, "blocks", s.blocks, 1);
  if (s.x_row() < s.width() || s.y_row() < s.width()) fail(op, "stride", s.x_row(), s.width());
  const float* m = s.factor > 1 ? input<float>(op, "matrix", matrix, s.factor * s.factor) : nullptr;
  for_compute_type(op, x.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = output<T>(op, "y", y, s.y_size());
    const T* in = input<T>(op, "x", x, s.x_size());
    if (out == in && s.x_row() != s.y_row()) fail(op, "stride of y", s.y_row(), s.x_row());
    parallel_for(s.rows, 16384 / s.width() + 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        T* row = out + r * s.y_row();
        if (out != in)
          __builtin_memcpy(row, in + r * s.x_row(), static_cast<std::size_t>(s.width()) * sizeof(T));
        transform_row<T>(row, m, s);
      }
    });
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
