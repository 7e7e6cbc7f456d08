// y = x W^T and its gradients: the library's product, an own matrix-vector product for few rows, and in
// invariant mode an own product whose rows do not depend on each other.
#include <cblas.h>

#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/linear_invariant.h"
#include "kernels/cpu/isa/parallel.h"
#include "kernels/cpu/isa/simd.h"
#include "kernels/cpu/isa/tile_memory.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

/// Up to so many rows, a product of our own reads the weights at memory's speed; the library is far from it,
/// and stays behind the invariant product up to kSomeRows.
constexpr std::int64_t kFewRows = 12;
/// Rows and columns of y whose sums are held in registers.
#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 2, kOutsAtOnce = 8;
#else
constexpr int kRowsAtOnce = 2, kOutsAtOnce = 4;
#endif
/// One row waits for memory alone, which is fastest read straight on (docs/log.md); narrow vectors wait for
/// their sums as well.
#if defined(__AVX2__)
constexpr int kOutsOfOneRow = 1;
#else
constexpr int kOutsOfOneRow = 8;
#endif

enum class Transpose : std::uint8_t { No, Yes };

/// C [m, n] = op(A) op(B) + beta C, all row-major; a_row, b_row: elements of a row of A and B as they lie.
void library_gemm(Transpose ta, Transpose tb, std::int64_t m, std::int64_t n, std::int64_t k, const float* a,
                  std::int64_t a_row, const float* b, std::int64_t b_row, float beta, float* c) {
  cblas_sgemm(CblasRowMajor, ta == Transpose::Yes ? CblasTrans : CblasNoTrans,
              tb == Transpose::Yes ? CblasTrans : CblasNoTrans, static_cast<int>(m), static_cast<int>(n),
              static_cast<int>(k), 1.0F, a, static_cast<int>(a_row), b, static_cast<int>(b_row), beta, c,
              static_cast<int>(n));
}
void library_gemm(Transpose ta, Transpose tb, std::int64_t m, std::int64_t n, std::int64_t k, const double* a,
                  std::int64_t a_row, const double* b, std::int64_t b_row, double beta, double* c) {
  cblas_dgemm(CblasRowMajor, ta == Transpose::Yes ? CblasTrans : CblasNoTrans,
              tb == Transpose::Yes ? CblasTrans : CblasNoTrans, static_cast<int>(m), static_cast<int>(n),
              static_cast<int>(k), 1.0, a, static_cast<int>(a_row), b, static_cast<int>(b_row), beta, c,
              static_cast<int>(n));
}

/// A weight of bf16, which is read as it lies and computed with in fp32.
struct Bf16 {
  std::uint16_t bits;
};
inline float value_of(Bf16 w) {
  const std::uint32_t word = static_cast<std::uint32_t>(w.bits) << 16;
  float value;
  __builtin_memcpy(&value, &word, sizeof(value));
  return value;
}

/// y [rows, outs] of `rows` rows of x and `outs` of w: each weight that is loaded serves all rows, and a
/// row's sums do not depend on how many there are.
template <typename T, int rows, int outs>
void dot_products(T* y, std::int64_t ld_y, const T* x, std::int64_t x_row, const T* w, std::int64_t in) {
  constexpr int W = kLanes<T>;
  Vec<T> sum[rows][outs] = {};
  std::int64_t k = 0;
  for (; k + W <= in; k += W) {
    Vec<T> xs[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) xs[r] = load<T>(x + r * x_row + k);
#pragma GCC unroll 8
    for (int o = 0; o < outs; ++o) {
      const Vec<T> weights = load<T>(w + o * in + k);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) sum[r][o] += weights * xs[r];
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int o = 0; o < outs; ++o) {
      T total = sum_of_lanes<T>(sum[r][o]);
      for (std::int64_t i = k; i < in; ++i) total += w[o * in + i] * x[r * x_row + i];
      y[r * ld_y + o] = total;
    }
  }
}

/// Columns that are read together of weights of bf16: rows x have those at even places first in each such
/// run, and then those at odd ones.
constexpr int kPairRun = 2 * kLanes<float>;

void stage_pairs(float* staged, const float* x, std::int64_t x_row, std::int64_t rows, std::int64_t in) {
  for (std::int64_t r = 0; r < rows; ++r, x += x_row, staged += in) {
    std::int64_t k = 0;
    for (; k + kPairRun <= in; k += kPairRun) {
      for (int l = 0; l < kLanes<float>; ++l) {
        staged[k + l] = x[k + 2 * l];
        staged[k + kLanes<float> + l] = x[k + 2 * l + 1];
      }
    }
    for (; k < in; ++k) staged[k] = x[k];
  }
}

