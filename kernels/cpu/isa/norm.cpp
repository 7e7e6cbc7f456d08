// RMSNorm (Zhang & Sennrich 2019), alone and after a residual addition.
//
// y = x s w with s = 1/sqrt(mean(x^2) + eps). With c = mean(w dy x): dx = s (w dy) - x s^3 c, dw = sum dy x
// s. Where y was kept and x was not, x s = y / w, and s c = mean(dy y).
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/partials.h"
#include "kernels/cpu/isa/vector_math.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

/// What a weight counts as.
template <typename T>
T held(T w) {
  constexpr T kLeast = T(kLeastNormWeight);
  return w < kLeast && w > -kLeast ? (w < T(0) ? -kLeast : kLeast) : w;
}

/// h = x + a when `a` is given; y = norm of h.
template <typename T>
void forward(T* h, T* y, T* rstd, const T* x, const T* a, const T* w, const NormShape& s) {
  const std::int64_t width = s.width;
  const T eps = static_cast<T>(s.eps);
  parallel_for(s.rows, row_grain(width), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const T* row = x + i * width;
      T squares = 0;
      if (a != nullptr) {
        T* sum = h + i * width;
        const T* other = a + i * width;
#pragma omp simd reduction(+ : squares)
        for (std::int64_t j = 0; j < width; ++j) {
          const T value = row[j] + other[j];
          sum[j] = value;
          squares += value * value;
        }
        row = sum;
      } else {
#pragma omp simd reduction(+ : squares)
        for (std::int64_t j = 0; j < width; ++j) squares += row[j] * row[j];
      }
      const T reciprocal = T(1) / vsqrt(squares / static_cast<T>(width) + eps);
      rstd[i] = reciprocal;
      T* to = y + i * width;
#pragma omp simd
      for (std::int64_t j = 0; j < width; ++j) to[j] = row[j] * reciprocal * held(w[j]);
    }
  });
}

template <typename T>
void backward(T* dx, T* dw, const T* dh, const T* dy, const T* x, const T* w, const T* rstd,
              const NormShape& s) {
  const std::int64_t width = s.width;
  RowSums<T> dw_sums(s.rows, width);
  parallel_for(s.rows, dw_sums.grain(), [=, &dw_sums](std::int64_t begin, std::int64_t end) {
    T* dw_piece = dw_sums.start(begin);
    const T* weights = w;  // gcc 12 does not vectorise a reduction that reads a captured pointer
    for (std::int64_t i = begin; i < end; ++i) {
      const T* row = x + i * width;
      const T* dout = dy + i * width;
      const T reciprocal = rstd[i];
      T product = 0;
#pragma omp simd reduction(+ : product)
      for (std::int64_t j = 0; j < width; ++j) {
        const T t = dout[j] * row[j];
        product += t * weights[j];
        dw_piece[j] += t * reciprocal;
      }
      const T pull = reciprocal * reciprocal * reciprocal * (product / static_cast<T>(width));
      T* to = dx + i * width;
      if (dh != nullptr) {
        const T* through = dh + i * width;
#pragma omp simd
        for (std::int64_t j = 0; j < width; ++j) {
          to[j] = through[j] + (reciprocal * w[j] * dout[j] - pull * row[j]);
        }
      } else {
#pragma omp simd
        for (std::int64_t j = 0; j < width; ++j) to[j] = reciprocal * w[j] * dout[j] - pull * row[j];
      }
    }
  });
  dw_sums.add_to(dw, width);
}

