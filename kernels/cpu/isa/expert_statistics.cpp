// What the metrics say of the experts of a layer.
#include <math.h>

#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/partials.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

template <typename T>
void statistics(T* out, const T* affinity, const T* weights, const std::int32_t* slots, std::int64_t choices,
                const ExpertShape& s) {
  const Scratch<std::int64_t> scratch(s.experts);
  std::int64_t* load = scratch.data();
  for (std::int64_t e = 0; e < s.experts; ++e) load[e] = 0;
  std::int64_t uncovered = 0, filled = 0, chosen = 0, dropped = 0, to_noop = 0;
  double noop = 0, entropy = 0;
  for (std::int64_t n = 0; n < s.rows; ++n) {
    std::int64_t own = 0;
    for (std::int64_t e = 0; e < s.experts; ++e) {
      const std::int64_t has = slots[e * s.rows + n] >= 0 ? 1 : 0;
      own += has;
      load[e] += has;
    }
    uncovered += own == 0 ? 1 : 0;
    filled += own;
    std::int64_t favourite = 0;
    for (std::int64_t e = 0; e < choices; ++e) {
      const auto p = static_cast<double>(affinity[e * s.rows + n]);
      if (affinity[e * s.rows + n] > affinity[favourite * s.rows + n]) favourite = e;
      if (e >= s.experts) noop += p;
      const bool wants = weights != nullptr && weights[e * s.rows + n] > T(0);
      chosen += wants ? 1 : 0;
      dropped += wants && e < s.experts && slots[e * s.rows + n] < 0 ? 1 : 0;
      if (p > 0) entropy -= p * ::log(p);
    }
    to_noop += favourite >= s.experts ? 1 : 0;
  }
  std::int64_t busiest = load[0], idlest = load[0];
  for (std::int64_t e = 1; e < s.experts; ++e) {
    busiest = load[e] > busiest ? load[e] : busiest;
    idlest = load[e] < idlest ? load[e] : idlest;
  }
  const auto rows = static_cast<double>(s.rows);
  const double mean = filled > 0 ? static_cast<double>(filled) / static_cast<double>(s.experts) : 1.0;
  out[0] = static_cast<T>(static_cast<double>(uncovered) / rows);
  out[1] = static_cast<T>(static_cast<double>(filled) / rows);
  out[2] = static_cast<T>(chosen > 0 ? static_cast<double>(dropped) / static_cast<double>(chosen) : 0.0);
  out[3] = static_cast<T>(static_cast<double>(busiest) / mean);
  out[4] = static_cast<T>(static_cast<double>(idlest) / mean);
  out[5] = static_cast<T>(noop / rows);
  out[6] = static_cast<T>(static_cast<double>(to_noop) / rows);
  out[7] = static_cast<T>(entropy / rows);
}

}  // namespace

void CpuBackend::expert_statistics(View out, ConstView affinity, ConstView weights, ConstView slots,
                                   std::int64_t choices, const ExpertShape& s) {
  const char* op = "expert_statistics";
  if (s.rows < 1) fail(op, "rows", s.rows, 1);
  if (s.experts < 1 || choices < s.experts) fail(op, "choices", choices, s.experts);
  const auto* slot_of = input<std::int32_t>(op, "slots", slots, s.experts * s.rows);
  for_compute_type(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    statistics(output<T>(op, "out", out, 8), input<T>(op, "affinity", affinity, choices * s.rows),
               optional_input<T>(op, "weights", weights, choices * s.rows), slot_of, choices, s);
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
