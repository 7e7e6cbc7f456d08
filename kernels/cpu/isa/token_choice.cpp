// Token choice: the experts that each row chooses, the slots that they have for it, and the loss that keeps
// their loads even.
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/partials.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

constexpr std::int32_t kNone = -1;

template <typename T>
void choose(T* weights, const T* affinity, std::int64_t rows, std::int64_t choices, std::int64_t top_k) {
  parallel_for(rows, row_grain(choices), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      for (std::int64_t e = 0; e < choices; ++e) weights[e * rows + n] = T(0);
      T sum = 0;
      for (std::int64_t k = 0; k < top_k; ++k) {
        std::int64_t best = -1;
        for (std::int64_t e = 0; e < choices; ++e) {
          if (weights[e * rows + n] > T(0)) continue;  // chosen before
          if (best < 0 || affinity[e * rows + n] > affinity[best * rows + n]) best = e;
        }
        weights[best * rows + n] = affinity[best * rows + n];
        sum += affinity[best * rows + n];
      }
      if (top_k == 1) continue;
      for (std::int64_t e = 0; e < choices; ++e) weights[e * rows + n] /= sum;
    }
  });
}

template <typename T>
void choose_backward(T* daffinity, const T* dweights, const T* affinity, const T* weights, std::int64_t rows,
                     std::int64_t choices, std::int64_t top_k) {
  parallel_for(rows, row_grain(choices), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      T sum = 0, common = 0;
      for (std::int64_t e = 0; e < choices; ++e) {
        const std::int64_t at = e * rows + n;
        if (weights[at] > T(0)) sum += affinity[at];
        common += weights[at] * dweights[at];
      }
      for (std::int64_t e = 0; e < choices; ++e) {
        const std::int64_t at = e * rows + n;
        const T own = top_k == 1 ? dweights[at] : (dweights[at] - common) / sum;
        daffinity[at] = weights[at] > T(0) ? own : T(0);
      }
    }
  });
}

template <typename T>
void fill_slots(std::int32_t* row_of, std::int32_t* slot_of, const T* weights, std::int64_t seq,
                const ExpertShape& s) {
  const std::int64_t sequences = s.rows / seq, capacity = s.slots / sequences;
  const std::int64_t rows = s.rows;
  parallel_for(s.experts * sequences, 1, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t e = i / sequences, first = i % sequences * seq;
      std::int64_t filled = 0;
      for (std::int64_t n = first; n < first + seq; ++n) {
        const bool taken = weights[e * rows + n] > T(0) && filled < capacity;
        slot_of[e * rows + n] = taken ? static_cast<std::int32_t>(i * capacity + filled) : kNone;
        if (taken) row_of[i * capacity + filled++] = static_cast<std::int32_t>(n);
      }
      for (; filled < capacity; ++filled) row_of[i * capacity + filled] = kNone;
    }
  });
}

template <typename T>
void balance(T* losses, T* daffinity, const T* affinity, const T* weights, const SequenceChoices& s,
             T scale) {
  parallel_for(s.rows / s.seq, 1, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      std::int64_t all = 0;
      for (std::int64_t e = 0; e < s.choices; ++e) {
        for (std::int64_t n = b * s.seq; n < (b + 1) * s.seq; ++n)
          all += weights[e * s.rows + n] > T(0) ? 1 : 0;
      }
      T loss = 0;
      for (std::int64_t e = 0; e < s.choices; ++e) {
        std::int64_t chosen = 0;
        T mean = 0;
        for (std::int64_t n = b * s.seq; n < (b + 1) * s.seq; ++n) {
          chosen += weights[e * s.rows + n] > T(0) ? 1 : 0;
          mean += affinity[e * s.rows + n];
        }
        const T slope =
            static_cast<T>(s.choices) * static_cast<T>(chosen) / static_cast<T>(all) / static_cast<T>(s.seq);
        loss += slope * mean;
        if (daffinity == nullptr) continue;
        for (std::int64_t n = b * s.seq; n < (b + 1) * s.seq; ++n) daffinity[e * s.rows + n] = slope * scale;
      }
      losses[b] = loss;
    }
  });
}

void check_sequences(const char* op, std::int64_t rows, std::int64_t seq) {
  if (seq < 1) fail(op, "seq", seq, 1);
  if (rows % seq != 0) fail(op, "rows", rows, rows / seq * seq);
}

}  // namespace

void CpuBackend::token_choice_forward(View weights, ConstView affinity, std::int64_t rows,
                                      std::int64_t choices, std::int64_t top_k) {
  const char* op = "token_choice_forward";
  if (top_k < 1 || top_k > choices) fail(op, "top_k", top_k, choices);
  for_compute_type(op, weights.dtype, [&](auto zero) {
    using T = decltype(zero);
    choose(output<T>(op, "weights", weights, rows * choices),
           input<T>(op, "affinity", affinity, rows * choices), rows, choices, top_k);
  });
}

void CpuBackend::token_choice_backward(View daffinity, ConstView dweights, ConstView affinity,
                                       ConstView weights, std::int64_t rows, std::int64_t choices,
                                       std::int64_t top_k) {
  const char* op = "token_choice_backward";
  for_compute_type(op, daffinity.dtype, [&](auto zero) {
    using T = decltype(zero);
    choose_backward(output<T>(op, "daffinity", daffinity, rows * choices),
                    input<T>(op, "dweights", dweights, rows * choices),
                    input<T>(op, "affinity", affinity, rows * choices),
                    input<T>(op, "weights", weights, rows * choices), rows, choices, top_k);
  });
}

void CpuBackend::expert_fill(View rows, View slots, ConstView weights, std::int64_t seq,
                             const ExpertShape& s) {
  const char* op = "expert_fill";
  check_sequences(op, s.rows, seq);
  auto* row_of = output<std::int32_t>(op, "rows", rows, s.experts * s.slots);
  auto* slot_of = output<std::int32_t>(op, "slots", slots, s.experts * s.rows);
  if (s.rows == 0) return;
  if (s.slots % (s.rows / seq) != 0) fail(op, "slots", s.slots, s.rows / seq);
  for_compute_type(op, weights.dtype, [&](auto zero) {
    using T = decltype(zero);
    fill_slots(row_of, slot_of, input<T>(op, "weights", weights, s.experts * s.rows), seq, s);
  });
}

void CpuBackend::balance_loss(View losses, View daffinity, ConstView affinity, ConstView weights,
                              const SequenceChoices& s, double gradient_scale) {
  const char* op = "balance_loss";
  check_sequences(op, s.rows, s.seq);
  const std::int64_t all = s.rows * s.choices;
  for_compute_type(op, losses.dtype, [&](auto zero) {
    using T = decltype(zero);
    balance(output<T>(op, "losses", losses, s.rows / s.seq),
            optional_output<T>(op, "daffinity", daffinity, all), input<T>(op, "affinity", affinity, all),
            input<T>(op, "weights", weights, all), s, static_cast<T>(gradient_scale));
  });
}

void CpuBackend::square_loss(View losses, View dx, ConstView x, double gradient_scale) {
  const char* op = "square_loss";
  for_compute_type(op, losses.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = output<T>(op, "losses", losses, x.size);
    T* gradient = optional_output<T>(op, "dx", dx, x.size);
    const T* from = input<T>(op, "x", x, x.size);
    const T factor = static_cast<T>(2 * gradient_scale);
    for (std::int64_t i = 0; i < x.size; ++i) to[i] = from[i] * from[i];
    for (std::int64_t i = 0; gradient != nullptr && i < x.size; ++i) gradient[i] = factor * from[i];
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
