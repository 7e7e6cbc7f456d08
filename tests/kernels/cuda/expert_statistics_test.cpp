// What the metrics say of experts, on the GPU: the CPU's numbers.
#include <cmath>

#include "tests/kernels/cuda/on_device.h"

namespace fathom::kernel_test {
namespace {

class CudaExpertStatistics : public CudaKernels {};

struct Experts {
  std::int64_t rows, experts, noops;
};

// Within a block and beyond what all blocks have at once; more columns of parts than a block has threads.
constexpr Experts kLayers[] = {{1, 1, 0}, {7, 3, 2}, {256, 8, 8}, {1000, 5, 0}, {40001, 8, 3}, {300, 400, 1}};

/// A softmax over the choices of each row, transposed. `coarse` logits make choices that are equal.
Buffer affinity_of(const Experts& l, bool coarse) {
  const std::int64_t choices = l.experts + l.noops;
  const Buffer logits = random(DType::F32, choices * l.rows, 3);
  Buffer affinity(DType::F32, choices * l.rows);
  for (std::int64_t n = 0; n < l.rows; ++n) {
    const auto weight = [&](std::int64_t e) {
      const double logit = logits[e * l.rows + n];
      return std::exp(coarse ? std::round(logit) : logit);
    };
    double sum = 0;
    for (std::int64_t e = 0; e < choices; ++e) sum += weight(e);
    for (std::int64_t e = 0; e < choices; ++e) affinity.set(e * l.rows + n, weight(e) / sum);
  }
  return affinity;
}

/// Two of three rows have a slot with an expert; with `idle` the last expert has none at all.
Buffer slots_of(const Experts& l, bool idle) {
  const Buffer draws = random(DType::F32, l.experts * l.rows, 4);
  Buffer slots(DType::I32, l.experts * l.rows, -1);
  for (std::int64_t i = 0, next = 0; i < slots.size(); ++i) {
    const bool last = i / l.rows == l.experts - 1;
    if (draws[i] > -0.43 && !(idle && last)) slots.set(i, static_cast<double>(next++));
  }
  return slots;
}

TEST_F(CudaExpertStatistics, AreTheCpus) {
  for (const Experts& l : kLayers) {
    const std::int64_t choices = l.experts + l.noops;
    Buffer weights = random(DType::F32, choices * l.rows, 5);  // half of the choices are made
    for (std::int64_t i = 0; i < weights.size(); ++i) weights.set(i, std::max(0.0, weights[i]));
    for (const bool chosen : {false, true}) {
      for (const bool special : {false, true}) {
        SCOPED_TRACE(std::to_string(l.rows) + " rows, " + std::to_string(l.experts) + " experts, weights " +
                     std::to_string(chosen) + ", ties and an idle expert " + std::to_string(special));
        expect_as_on_the_cpu(
            {{DType::F32, 8}, affinity_of(l, special), weights, slots_of(l, special)},
            [&](Backend& b, const std::vector<View>& v) {
              const ConstView w = chosen ? ConstView(v[2]) : ConstView{};
              b.expert_statistics(v[0], v[1], w, v[3], choices, {.rows = l.rows, .experts = l.experts});
            },
            1e-4);
      }
    }
  }
}

}  // namespace
}  // namespace fathom::kernel_test
