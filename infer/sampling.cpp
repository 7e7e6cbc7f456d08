#include "infer/sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <unordered_map>
#include <unordered_set>

#include <fmt/format.h>

#include "infer/logit_scan.h"
#include "infer/pieces.h"
#include "kernels/error.h"
#include "src/core/splitmix64.h"

namespace fathom {

namespace {

double at(std::span<const float> logits, std::int32_t id) { return logits[static_cast<std::size_t>(id)]; }

// NaN and infinity are nowhere, and something can come.
void require_finite(std::span<const float> logits, std::uint64_t position) {
  bool bad = false, any = false;
  for (const float x : logits) {
    bad |= !(x < INFINITY);
    any |= x > -INFINITY;
  }
  if (bad || !any) fail_not_finite(position);
}

// The log of the sum of exponentials of logits that are finite.
double log_total(std::span<const float> logits) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (const float x : logits) total += std::exp(static_cast<double>(x) - top);
  return top + std::log(total);
}

void penalise(std::vector<double>& z, const SamplingOptions& o, const TokenHistory& history) {
  const auto inside = [&](std::int32_t id) { return id >= 0 && static_cast<std::size_t>(id) < z.size(); };
  std::unordered_map<std::int32_t, std::int64_t> times;
  for (const std::int32_t id : history.generated) ++times[id];
  std::unordered_set<std::int32_t> seen(history.prompt.begin(), history.prompt.end());
  seen.insert(history.generated.begin(), history.generated.end());
  for (const std::int32_t id : seen) {
    if (!inside(id)) continue;
    double& x = z[static_cast<std::size_t>(id)];
    x = x > 0 ? x / o.repetition_penalty : x * o.repetition_penalty;
  }
  for (const auto& [id, n] : times) {
    if (!inside(id)) continue;
    z[static_cast<std::size_t>(id)] -= o.presence_penalty + o.frequency_penalty * static_cast<double>(n);
  }
}

// How many of the weights, which fall, are left: the nucleus, then those that are likely enough.
std::size_t cut(const std::vector<double>& weights, const SamplingOptions& o) {
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::size_t left = 0;
  double mass = 0;
  while (left < weights.size()) {
    mass += weights[left++];
    if (mass >= o.top_p * sum) break;
  }
  while (left > 1 && weights[left - 1] < o.min_p * weights[0]) --left;
  return left;
}

// In four sums side by side: one would wait for each addition.
double sum_of(std::span<const double> weights) {
  double sums[4] = {};
  std::size_t i = 0;
  for (; i + 4 <= weights.size(); i += 4) {
    for (std::size_t k = 0; k < 4; ++k) sums[k] += weights[i + k];
  }
  for (; i < weights.size(); ++i) sums[0] += weights[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Biases and penalties, on what the logits are. The greatest that is left.
double adjust(std::span<const float> logits, const SamplingOptions& options, std::uint64_t position,
              const TokenHistory& history, std::vector<double>& z) {
  require_finite(logits, position);
  z.assign(logits.begin(), logits.end());
  for (const auto& [id, bias] : options.logit_bias) {
    if (id >= 0 && static_cast<std::size_t>(id) < z.size()) z[static_cast<std::size_t>(id)] += bias;
  }
  if (options.penalises()) penalise(z, options, history);
  const double greatest = *std::max_element(z.begin(), z.end());
  if (!std::isfinite(greatest))
    throw UserError(
        fmt::format("Biases and penalties leave no token to choose for place {} of the text.", position));
  return greatest;
}

// What a temperature above 0 makes of adjusted logits: weights of the ids `order`, most likely first, or of
// all ids in turn, where that is empty.
void weigh(std::vector<double>& z, double greatest, const SamplingOptions& options,
           std::vector<double>& weights, std::vector<std::int32_t>& order) {
  order.clear();
  if (options.top_k == 0 && options.top_p >= 1 && options.min_p == 0) {
    // Most of the time that a draw takes: by all threads, each exponential is what it is.
    double* const of = z.data();
    for_pieces(static_cast<std::int64_t>(z.size()), 2048, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) of[i] = std::exp((of[i] - greatest) / options.temperature);
    });
    weights.swap(z);
    return;
  }
  order.resize(z.size());
  std::iota(order.begin(), order.end(), 0);
  const auto likelier = [&](std::int32_t a, std::int32_t b) {
    const double x = z[static_cast<std::size_t>(a)], y = z[static_cast<std::size_t>(b)];
    return x > y || (x == y && a < b);
  };
  const auto wanted =
      options.top_k > 0 ? std::min(static_cast<std::size_t>(options.top_k), z.size()) : z.size();
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(wanted), order.end(),
                    likelier);
  order.resize(wanted);
  weights.resize(wanted);
  for (std::size_t i = 0; i < wanted; ++i)
    weights[i] = std::exp((z[static_cast<std::size_t>(order[i])] - greatest) / options.temperature);
  weights.resize(cut(weights, options));
  order.resize(weights.size());
}

}  // namespace

