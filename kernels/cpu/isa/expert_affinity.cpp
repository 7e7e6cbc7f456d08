// The softmax of an expert router, transposed: each choice has its rows one after the other.
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/partials.h"
#include "kernels/cpu/isa/vector_math.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

template <typename T>
void forward(T* affinity, T* lse, const T* logits, std::int64_t rows, std::int64_t choices) {
  parallel_for(rows, row_grain(choices), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      const T* row = logits + n * choices;
      T most = row[0];
      for (std::int64_t e = 1; e < choices; ++e) most = row[e] > most ? row[e] : most;
      T sum = 0;
      for (std::int64_t e = 0; e < choices; ++e) {
        const T p = vexp(row[e] - most);
        affinity[e * rows + n] = p;
        sum += p;
      }
      for (std::int64_t e = 0; e < choices; ++e) affinity[e * rows + n] /= sum;
      if (lse != nullptr) lse[n] = most + vlog(sum);
    }
  });
}

template <typename T>
void backward(T* dlogits, const T* daffinity, const T* dlse, const T* affinity, std::int64_t rows,
              std::int64_t choices) {
  parallel_for(rows, row_grain(choices), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      T common = dlse == nullptr ? T(0) : dlse[n];
      for (std::int64_t e = 0; daffinity != nullptr && e < choices; ++e) {
        common -= affinity[e * rows + n] * daffinity[e * rows + n];
      }
      for (std::int64_t e = 0; e < choices; ++e) {
        const T own = daffinity == nullptr ? T(0) : daffinity[e * rows + n];
        dlogits[n * choices + e] = affinity[e * rows + n] * (own + common);
      }
    }
  });
}

}  // namespace

void CpuBackend::expert_affinity_forward(View affinity, View lse, ConstView logits, std::int64_t rows,
                                         std::int64_t choices) {
  const char* op = "expert_affinity_forward";
  if (choices < 1) fail(op, "choices", choices, 1);
  for_compute_type(op, affinity.dtype, [&](auto zero) {
    using T = decltype(zero);
    forward(output<T>(op, "affinity", affinity, rows * choices), optional_output<T>(op, "lse", lse, rows),
            input<T>(op, "logits", logits, rows * choices), rows, choices);
  });
}

void CpuBackend::expert_affinity_backward(View dlogits, ConstView daffinity, ConstView dlse,
                                          ConstView affinity, std::int64_t rows, std::int64_t choices) {
  const char* op = "expert_affinity_backward";
  for_compute_type(op, dlogits.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward(output<T>(op, "dlogits", dlogits, rows * choices),
             optional_input<T>(op, "daffinity", daffinity, rows * choices),
             optional_input<T>(op, "dlse", dlse, rows), input<T>(op, "affinity", affinity, rows * choices),
             rows, choices);
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
