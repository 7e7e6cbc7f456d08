// One score a row: r = x . w (+ bias).
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/partials.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

template <typename T>
void forward(T* r, const T* x, const T* w, const T* bias, std::int64_t rows, std::int64_t width) {
  parallel_for(rows, row_grain(width), [=](std::int64_t begin, std::int64_t end) {
    const T* weights = w;  // gcc 12 does not vectorise a reduction that reads a captured pointer
    for (std::int64_t i = begin; i < end; ++i) {
      const T* row = x + i * width;
      T product = 0;
#pragma omp simd reduction(+ : product)
      for (std::int64_t j = 0; j < width; ++j) product += row[j] * weights[j];
      r[i] = bias == nullptr ? product : product + *bias;
    }
  });
}

template <typename T>
void backward(T* dx, T* dw, T* dbias, const T* dr, const T* x, const T* w, std::int64_t rows,
              std::int64_t width) {
  RowSums<T> sums(rows, width + 1);
  parallel_for(rows, sums.grain(), [=, &sums](std::int64_t begin, std::int64_t end) {
    T* piece = sums.start(begin);
    for (std::int64_t i = begin; i < end; ++i) {
      const T* row = x + i * width;
      const T gradient = dr[i];
      piece[width] += gradient;
      if (dx == nullptr) {
#pragma omp simd
        for (std::int64_t j = 0; j < width; ++j) piece[j] += gradient * row[j];
      } else {
        T* to = dx + i * width;
#pragma omp simd
        for (std::int64_t j = 0; j < width; ++j) {
          piece[j] += gradient * row[j];
          to[j] += gradient * w[j];
        }
      }
    }
  });
  sums.add_to(dw, width);
  if (dbias != nullptr) sums.add_to(dbias, 1, width);
}

}  // namespace

void CpuBackend::row_score_forward(View r, ConstView x, ConstView w, ConstView bias, std::int64_t rows,
                                   std::int64_t width) {
  const char* op = "row_score_forward";
  for_compute_type(op, r.dtype, [&](auto zero) {
    using T = decltype(zero);
    forward(output<T>(op, "r", r, rows), input<T>(op, "x", x, rows * width), input<T>(op, "w", w, width),
            optional_input<T>(op, "bias", bias, 1), rows, width);
  });
}

void CpuBackend::row_score_backward_accumulate(View dx, View dw, View dbias, ConstView dr, ConstView x,
                                               ConstView w, std::int64_t rows, std::int64_t width) {
  const char* op = "row_score_backward";
  for_compute_type(op, dw.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward(optional_output<T>(op, "dx", dx, rows * width), output<T>(op, "dw", dw, width),
             optional_output<T>(op, "dbias", dbias, 1), input<T>(op, "dr", dr, rows),
             input<T>(op, "x", x, rows * width), input<T>(op, "w", w, width), rows, width);
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
