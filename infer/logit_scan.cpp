#include "infer/logit_scan.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace fathom {

namespace {

constexpr std::size_t kLanes = 16;  // side by side, so that a compiler makes vectors of them

// 2^x for x in [-126, 126], to 0.3 %: the exponent from x's whole part, a polynomial for the rest.
inline float rough_exp2(float x) {
  const auto whole = static_cast<std::int32_t>(x);
  const float f = x - static_cast<float>(whole);
  const float power = 1 + f * (0.693147F + f * (0.240227F + f * (0.0555041F + f * 0.00961813F)));
  return power * std::bit_cast<float>((whole + 127) << 23);
}

}  // namespace

GreatestLogit greatest_logit(std::span<const float> logits) {
  float most[kLanes];
  std::uint32_t bad[kLanes] = {};
  std::fill(std::begin(most), std::end(most), -INFINITY);
  const std::size_t whole = logits.size() / kLanes * kLanes;
  for (std::size_t i = 0; i < whole; i += kLanes) {
    for (std::size_t k = 0; k < kLanes; ++k) {
      const float x = logits[i + k];
      most[k] = x > most[k] ? x : most[k];
      bad[k] |= x < INFINITY ? 0U : 1U;
    }
  }
  for (std::size_t i = whole; i < logits.size(); ++i) {
    most[0] = std::max(most[0], logits[i]);
    bad[0] |= logits[i] < INFINITY ? 0U : 1U;
  }
  const float greatest = *std::max_element(std::begin(most), std::end(most));
  const bool finite =
      greatest > -INFINITY && std::all_of(std::begin(bad), std::end(bad), [](auto b) { return b == 0; });
  if (!finite) return {};
  return {static_cast<std::int32_t>(std::find(logits.begin(), logits.end(), greatest) - logits.begin()),
          true};
}

double rough_share(std::span<const float> logits, std::int32_t id) {
  constexpr float kLog2E = 1.44269504F;
  const float of = logits[static_cast<std::size_t>(id)];
  const float* const from = logits.data();
  const std::size_t n = logits.size();
  float sum = 0;
  for (std::size_t i = 0; i < n; ++i) {
    float x = (from[i] - of) * kLog2E;
    x = x < -126.0F ? -126.0F : x;
    x = x > 126.0F ? 126.0F : x;
    sum += rough_exp2(x);
  }
  return 1 / static_cast<double>(sum);
}

}  // namespace fathom
