// How many proposals pay, by costs and acceptance that are made up.
#include "infer/speculate/pace.h"

#include <cmath>

#include <gtest/gtest.h>

#include "src/core/splitmix64.h"

namespace fathom {
namespace {

struct World {
  double draft = 0.05;      // seconds of a proposal
  double pass = 1;          // of a pass over one row
  double row = 0.02;        // of each row more
  double step = 0;          // and of the first of them
  double acceptance = 0.8;  // of a proposal
  double settle = 0;        // of a cycle with proposals, to take the text over,
  double gather = 0;        // and at every 50th of them
};

struct Outcome {
  double seconds_a_token = 0;
  double proposals = 0;  // a cycle, of the last ones
  bool off = false;
};

// Two levels, cycle after cycle.
Outcome run(AdaptivePace& pace, const World& w, int cycles, std::uint64_t seed = 1) {
  SplitMix64 random(seed);
  const auto happens = [&](double p) { return static_cast<double>(random.next() >> 11) * 0x1p-53 < p; };
  double seconds = 0, tokens = 0, proposals = 0;
  int proposed = 0;
  for (int i = 0; i < cycles; ++i) {
    const std::int64_t wanted = pace.proposals(1);
    std::int64_t n = 0;
    if (wanted > 0) {
      const double settle = w.settle + (++proposed % 50 == 0 ? w.gather : 0);
      pace.settled(settle);
      seconds += settle;
    }
    while (n < wanted) {
      pace.passed(0, 0, w.draft);
      seconds += w.draft;
      if (!pace.one_more(1, ++n, 0.8)) break;
    }
    const double pass = w.pass + static_cast<double>(n) * w.row + (n > 0 ? w.step : 0);
    pace.passed(1, n, pass);
    seconds += pass;
    std::int64_t taken = 0;
    bool refused = false;
    while (taken < n && !refused) {
      refused = !happens(w.acceptance);
      pace.tested(1, 0.8, !refused);
      taken += refused ? 0 : 1;
    }
    tokens += static_cast<double>(taken + 1);
    if (i >= cycles / 2) proposals += static_cast<double>(n) * 2 / cycles;
  }
  return {seconds / tokens, proposals, pace.is_off()};
}

TEST(AdaptivePace, ProposesMoreWhereMoreIsAccepted) {
  double before = 0;
  for (const double acceptance : {0.3, 0.6, 0.8, 0.95}) {
    AdaptivePace pace({.levels = 2});
    const Outcome o = run(pace, {.acceptance = acceptance}, 400);
    EXPECT_GT(o.proposals, before) << acceptance;
    before = o.proposals;
  }
}

TEST(AdaptivePace, ComesNearTheBestFixedNumber) {
  for (const World& w : {World{}, World{.draft = 0.2}, World{.acceptance = 0.95}, World{.row = 0.3},
                         World{.draft = 0.001, .acceptance = 0.5}, World{.step = 2, .acceptance = 0.95}}) {
    double best = w.pass;
    for (int n = 1; n <= 12; ++n) {
      double tokens = 1, power = 1;
      for (int i = 0; i < n; ++i) tokens += power *= w.acceptance;
      best = std::min(best, (w.pass + w.step + n * (w.draft + w.row)) / tokens);
    }
    AdaptivePace pace({.levels = 2});
    const Outcome o = run(pace, w, 1000);
    EXPECT_LT(o.seconds_a_token, 1.1 * best) << w.draft << " " << w.acceptance << " " << w.row;
  }
}

TEST(AdaptivePace, GoesOnPlainlyWhereProposalsLoseAndTriesAgain) {
  AdaptivePace pace({.levels = 2});
  const World bad{.draft = 0.6, .acceptance = 0.3};
  const Outcome o = run(pace, bad, 600);
  EXPECT_TRUE(o.off);
  EXPECT_LT(o.seconds_a_token, 1.06 * bad.pass);
  AdaptivePace stepped({.levels = 2});
  EXPECT_TRUE(run(stepped, {.step = 20}, 600).off);
  // What the levels before take to follow the text is a cost of proposals as well.
  for (const World& w : {World{.settle = 4}, World{.gather = 200}}) {
    AdaptivePace charged({.levels = 2});
    EXPECT_TRUE(run(charged, w, 1200).off) << w.settle;
    EXPECT_LT(run(charged, w, 1200).seconds_a_token, 1.3 * w.pass) << w.settle;
  }
  // The text becomes easier: that is noticed.
  const Outcome later = run(pace, {.acceptance = 0.9}, 1500, 2);
  EXPECT_FALSE(later.off);
  EXPECT_GT(later.proposals, 2);
}

// A level between that refused all for a while is given proposals again, and takes them.
TEST(AdaptivePace, TriesAgainBetweenLevelsToo) {
  AdaptivePace pace({.levels = 3});
  const auto passes = [&](int count, bool accepted) {
    std::int64_t proposed = 0;
    for (int i = 0; i < count; ++i) {
      const std::int64_t wanted = pace.proposals(1);
      std::int64_t n = 0;
      while (n < wanted) {
        pace.passed(0, 0, 0.3);
        if (!pace.one_more(1, ++n, 0.8)) break;
      }
      pace.passed(1, n, 1 + 0.05 * static_cast<double>(n));
      for (std::int64_t k = 0; k < n && (k == 0 || accepted); ++k) pace.tested(1, 0.8, accepted);
      if (i >= count / 2) proposed += n;
    }
    return proposed;
  };
  EXPECT_GT(passes(200, true), 100);
  EXPECT_LE(passes(2000, false), 30);
  EXPECT_GT(passes(4000, true), 2000);
}

TEST(AdaptivePace, StopsWhereAProposalIsNotSure) {
  AdaptivePace pace({.levels = 2, .most = 8});
  SplitMix64 random(4);
  for (int i = 0; i < 400; ++i) {  // sure ones pass, others do not
    pace.proposals(1);
    pace.passed(0, 0, 0.1);
    pace.passed(1, i % 4 == 0 ? 0 : 2, 1);
    pace.tested(1, 0.95, random.below(20) != 0);
    if (i % 3 == 0) pace.tested(1, 0.1, random.below(10) == 0);
  }
  EXPECT_GT(pace.proposals(1), 1);
  EXPECT_TRUE(pace.one_more(1, 1, 0.95));
  EXPECT_FALSE(pace.one_more(1, 2, 0.1));
  pace.proposals(1);  // the next cycle begins anew
  EXPECT_TRUE(pace.one_more(1, 1, 0.95));
}

TEST(FixedPace, IsFixed) {
  FixedPace pace({1, 6});
  EXPECT_EQ(pace.proposals(1), 1);
  EXPECT_EQ(pace.proposals(2), 6);
  EXPECT_TRUE(pace.one_more(2, 3, 0));
}

}  // namespace
}  // namespace fathom
