// Cross-entropy over a vocabulary, and binary cross-entropy of the router's logits.
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/partials.h"
#include "kernels/cpu/isa/vector_math.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

/// The largest element; what a NaN does to it does not matter, as the sum of exponentials is then NaN.
template <typename T>
FATHOM_INLINE T row_max(const T* row, std::int64_t n) {
  T most = row[0];
#pragma omp simd reduction(max : most)
  for (std::int64_t j = 0; j < n; ++j) most = row[j] > most ? row[j] : most;
  return most;
}

/// A row stays in the first-level cache over its three passes: largest, exponentials with their sum, scale.
template <typename T>
void cross_entropy_rows(T* losses, T* gradient, const T* logits, const std::int32_t* targets,
                        std::int64_t rows, std::int64_t vocab, T factor) {
  parallel_for(rows, row_grain(vocab), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const T* row = logits + i * vocab;
      T* to = gradient == nullptr ? nullptr : gradient + i * vocab;
      const std::int64_t target = targets[i];
      if (target < 0) {
        losses[i] = T(0);
        for (std::int64_t j = 0; to != nullptr && j < vocab; ++j) to[j] = T(0);
        continue;
      }
      const T most = row_max(row, vocab);
      const T hit = row[target];
      T total = 0;
      if (to == nullptr) {
#pragma omp simd reduction(+ : total)
        for (std::int64_t j = 0; j < vocab; ++j) total += vexp(row[j] - most);
      } else {
#pragma omp simd reduction(+ : total)
        for (std::int64_t j = 0; j < vocab; ++j) {
          const T e = vexp(row[j] - most);
          to[j] = e;
          total += e;
        }
        const T share = factor / total;
#pragma omp simd
        for (std::int64_t j = 0; j < vocab; ++j) to[j] *= share;
        to[target] -= factor;
      }
      losses[i] = vlog(total) + (most - hit);
    }
  });
}

template <typename T>
void bce_rows(T* losses, T* dr, const T* r, const std::int32_t* indices, std::int64_t kept, std::int64_t rows,
              T factor) {
  parallel_for(rows, kGrain, [=](std::int64_t begin, std::int64_t end) {
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) losses[i] = vsoftplus(r[i]);
    if (dr == nullptr) return;
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) dr[i] = vsigmoid(r[i]) * factor;
  });
  for (std::int64_t k = 0; k < kept; ++k) {  // softplus(r) - r = softplus(-r), without the cancellation
    const std::int64_t i = indices[k];
    losses[i] = vsoftplus(-r[i]);
    if (dr != nullptr) dr[i] = -vsigmoid(-r[i]) * factor;
  }
}

}  // namespace

void CpuBackend::cross_entropy(View losses, View gradient, ConstView logits, ConstView targets,
                               std::int64_t rows, std::int64_t vocab, double gradient_scale) {
  const char* op = "cross_entropy";
  if (vocab < 1) fail(op, "vocab", vocab, 1);
  const auto* wanted = input<std::int32_t>(op, "targets", targets, rows);
  check_indices(op, "a target", wanted, rows, -0x80000000LL, vocab);
  for_compute_type(op, logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    cross_entropy_rows(
        output<T>(op, "losses", losses, rows), optional_output<T>(op, "gradient", gradient, rows * vocab),
        input<T>(op, "logits", logits, rows * vocab), wanted, rows, vocab, static_cast<T>(gradient_scale));
  });
}

void CpuBackend::membership_bce(View losses, View dr, ConstView r, ConstView indices, std::int64_t rows,
                                double gradient_scale) {
  const char* op = "membership_bce";
  const auto* kept = input<std::int32_t>(op, "indices", indices, indices.size);
  check_indices(op, "an index", kept, indices.size, 0, rows);
  for_compute_type(op, r.dtype, [&](auto zero) {
    using T = decltype(zero);
    bce_rows(output<T>(op, "losses", losses, rows), optional_output<T>(op, "dr", dr, rows),
             input<T>(op, "r", r, rows), kept, indices.size, rows, static_cast<T>(gradient_scale));
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