template <typename T>
void backward_from_output(T* dx, T* dw, const T* dh, const T* dy, const T* y, const T* w, const T* rstd,
                          const NormShape& s) {
  const std::int64_t width = s.width;
  RowSums<T> dw_sums(s.rows, width);
  parallel_for(s.rows, dw_sums.grain(), [=, &dw_sums](std::int64_t begin, std::int64_t end) {
    T* dw_piece = dw_sums.start(begin);
    const T* weights = w;  // gcc 12 does not vectorise a reduction that reads a captured pointer
    for (std::int64_t i = begin; i < end; ++i) {
      const T* out = y + i * width;
      const T* dout = dy + i * width;
      T product = 0;
#pragma omp simd reduction(+ : product)
      for (std::int64_t j = 0; j < width; ++j) {
        product += dout[j] * out[j];
        dw_piece[j] += dout[j] * (out[j] / held(weights[j]));
      }
      const T reciprocal = rstd[i], pull = product / static_cast<T>(width);
      T* to = dx + i * width;
      if (dh != nullptr) {
        const T* through = dh + i * width;
#pragma omp simd
        for (std::int64_t j = 0; j < width; ++j) {
          const T weight = held(w[j]);
          to[j] = through[j] + reciprocal * (weight * dout[j] - pull * (out[j] / weight));
        }
      } else {
#pragma omp simd
        for (std::int64_t j = 0; j < width; ++j) {
          const T weight = held(w[j]);
          to[j] = reciprocal * (weight * dout[j] - pull * (out[j] / weight));
        }
      }
    }
  });
  dw_sums.add_to(dw, width);
}

}  // namespace

void CpuBackend::rms_norm_forward(View y, View rstd, ConstView x, ConstView w, const NormShape& s) {
  const char* op = "rms_norm_forward";
  const std::int64_t n = s.rows * s.width;
  for_compute_type(op, y.dtype, [&](auto zero) {
    using T = decltype(zero);
    forward<T>(nullptr, output<T>(op, "y", y, n), output<T>(op, "rstd", rstd, s.rows),
               input<T>(op, "x", x, n), nullptr, input<T>(op, "w", w, s.width), s);
  });
}

void CpuBackend::rms_norm_backward(View dx, View dw_accumulate, ConstView dy, ConstView x, ConstView w,
                                   ConstView rstd, const NormShape& s) {
  const char* op = "rms_norm_backward";
  const std::int64_t n = s.rows * s.width;
  for_compute_type(op, dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward<T>(output<T>(op, "dx", dx, n), output<T>(op, "dw", dw_accumulate, s.width), nullptr,
                input<T>(op, "dy", dy, n), input<T>(op, "x", x, n), input<T>(op, "w", w, s.width),
                input<T>(op, "rstd", rstd, s.rows), s);
  });
}

void CpuBackend::add_rms_norm_forward(View h, View y, View rstd, ConstView x, ConstView a, ConstView w,
                                      const NormShape& s) {
  const char* op = "add_rms_norm_forward";
  const std::int64_t n = s.rows * s.width;
  for_compute_type(op, y.dtype, [&](auto zero) {
    using T = decltype(zero);
    forward<T>(output<T>(op, "h", h, n), output<T>(op, "y", y, n), output<T>(op, "rstd", rstd, s.rows),
               input<T>(op, "x", x, n), input<T>(op, "a", a, n), input<T>(op, "w", w, s.width), s);
  });
}

void CpuBackend::add_rms_norm_backward(View dx, View dw_accumulate, ConstView dh, ConstView dy, ConstView h,
                                       ConstView w, ConstView rstd, const NormShape& s) {
  const char* op = "add_rms_norm_backward";
  const std::int64_t n = s.rows * s.width;
  for_compute_type(op, dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward<T>(output<T>(op, "dx", dx, n), output<T>(op, "dw", dw_accumulate, s.width),
                optional_input<T>(op, "dh", dh, n), input<T>(op, "dy", dy, n), input<T>(op, "h", h, n),
                input<T>(op, "w", w, s.width), input<T>(op, "rstd", rstd, s.rows), s);
  });
}

void CpuBackend::rms_norm_backward_from_output(View dx, View dw_accumulate, ConstView dh, ConstView dy,
                                               ConstView y, ConstView w, ConstView rstd, const NormShape& s) {
  const char* op = "rms_norm_backward_from_output";
  const std::int64_t n = s.rows * s.width;
  for_compute_type(op, dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward_from_output<T>(output<T>(op, "dx", dx, n), output<T>(op, "dw", dw_accumulate, s.width),
                            optional_input<T>(op, "dh", dh, n), input<T>(op, "dy", dy, n),
                            input<T>(op, "y", y, n), input<T>(op, "w", w, s.width),
                            input<T>(op, "rstd", rstd, s.rows), s);
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