/// dot_products of staged rows, which are `in` apart.
template <typename T, int rows, int outs>
void dot_products(float* y, std::int64_t ld_y, const float* x, std::int64_t, const Bf16* w, std::int64_t in) {
  Vec<float> sum[rows][outs] = {};
  std::int64_t k = 0;
  for (; k + kPairRun <= in; k += kPairRun) {
    Vec<float> even[rows], odd[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      even[r] = load<float>(x + r * in + k);
      odd[r] = load<float>(x + r * in + k + kLanes<float>);
    }
#pragma GCC unroll 8
    for (int o = 0; o < outs; ++o) {
      const Bf16Pairs weights = load_bf16_pairs(&w[o * in + k].bits);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        sum[r][o] += weights.even * even[r];
        sum[r][o] += weights.odd * odd[r];
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int o = 0; o < outs; ++o) {
      float total = sum_of_lanes<float>(sum[r][o]);
      for (std::int64_t i = k; i < in; ++i) total += value_of(w[o * in + i]) * x[r * in + i];
      y[r * ld_y + o] = total;
    }
  }
}

/// `outs` columns of y for all rows, `kRowsAtOnce` at a time: then the weights lie in the first-level cache.
template <typename T, typename Weight, int outs>
void few_rows_of(T* y, const T* x, const Weight* w, const LinearShape& s) {
  std::int64_t r = 0;
  for (; r + kRowsAtOnce <= s.rows; r += kRowsAtOnce) {
    dot_products<T, kRowsAtOnce, outs>(y + r * s.out, s.out, x + r * s.x_row(), s.x_row(), w, s.in);
  }
  for (; r < s.rows; ++r)
    dot_products<T, 1, outs>(y + r * s.out, s.out, x + r * s.x_row(), s.x_row(), w, s.in);
}

/// Few rows: every weight is read once from memory, for all rows.
template <typename T, typename Weight>
void few_rows(T* y, const T* x, const Weight* w, const LinearShape& s) {
  const std::int64_t outs = s.rows < kRowsAtOnce ? kOutsOfOneRow : kOutsAtOnce;
  // A piece is worth a thread from some 64 Ki multiply-adds.
  const std::int64_t grain = (65536 / (s.in * s.rows) + outs) / outs * outs;
  parallel_for(s.out, grain, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t o = begin;
    for (; o + outs <= end; o += outs) {
      if (s.rows < kRowsAtOnce) {
        few_rows_of<T, Weight, kOutsOfOneRow>(y + o, x, w + o * s.in, s);
      } else {
        few_rows_of<T, Weight, kOutsAtOnce>(y + o, x, w + o * s.in, s);
      }
    }
    for (; o < end; ++o) few_rows_of<T, Weight, 1>(y + o, x, w + o * s.in, s);
  });
}

void check_shape(const char* op, const LinearShape& s) {
  if (s.in < 1) fail(op, "in", s.in, 1);
  if (s.batch < 1) fail(op, "batch", s.batch, 1);
}

/// y = x W^T of one product.
template <typename T>
void product(T* y, const T* x, const T* w, const LinearShape& s, bool invariant) {
  if (s.rows * s.out == 0) return;
  if (!invariant && s.rows <= kFewRows) {
    few_rows<T, T>(y, x, w, s);
  } else if (invariant || s.rows <= kSomeRows) {
    linear_invariant<T>(y, x, w, s);
  } else {
    library_gemm(Transpose::No, Transpose::Yes, s.rows, s.out, s.in, x, s.x_row(), w, s.in, T(0), y);
  }
}

/// The same with weights of bf16. Many rows would wait for the conversion more than once: the weights become
/// fp32 first, for this product.
void product_of_bf16(float* y, const float* x, const Bf16* w, const LinearShape& s, bool invariant) {
  if (s.rows * s.out == 0) return;
  if (!invariant && s.rows <= kFewRows) {
    const TileMemory memory(s.rows * s.in * static_cast<std::int64_t>(sizeof(float)));
    auto* const staged = static_cast<float*>(memory.data());
    stage_pairs(staged, x, s.x_row(), s.rows, s.in);
    LinearShape packed = s;
    packed.x_stride = 0;
    few_rows<float, Bf16>(y, staged, w, packed);
    return;
  }
  const TileMemory memory(s.out * s.in * static_cast<std::int64_t>(sizeof(float)));
  auto* const weights = static_cast<float*>(memory.data());
  parallel_for(s.out, 65536 / s.in + 1, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin * s.in; i < end * s.in; ++i) weights[i] = value_of(w[i]);
  });
  product<float>(y, x, weights, s, invariant);
}

