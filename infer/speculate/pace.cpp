#include "infer/speculate/pace.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace fathom {

namespace {

constexpr double kForgetCost = 0.9;         // of seconds, from pass to pass
constexpr double kForgetAcceptance = 0.98;  // from proposal to proposal
constexpr double kForgetSettling = 0.99;    // from cycle to cycle: what is gathered anew is seldom, and long
constexpr double kGuess = 0.7;              // acceptance before any was seen,
constexpr double kGuessWeight = 4;          // worth so many proposals
constexpr std::int64_t kTriesFirst = 6;     // cycles that show what proposals do
constexpr std::int64_t kTries[] = {6, 2};  // proposals of a try: of two numbers, so that the line has a slope
constexpr std::int64_t kTryEvery = 64;     // plain cycles
constexpr std::int64_t kTriesAgain = 2;
constexpr double kWorth = 0.98;  // seconds a token, against plain ones: what it takes to be worth it

std::int64_t tried(std::int64_t number, std::int64_t most) { return std::min(kTries[number % 2], most); }

// Tokens of a pass over n proposals, each of which passes with the probability a: 1 + a + ... + a^n.
double tokens_of(double a, std::int64_t n) {
  double sum = 1, power = 1;
  for (std::int64_t i = 0; i < n; ++i) sum += power *= a;
  return sum;
}

}  // namespace

void AdaptivePace::Line::add(double proposals, double s, double forget) {
  for (double* sum : {&weight, &n, &nn, &seconds, &n_seconds}) *sum *= forget;
  weight += 1;
  n += proposals;
  nn += proposals * proposals;
  seconds += s;
  n_seconds += proposals * s;
}

// Where all had about the same number, a line from the pass over nothing to them.
double AdaptivePace::Line::slope(double single) const {
  if (weight <= 0) return 0;
  const double mean_n = n / weight, mean = seconds / weight, variance = nn / weight - mean_n * mean_n;
  const double found =
      variance > 0.25 ? (n_seconds / weight - mean_n * mean) / variance : (mean - single) / mean_n;
  return std::max(0.0, found);
}

double AdaptivePace::Line::at(double proposals, double single) const {
  if (weight <= 0) return single;
  return std::max(single, seconds / weight + slope(single) * (proposals - n / weight));
}

AdaptivePace::AdaptivePace(const Limits& limits)
    : limits_(limits), levels_(static_cast<std::size_t>(limits.levels)) {}

std::size_t AdaptivePace::bin_of(double sure) {
  return std::min(kBins - 1, static_cast<std::size_t>(std::max(0.0, sure) * kBins));
}

double AdaptivePace::acceptance(const Of& o) const {
  return (o.accepted.sum + kGuess * kGuessWeight) / (o.accepted.weight + kGuessWeight);
}

AdaptivePace::Best AdaptivePace::best(std::int64_t level) const {
  const Of& o = at(level);
  if (level == 0) return {0, o.single.value()};
  const double proposal = best(level - 1).seconds, a = acceptance(o);
  const bool last = level == limits_.levels - 1;
  Best best{0, o.single.value()};
  for (std::int64_t n = 1; n <= (last ? limits_.most : limits_.most_between); ++n) {
    const auto count = static_cast<double>(n);
    const double cycle = count * proposal + o.several.at(count, o.single.value());
    const double seconds = (cycle + (last ? settling_.value() : 0)) / tokens_of(a, n);
    if (seconds < best.seconds * (last && best.n == 0 ? kWorth : 1)) best = {n, seconds};
  }
  return best;
}

std::int64_t AdaptivePace::proposals(std::int64_t level) {
  Of& o = at(level);
  o.all_pass = 1;
  const Best b = best(level);
  o.rate = b.seconds > 0 ? 1 / b.seconds : 0;
  o.next_cost = best(level - 1).seconds + o.several.slope(o.single.value());
  o.tries = false;
  if (level < limits_.levels - 1) {
    if (o.single.weight == 0) return 0;
    if (b.n > 0 || ++o.plain_in_a_row < kTryEvery) return b.n;
    o.plain_in_a_row = 0;  // what a proposal would do now is known by trying
    return 1;
  }
  const std::int64_t cycle = cycles_++;
  if (cycle < kPlainFirst) return 0;
  o.tries = cycle < kPlainFirst + kTriesFirst;
  if (o.tries) return tried(cycle, limits_.most);
  if (tries_ == 0) {
    off_ = b.n == 0;
    o.plain_in_a_row = off_ ? o.plain_in_a_row + 1 : 0;
    if (o.plain_in_a_row < kTryEvery) return b.n;
    o.plain_in_a_row = 0;
    tries_ = kTriesAgain;
  }
  return tried(--tries_, limits_.most);
}

bool AdaptivePace::one_more(std::int64_t level, std::int64_t, double sure) {
  Of& o = at(level);
  const Mean& bin = o.by_sureness[bin_of(sure)];
  // What is known of proposals that were as sure, else of all.
  o.all_pass *= (bin.sum + acceptance(o) * kGuessWeight) / (bin.weight + kGuessWeight);
  if (o.tries) return true;
  return o.all_pass * acceptance(o) >= o.rate * o.next_cost;
}

void AdaptivePace::tested(std::int64_t level, double sure, bool accepted) {
  Of& o = at(level);
  o.accepted.add(accepted ? 1 : 0, kForgetAcceptance);
  o.by_sureness[bin_of(sure)].add(accepted ? 1 : 0, kForgetAcceptance);
}

void AdaptivePace::passed(std::int64_t level, std::int64_t n, double seconds) {
  Of& o = at(level);
  if (!std::exchange(o.began, true)) return;
  if (n == 0 || o.single.weight == 0) {
    o.single.add(n == 0 ? seconds : seconds / static_cast<double>(n + 1), kForgetCost);
  } else {
    o.several.add(static_cast<double>(n), seconds, kForgetCost);
  }
}

void AdaptivePace::settled(double seconds) { settling_.add(seconds, kForgetSettling); }

}  // namespace fathom
