// Rows of a stream to the slots of the experts that take them, and the experts' weighted sum back. Every sum
// is one row's own, over the experts in their order.
#include <string.h>

#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/partials.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

constexpr std::int32_t kNone = -1;

template <typename T>
void gather(T* out, const T* x, const std::int32_t* rows, std::int64_t count, std::int64_t width) {
  parallel_for(count, row_grain(width), [=](std::int64_t begin, std::int64_t end) {
    const auto bytes = static_cast<std::size_t>(width) * sizeof(T);
    for (std::int64_t i = begin; i < end; ++i) {
      if (rows[i] == kNone) {
        memset(static_cast<void*>(out + i * width), 0, bytes);
      } else {
        memcpy(out + i * width, x + rows[i] * width, bytes);
      }
    }
  });
}

/// y[n] = the sum over the slots of row n of weights[e, n] f[slot]; null weights are 1.
template <typename T>
void combine(T* y, const T* f, const T* weights, const std::int32_t* slots, const ExpertShape& s) {
  const std::int64_t width = s.width, experts = s.experts, rows = s.rows;
  parallel_for(rows, row_grain(width), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      T* to = y + n * width;
      memset(static_cast<void*>(to), 0, static_cast<std::size_t>(width) * sizeof(T));
      for (std::int64_t e = 0; e < experts; ++e) {
        const std::int32_t slot = slots[e * rows + n];
        if (slot == kNone) continue;
        const T weight = weights == nullptr ? T(1) : weights[e * rows + n];
        const T* from = f + slot * width;
#pragma omp simd
        for (std::int64_t j = 0; j < width; ++j) to[j] += weight * from[j];
      }
    }
  });
}

template <typename T>
void combine_backward(T* df, T* dweights, const T* dy, const T* f, const T* weights,
                      const std::int32_t* row_of, const ExpertShape& s) {
  const std::int64_t width = s.width, rows = s.rows, slots = s.slots;
  for (std::int64_t i = 0; i < s.experts * rows; ++i) dweights[i] = T(0);
  parallel_for(s.experts * slots, row_grain(width), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      T* to = df + i * width;
      if (row_of[i] == kNone) {
        memset(static_cast<void*>(to), 0, static_cast<std::size_t>(width) * sizeof(T));
        continue;
      }
      const std::int64_t at = i / slots * rows + row_of[i];
      const T weight = weights[at];
      const T* d = dy + row_of[i] * width;
      const T* from = f + i * width;
      T product = 0;
#pragma omp simd reduction(+ : product)
      for (std::int64_t j = 0; j < width; ++j) {
        product += d[j] * from[j];
        to[j] = weight * d[j];
      }
      dweights[at] = product;
    }
  });
}

}  // namespace

void CpuBackend::expert_slots(View rows, View slots, ConstView indices, const ExpertShape& s) {
  const char* op = "expert_slots";
  auto* row_of = output<std::int32_t>(op, "rows", rows, s.experts * s.slots);
  auto* slot_of = output<std::int32_t>(op, "slots", slots, s.experts * s.rows);
  const auto* chosen = input<std::int32_t>(op, "indices", indices, s.experts * s.slots);
  for (std::int64_t e = 0; e < s.experts; ++e) {
    check_indices(op, "an index", chosen + e * s.slots, s.slots, e * s.rows, (e + 1) * s.rows);
  }
  for (std::int64_t i = 0; i < s.experts * s.rows; ++i) slot_of[i] = kNone;
  for (std::int64_t i = 0; i < s.experts * s.slots; ++i) {
    row_of[i] = static_cast<std::int32_t>(chosen[i] % s.rows);
    slot_of[chosen[i]] = static_cast<std::int32_t>(i);
  }
}

void CpuBackend::expert_gather_forward(View out, ConstView x, ConstView rows, const ExpertShape& s) {
  const char* op = "expert_gather_forward";
  const std::int64_t count = s.experts * s.slots;
  const auto* row_of = input<std::int32_t>(op, "rows", rows, count);
  check_indices(op, "a row", row_of, count, kNone, s.rows);
  for_compute_type(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    gather(output<T>(op, "out", out, count * s.width), input<T>(op, "x", x, s.rows * s.width), row_of, count,
           s.width);
  });
}

void CpuBackend::expert_gather_backward(View dx, ConstView dout, ConstView slots, const ExpertShape& s) {
  const char* op = "expert_gather_backward";
  const std::int64_t count = s.experts * s.slots;
  const auto* slot_of = input<std::int32_t>(op, "slots", slots, s.experts * s.rows);
  check_indices(op, "a slot", slot_of, s.experts * s.rows, kNone, count);
  for_compute_type(op, dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    combine(output<T>(op, "dx", dx, s.rows * s.width), input<T>(op, "dout", dout, count * s.width),
            static_cast<const T*>(nullptr), slot_of, s);
  });
}

void CpuBackend::expert_combine_forward(View y, ConstView f, ConstView weights, ConstView slots,
                                        const ExpertShape& s) {
  const char* op = "expert_combine_forward";
  const std::int64_t count = s.experts * s.slots;
  const auto* slot_of = input<std::int32_t>(op, "slots", slots, s.experts * s.rows);
  check_indices(op, "a slot", slot_of, s.experts * s.rows, kNone, count);
  for_compute_type(op, y.dtype, [&](auto zero) {
    using T = decltype(zero);
    combine(output<T>(op, "y", y, s.rows * s.width), input<T>(op, "f", f, count * s.width),
            input<T>(op, "weights", weights, s.experts * s.rows), slot_of, s);
  });
}

void CpuBackend::expert_combine_backward(View df, View dweights, ConstView dy, ConstView f, ConstView weights,
                                         ConstView rows, const ExpertShape& s) {
  const char* op = "expert_combine_backward";
  const std::int64_t count = s.experts * s.slots;
  const auto* row_of = input<std::int32_t>(op, "rows", rows, count);
  check_indices(op, "a row", row_of, count, kNone, s.rows);
  for_compute_type(op, df.dtype, [&](auto zero) {
    using T = decltype(zero);
    combine_backward(output<T>(op, "df", df, count * s.width),
                     output<T>(op, "dweights", dweights, s.experts * s.rows),
                     input<T>(op, "dy", dy, s.rows * s.width), input<T>(op, "f", f, count * s.width),
                     input<T>(op, "weights", weights, s.experts * s.rows), row_of, s);
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