/// dw = dy^T x + kept * dw. Without rows the library would leave dw as it is.
template <typename T>
void weight_gradient(const char* op, View dw, ConstView dy, ConstView x, const LinearShape& s, T kept) {
  T* out = output<T>(op, "dw", dw, s.batch * s.in * s.out);
  const T* gradient = input<T>(op, "dy", dy, s.batch * s.rows * s.out);
  const T* in = input<T>(op, "x", x, s.x_size());
  if (s.rows > 0 && dw.size > 0) {
    for (std::int64_t e = 0; e < s.batch; ++e) {
      library_gemm(Transpose::Yes, Transpose::No, s.out, s.in, s.rows, gradient + e * s.rows * s.out, s.out,
                   in + e * s.rows * s.x_row(), s.x_row(), kept, out + e * s.out * s.in);
    }
  } else if (kept == T(0)) {
    for (std::int64_t i = 0; i < dw.size; ++i) out[i] = T(0);
  }
}

}  // namespace

void CpuBackend::linear_forward(View y, ConstView x, ConstView w, const LinearShape& s) {
  const char* op = "linear_forward";
  check_shape(op, s);
  if (w.dtype == DType::BF16) {
    auto* out = output<float>(op, "y", y, s.batch * s.rows * s.out);
    const auto* in = input<float>(op, "x", x, s.x_size());
    check_size(op, "w", w.size, s.batch * s.in * s.out);
    const auto* weights = static_cast<const Bf16*>(w.data);
    flop_log.gemm(s.batch * s.rows, s.out, s.in);
    for (std::int64_t e = 0; e < s.batch; ++e) {
      product_of_bf16(out + e * s.rows * s.out, in + e * s.rows * s.x_row(), weights + e * s.out * s.in, s,
                      options_.invariant);
    }
    return;
  }
  for_compute_type(op, w.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = output<T>(op, "y", y, s.batch * s.rows * s.out);
    const T* in = input<T>(op, "x", x, s.x_size());
    const T* weights = input<T>(op, "w", w, s.batch * s.in * s.out);
    flop_log.gemm(s.batch * s.rows, s.out, s.in);
    for (std::int64_t e = 0; e < s.batch; ++e) {
      product<T>(out + e * s.rows * s.out, in + e * s.rows * s.x_row(), weights + e * s.out * s.in, s,
                 options_.invariant);
    }
  });
}

void CpuBackend::linear_backward_input(View dx, ConstView dy, ConstView w, const LinearShape& s) {
  const char* op = "linear_backward_input";
  check_shape(op, s);
  for_compute_type(op, w.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = output<T>(op, "dx", dx, s.batch * s.rows * s.in);
    const T* in = input<T>(op, "dy", dy, s.batch * s.rows * s.out);
    const T* weights = input<T>(op, "w", w, s.batch * s.in * s.out);
    flop_log.gemm(s.batch * s.rows, s.in, s.out);
    if (dx.size == 0) return;
    for (std::int64_t e = 0; e < s.batch; ++e) {
      library_gemm(Transpose::No, Transpose::No, s.rows, s.in, s.out, in + e * s.rows * s.out, s.out,
                   weights + e * s.out * s.in, s.in, T(0), out + e * s.rows * s.in);
    }
  });
}

void CpuBackend::linear_backward_weight(View dw, ConstView dy, ConstView x, const LinearShape& s) {
  const char* op = "linear_backward_weight";
  check_shape(op, s);
  flop_log.gemm(s.batch * s.out, s.in, s.rows);
  for_compute_type(op, dw.dtype,
                   [&](auto zero) { weight_gradient<decltype(zero)>(op, dw, dy, x, s, decltype(zero)(0)); });
}

void CpuBackend::linear_backward_weight_accumulate(View dw, ConstView dy, ConstView x, const LinearShape& s) {
  const char* op = "linear_backward_weight_accumulate";
  check_shape(op, s);
  flop_log.gemm(s.batch * s.out, s.in, s.rows);
  for_compute_type(op, dw.dtype,
                   [&](auto zero) { weight_gradient<decltype(zero)>(op, dw, dy, x, s, decltype(zero)(1)); });
}

}  // namespace fathom::cpu::FATHOM_ISA
