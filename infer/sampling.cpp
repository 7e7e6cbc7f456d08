#include "infer/sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/core/splitmix64.h"

namespace fathom {

double uniform(std::uint64_t seed, std::uint64_t position) {
  const std::uint64_t x = mix64(seed * kGoldenGamma + position * 0xD1342543DE82EF95U + kGoldenGamma);
  return static_cast<double>(x >> 11) * 0x1p-53;
}

SampledToken sample(const std::vector<float>& logits, const SamplingOptions& options,
                    std::uint64_t position) {
  const auto greatest = std::max_element(logits.begin(), logits.end());
  const double top = *greatest;
  double total = 0;
  for (float x : logits) total += std::exp(static_cast<double>(x) - top);
  if (!std::isfinite(total)) {
    throw UserError(
        fmt::format(
            "The model's logits for token {} of the text are not finite numbers: its training diverged.",
            position),
        "Use an earlier checkpoint.");
  }
  const auto logprob = [&](std::int32_t id) {
    return static_cast<double>(logits[static_cast<std::size_t>(id)]) - top - std::log(total);
  };
  if (options.temperature <= 0) {
    const auto id = static_cast<std::int32_t>(greatest - logits.begin());
    return {id, logprob(id)};
  }
  std::vector<std::int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    return logits[static_cast<std::size_t>(a)] > logits[static_cast<std::size_t>(b)];
  });
  std::vector<double> weights(order.size());
  double sum = 0;
  for (std::size_t i = 0; i < order.size(); ++i) {
    weights[i] = std::exp((static_cast<double>(logits[static_cast<std::size_t>(order[i])]) - top) /
                          options.temperature);
    sum += weights[i];
  }
  std::size_t nucleus = 0;
  double mass = 0;
  while (nucleus < weights.size()) {
    mass += weights[nucleus++];
    if (mass >= options.top_p * sum) break;
  }
  double left = uniform(options.seed, position) * mass;
  std::size_t chosen = 0;
  while (chosen + 1 < nucleus && left >= weights[chosen]) left -= weights[chosen++];
  return {order[chosen], logprob(order[chosen])};
}

}  // namespace fathom
