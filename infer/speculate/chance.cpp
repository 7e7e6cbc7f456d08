#include "infer/speculate/chance.h"

#include <cmath>

#include "infer/sampling.h"
#include "src/core/splitmix64.h"

namespace fathom {

double SeededChance::uniform_of(const Decision& d) const {
  const auto what = static_cast<std::uint64_t>(d.cycle) * 64 + static_cast<std::uint64_t>(d.level) * 8 +
                    static_cast<std::uint64_t>(d.purpose) + 1;
  return uniform(mix64(seed_ ^ mix64(what * kGoldenGamma)), static_cast<std::uint64_t>(d.position));
}

bool SeededChance::happens(double probability, const Decision& d) { return uniform_of(d) < probability; }

std::size_t SeededChance::pick(std::span<const double> weights, const Decision& d) {
  return draw(weights, uniform_of(d));
}

// g = -log E with E exponential, so the greatest log p + g is the least E / p: no logarithm of p.
std::int32_t gumbel_choice(std::span<const double> p, std::uint64_t seed, std::int64_t position) {
  const std::uint64_t of_place =
      mix64(seed * kGoldenGamma + mix64(static_cast<std::uint64_t>(position) + 0x47554D42454CU));
  double least = INFINITY;
  std::size_t best = 0;
  for (std::size_t v = 0; v < p.size(); ++v) {
    if (p[v] <= 0) continue;
    const double e = -std::log1p(-uniform(of_place, v)) / p[v];
    if (e < least || least == INFINITY) least = e, best = v;
  }
  return static_cast<std::int32_t>(best);
}

}  // namespace fathom
