// h = silu(z), z = x + bias. With p = sigmoid(z): dx = dh p (1 + z (1 - p)), dbias = the sum of dx over rows.
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/partials.h"
#include "kernels/cpu/isa/vector_math.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

template <typename T>
void forward(T* h, const T* x, const T* bias, std::int64_t rows, std::int64_t width) {
  parallel_for(rows, row_grain(width), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const T* from = x + i * width;
      T* to = h + i * width;
#pragma omp simd
      for (std::int64_t j = 0; j < width; ++j) {
        const T z = from[j] + bias[j];
        to[j] = z * vsigmoid(z);
      }
    }
  });
}

template <typename T>
void backward(T* dx, T* dbias, const T* dh, const T* x, const T* bias, std::int64_t rows,
              std::int64_t width) {
  RowSums<T> sums(rows, width);
  parallel_for(rows, sums.grain(), [=, &sums](std::int64_t begin, std::int64_t end) {
    T* piece = sums.start(begin);
    for (std::int64_t i = begin; i < end; ++i) {
      const T* from = x + i * width;
      const T* d = dh + i * width;
      T* to = dx + i * width;
#pragma omp simd
      for (std::int64_t j = 0; j < width; ++j) {
        const T z = from[j] + bias[j];
        const T p = vsigmoid(z);
        const T gradient = d[j] * (p + z * p * (T(1) - p));
        to[j] = gradient;
        piece[j] += gradient;
      }
    }
  });
  sums.add_to(dbias, width);
}

}  // namespace

void CpuBackend::bias_silu_forward(View h, ConstView x, ConstView bias, std::int64_t rows,
                                   std::int64_t width) {
  const char* op = "bias_silu_forward";
  for_compute_type(op, h.dtype, [&](auto zero) {
    using T = decltype(zero);
    forward(output<T>(op, "h", h, rows * width), input<T>(op, "x", x, rows * width),
            input<T>(op, "bias", bias, width), rows, width);
  });
}

void CpuBackend::bias_silu_backward(View dx, View dbias_accumulate, ConstView dh, ConstView x, ConstView bias,
                                    std::int64_t rows, std::int64_t width) {
  const char* op = "bias_silu_backward";
  for_compute_type(op, dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward(output<T>(op, "dx", dx, rows * width), output<T>(op, "dbias", dbias_accumulate, width),
             input<T>(op, "dh", dh, rows * width), input<T>(op, "x", x, rows * width),
             input<T>(op, "bias", bias, width), rows, width);
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
