// The logits of a router of choices, transposed and with their bias: each choice has its rows one after the
// other, as selection reads them.
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/partials.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

template <typename T>
void forward(T* scores, const T* logits, const T* bias, std::int64_t rows, std::int64_t choices) {
  parallel_for(rows, row_grain(choices), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t e = 0; e < choices; ++e) {
      const T shift = bias == nullptr ? T(0) : bias[e];
      for (std::int64_t n = begin; n < end; ++n) scores[e * rows + n] = logits[n * choices + e] + shift;
    }
  });
}

template <typename T>
void backward(T* dlogits, T* dbias, const T* dscores, std::int64_t rows, std::int64_t choices) {
  parallel_for(rows, row_grain(choices), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t e = 0; e < choices; ++e) {
      for (std::int64_t n = begin; n < end; ++n) dlogits[n * choices + e] = dscores[e * rows + n];
    }
  });
  if (dbias == nullptr) return;
  parallel_for(choices, row_grain(rows), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t e = begin; e < end; ++e) {
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (std::int64_t n = 0; n < rows; ++n) sum += static_cast<double>(dscores[e * rows + n]);
      dbias[e] += static_cast<T>(sum);
    }
  });
}

}  // namespace

void CpuBackend::choice_scores_forward(View scores, ConstView logits, ConstView bias, std::int64_t rows,
                                       std::int64_t choices) {
  const char* op = "choice_scores_forward";
  for_compute_type(op, scores.dtype, [&](auto zero) {
    using T = decltype(zero);
    forward(output<T>(op, "scores", scores, rows * choices), input<T>(op, "logits", logits, rows * choices),
            optional_input<T>(op, "bias", bias, choices), rows, choices);
  });
}

void CpuBackend::choice_scores_backward(View dlogits, View dbias_accumulate, ConstView dscores,
                                        std::int64_t rows, std::int64_t choices) {
  const char* op = "choice_scores_backward";
  for_compute_type(op, dlogits.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward(output<T>(op, "dlogits", dlogits, rows * choices),
             optional_output<T>(op, "dbias", dbias_accumulate, choices),
             input<T>(op, "dscores", dscores, rows * choices), rows, choices);
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
