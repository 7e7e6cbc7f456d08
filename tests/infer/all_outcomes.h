// All outcomes of a chain's random numbers, one after the other, each with its weight: the distribution of
// what it writes, to rounding.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <vector>

#include <gtest/gtest.h>

#include "infer/speculate/chance.h"

namespace fathom::outcomes {

using Ids = std::vector<std::int32_t>;
using Texts = std::map<Ids, double>;

/// Takes one outcome of each decision, and after each run of the body the next ones, until all were taken.
class AllOutcomes final : public Chance {
 public:
  bool happens(double probability, const Decision&) override {
    if (probability >= 1) return true;
    if (probability <= 0) return false;
    return branch({probability, 1 - probability}) == 0;
  }
  std::size_t pick(std::span<const double> weights, const Decision&) override {
    double sum = 0;
    for (const double w : weights) sum += w;
    EXPECT_GT(sum, 0);
    std::vector<double> shares;
    std::vector<std::size_t> places;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      if (weights[i] > 0) shares.push_back(weights[i] / sum), places.push_back(i);
    }
    return places[shares.size() == 1 ? 0 : branch(shares)];
  }
  /// The middle of what the outcome has of all weights.
  double share(const std::function<std::vector<double>()>& weights, const Decision& d) override {
    const std::vector<double> all = weights();
    const std::size_t place = pick(all, d);
    double sum = 0, before = 0;
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (i < place) before += all[i];
      sum += all[i];
    }
    return std::min((before + all[place] / 2) / sum, 1 - 0x1p-53);
  }
  /// Of the run that has ended.
  double weight() const { return weight_; }
  /// To the next run; false: there is none.
  bool next() {
    depth_ = 0;
    weight_ = 1;
    while (!path_.empty() && ++path_.back().at == path_.back().shares.size()) path_.pop_back();
    return !path_.empty();
  }

 private:
  struct Fork {
    std::vector<double> shares;
    std::size_t at = 0;
  };
  std::size_t branch(const std::vector<double>& shares) {
    if (depth_ == path_.size()) path_.push_back({shares, 0});
    const Fork& fork = path_[depth_++];
    weight_ *= fork.shares[fork.at];
    return fork.at;
  }
  std::vector<Fork> path_;
  std::size_t depth_ = 0;
  double weight_ = 1;
};

inline double total_variation(const Texts& a, const Texts& b) {
  double sum = 0;
  for (const auto& [text, weight] : a) sum += std::fabs(weight - (b.contains(text) ? b.at(text) : 0));
  for (const auto& [text, weight] : b) sum += a.contains(text) ? 0 : weight;
  return sum / 2;
}

}  // namespace fathom::outcomes