void fail_not_finite(std::uint64_t position) {
  throw UserError(
      fmt::format(
          "The model's logits for token {} of the text are not finite numbers: its training diverged.",
          position),
      "Use an earlier checkpoint.");
}

// The first place whose weights, added up to it, exceed the share `u` of all. Blocks of weights are passed by
// their sums.
std::size_t draw(std::span<const double> weights, double u) {
  constexpr std::size_t kBlock = 256;
  std::vector<double> sums;
  for (std::size_t i = 0; i < weights.size(); i += kBlock)
    sums.push_back(sum_of(weights.subspan(i, std::min(kBlock, weights.size() - i))));
  double left = u * sum_of(sums);
  std::size_t block = 0;
  std::size_t whole = sums.size();  // the blocks up to the last one that anything can come from
  while (whole > 1 && sums[whole - 1] <= 0) --whole;
  while (block + 1 < whole && left >= sums[block]) left -= sums[block++];
  std::size_t last = 0;  // of those that can come: rounding may leave a little at the end
  for (std::size_t i = block * kBlock; i < weights.size(); ++i) {
    if (weights[i] <= 0) continue;
    if (left < weights[i]) return i;
    left -= weights[i];
    last = i;
  }
  return last;
}

double uniform(std::uint64_t seed, std::uint64_t position) {
  const std::uint64_t x = mix64(seed * kGoldenGamma + position * 0xD1342543DE82EF95U + kGoldenGamma);
  return static_cast<double>(x >> 11) * 0x1p-53;
}

SampledToken sample(std::span<const float> logits, const SamplingOptions& options, std::uint64_t position,
                    const TokenHistory& history, bool logprob) {
  if (options.temperature <= 0 && options.logit_bias.empty() && !options.penalises()) {
    const GreatestLogit best = greatest_logit(logits);
    if (!best.finite) fail_not_finite(position);
    return {best.id, logprob ? at(logits, best.id) - log_total(logits) : NAN};
  }
  // As large as the vocabulary: fresh memory for each token would cost more.
  thread_local std::vector<double> z, weights;
  thread_local std::vector<std::int32_t> order;
  const double greatest = adjust(logits, options, position, history, z);
  const auto result = [&](std::size_t id) {
    const auto token = static_cast<std::int32_t>(id);
    return SampledToken{token, logprob ? at(logits, token) - log_total(logits) : NAN};
  };
  if (options.temperature <= 0)
    return result(static_cast<std::size_t>(std::find(z.begin(), z.end(), greatest) - z.begin()));
  weigh(z, greatest, options, weights, order);
  const std::size_t drawn = draw(weights, uniform(options.seed, position));
  return result(order.empty() ? drawn : static_cast<std::size_t>(order[drawn]));
}

void probabilities(std::span<const float> logits, const SamplingOptions& options, std::uint64_t position,
                   const TokenHistory& history, std::vector<double>& p) {
  thread_local std::vector<double> z, weights;
  thread_local std::vector<std::int32_t> order;
  const double greatest = adjust(logits, options, position, history, z);
  const std::size_t vocab = logits.size();
  if (options.temperature <= 0) {
    p.assign(vocab, 0.0);
    p[static_cast<std::size_t>(std::find(z.begin(), z.end(), greatest) - z.begin())] = 1;
    return;
  }
  weigh(z, greatest, options, weights, order);
  const double whole = 1 / sum_of(weights);
  p.assign(vocab, 0.0);
  for (std::size_t i = 0; i < weights.size(); ++i)
    p[order.empty() ? i : static_cast<std::size_t>(order[i])] = weights[i] * whole;
}

std::vector<SampledToken> most_likely(std::span<const float> logits, std::int64_t n) {
  const double total = log_total(logits);
  std::vector<std::int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto wanted = std::min(n, static_cast<std::int64_t>(order.size()));
  std::partial_sort(order.begin(), order.begin() + wanted, order.end(), [&](std::int32_t a, std::int32_t b) {
    return at(logits, a) > at(logits, b) || (at(logits, a) == at(logits, b) && a < b);
  });
  std::vector<SampledToken> found;
  for (std::int64_t i = 0; i < wanted; ++i) {
    const std::int32_t id = order[static_cast<std::size_t>(i)];
    found.push_back({id, at(logits, id) - total});
  }
  return found;
}

double logprob_of(std::span<const float> logits, std::int32_t id, std::uint64_t position) {
  require_finite(logits, position);
  return at(logits, id) - log_total(logits);
}

}  // namespace fathom
