// What the metrics say of a routed layer.
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

template <typename T>
void statistics(T* out, const T* r, const T* p, const std::int32_t* indices, std::int64_t kept,
                double threshold, std::int64_t rows) {
  double sum = 0;
  T least = r[0], most = r[0];
  std::int64_t above = 0, decided = 0, hits = 0;
  for (std::int64_t i = 0; i < rows; ++i) {
    sum += static_cast<double>(r[i]);
    least = r[i] < least ? r[i] : least;
    most = r[i] > most ? r[i] : most;
    above += static_cast<double>(r[i]) > threshold ? 1 : 0;
    decided += static_cast<double>(p[i]) > threshold ? 1 : 0;
  }
  for (std::int64_t k = 0; k < kept; ++k) hits += static_cast<double>(p[indices[k]]) > threshold ? 1 : 0;
  const auto n = static_cast<double>(rows);
  out[0] = static_cast<T>(sum / n);
  out[1] = least;
  out[2] = most;
  out[3] = static_cast<T>(static_cast<double>(above) / n);
  out[4] = static_cast<T>(static_cast<double>(hits) / n);
  out[5] = static_cast<T>(static_cast<double>(decided) / n);
  out[6] = static_cast<T>(static_cast<double>(kept) / n);
  out[7] = T(0);
}

}  // namespace

void CpuBackend::routing_statistics(View out, ConstView r, ConstView p, ConstView indices,
                                    double threshold_logit, std::int64_t rows) {
  const char* op = "routing_statistics";
  if (rows < 1) fail(op, "rows", rows, 1);
  const auto* kept = input<std::int32_t>(op, "indices", indices, indices.size);
  check_indices(op, "an index", kept, indices.size, 0, rows);
  for_compute_type(op, r.dtype, [&](auto zero) {
    using T = decltype(zero);
    statistics(output<T>(op, "out", out, 8), input<T>(op, "r", r, rows), input<T>(op, "p", p, rows), kept,
               indices.size, threshold_logit, rows);
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
