// Choosing the next token, against distributions that are known.
#include "infer/sampling.h"

#include <cmath>
#include <functional>
#include <numeric>
#include <random>
#include <set>

#include <gtest/gtest.h>

#include "infer/logit_scan.h"
#include "kernels/error.h"

namespace fathom {
namespace {

using Logits = std::vector<float>;

/// Softmax of logits / temperature.
std::vector<double> probabilities(const Logits& logits, double temperature = 1.0) {
  std::vector<double> p;
  for (float x : logits) p.push_back(std::exp(static_cast<double>(x) / temperature));
  const double total = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& x : p) x /= total;
  return p;
}

/// How often each token came.
std::vector<double> shares(const Logits& logits, int draws,
                           const std::function<SampledToken(std::uint64_t)>& draw) {
  std::vector<double> counts(logits.size(), 0.0);
  for (int i = 0; i < draws; ++i)
    counts.at(static_cast<std::size_t>(draw(static_cast<std::uint64_t>(i)).id)) += 1;
  for (double& x : counts) x /= draws;
  return counts;
}

/// Pearson's chi-squared over the tokens that can come; others must not have come.
double chi_squared(const std::vector<double>& shares, const std::vector<double>& expected, int draws) {
  double sum = 0;
  for (std::size_t i = 0; i < shares.size(); ++i) {
    if (expected[i] == 0) {
      EXPECT_EQ(shares[i], 0) << "token " << i;
    } else {
      sum += draws * (shares[i] - expected[i]) * (shares[i] - expected[i]) / expected[i];
    }
  }
  return sum;
}

const Logits kLogits = {0.5F, -1.0F, 2.0F, 0.0F, 1.25F, -3.0F};
constexpr int kDraws = 20000;
constexpr double kUnlikely = 25.7;  // chi-squared of 5 degrees of freedom: one in ten thousand

TEST(Sampling, TemperatureZeroIsTheMostLikelyAndTiesGoToTheLowerId) {
  for (std::uint64_t position = 0; position < 50; ++position) {
    EXPECT_EQ(sample(kLogits, {.temperature = 0, .seed = position}, position).id, 2);
    EXPECT_EQ(sample(Logits{1, 3, 2, 3, 3}, {.temperature = 0, .seed = position}, position).id, 1);
    EXPECT_EQ(sample(Logits{7, 7}, {.temperature = 0}, position).id, 0);
  }
  EXPECT_EQ(sample(Logits{-5}, {.temperature = 0}, 0).id, 0);
}

// A bias on an id that there is not takes the way of those who have one.
TEST(Sampling, TemperatureZeroIsTheSameWithAndWithoutAPassForBiases) {
  std::mt19937 r(11);
  std::normal_distribution<float> normal(0, 3);
  for (const std::size_t vocab : {1U, 2U, 15U, 16U, 17U, 31U, 1003U}) {
    for (int turn = 0; turn < 50; ++turn) {
      Logits logits(vocab);
      for (float& x : logits) x = turn % 3 == 0 ? std::round(normal(r)) : normal(r);  // ties, too
      if (turn % 5 == 0 && vocab > 1) logits[r() % vocab] = -INFINITY;
      const SampledToken fast = sample(logits, {.temperature = 0}, 5);
      const SampledToken slow = sample(logits, {.temperature = 0, .logit_bias = {{-1, 1.0}}}, 5);
      EXPECT_EQ(fast.id, slow.id);
      EXPECT_EQ(fast.logprob, slow.logprob);
      const double exact = std::exp(fast.logprob);
      EXPECT_NEAR(rough_share(logits, fast.id), exact, 0.01 * exact);
      const auto other = static_cast<std::int32_t>(r() % vocab);
      const double of_other = std::exp(logprob_of(logits, other, 5));
      if (of_other > 0) {
        EXPECT_NEAR(rough_share(logits, other), of_other, 0.01 * of_other);
      }
    }
  }
  EXPECT_NEAR(rough_share(Logits{1000, 0, -INFINITY}, 0), 1, 0.01);
  EXPECT_LT(rough_share(Logits{1000, 0, -INFINITY}, 1), 1e-30);
}

TEST(Sampling, LogprobIsBeforeTemperatureAndTopP) {
  const std::vector<double> p = probabilities(kLogits);
  for (const SamplingOptions& options :
       {SamplingOptions{.temperature = 0}, SamplingOptions{.temperature = 1},
        SamplingOptions{.temperature = 3}, SamplingOptions{.temperature = 0.7, .top_p = 0.5}}) {
    for (std::uint64_t position = 0; position < 20; ++position) {
      const SampledToken token = sample(kLogits, options, position);
      EXPECT_NEAR(token.logprob, std::log(p.at(static_cast<std::size_t>(token.id))), 1e-9);
    }
  }
}

TEST(Sampling, DrawsTheSoftmaxAtEveryTemperature) {
  for (const double temperature : {0.5, 1.0, 2.0}) {
    const SamplingOptions options{.temperature = temperature, .seed = 3};
    const auto got = shares(kLogits, kDraws, [&](std::uint64_t i) { return sample(kLogits, options, i); });
    EXPECT_LT(chi_squared(got, probabilities(kLogits, temperature), kDraws), kUnlikely) << temperature;
  }
}

TEST(Sampling, DrawsTheSoftmaxOverSeedsToo) {
  const auto got = shares(kLogits, kDraws,
                          [](std::uint64_t i) { return sample(kLogits, {.temperature = 1, .seed = i}, 17); });
  EXPECT_LT(chi_squared(got, probabilities(kLogits), kDraws), kUnlikely);
}

TEST(Sampling, NextDrawsDoNotFollowFromThisOne) {
  const Logits even = {0, 0};
  int same = 0;
  for (std::uint64_t i = 0; i < 10000; ++i) {
    const SamplingOptions options{.temperature = 1, .seed = 1};
    same += sample(even, options, i).id == sample(even, options, i + 1).id;
  }
  EXPECT_NEAR(same, 5000, 250);
}

TEST(Sampling, TopPKeepsTheSmallestSetThatHoldsIt) {
  const Logits logits = {std::log(0.1F), std::log(0.4F), std::log(0.2F), std::log(0.3F)};
  const std::pair<double, std::vector<double>> cases[] = {
      {0.0, {0, 1, 0, 0}},
      {0.39, {0, 1, 0, 0}},
      {0.41, {0, 4.0 / 7, 0, 3.0 / 7}},
      {0.69, {0, 4.0 / 7, 0, 3.0 / 7}},
      {0.75, {0, 4.0 / 9, 2.0 / 9, 3.0 / 9}},
      {0.95, {0.1, 0.4, 0.2, 0.3}},
      {1.0, {0.1, 0.4, 0.2, 0.3}},
  };
  for (const auto& [top_p, expected] : cases) {
    const SamplingOptions options{.temperature = 1, .top_p = top_p, .seed = 9};
    const auto got = shares(logits, kDraws, [&](std::uint64_t i) { return sample(logits, options, i); });
    EXPECT_LT(chi_squared(got, expected, kDraws), kUnlikely) << "top_p " << top_p;
  }
}

TEST(Sampling, TopPOfEqualTokensKeepsTheLowerIds) {
  for (std::uint64_t i = 0; i < 200; ++i) {
    EXPECT_LT(sample(Logits(8, 1.0F), {.temperature = 1, .top_p = 0.5}, i).id, 4);
  }
}

// The set is chosen after temperature: a hot distribution needs more tokens for the same share.
TEST(Sampling, TopPIsTakenAfterTemperature) {
  const Logits logits = {3, 2, 1, 0};
  const auto kinds = [&](double temperature) {
    std::set<std::int32_t> ids;
    for (std::uint64_t i = 0; i < 2000; ++i) {
      ids.insert(sample(logits, {.temperature = temperature, .top_p = 0.6}, i).id);
    }
    return ids.size();
  };
  EXPECT_EQ(kinds(0.5), 1U);
  EXPECT_EQ(kinds(10), 3U);
}

TEST(Sampling, IsAPureFunctionOfSeedAndPosition) {
  const Logits logits(1000, 0.0F);
  std::set<std::int32_t> by_seed, by_position;
  for (std::uint64_t i = 0; i < 20; ++i) {
    const SamplingOptions options{.temperature = 1, .seed = i};
    EXPECT_EQ(sample(logits, options, 5).id, sample(logits, options, 5).id);
    by_seed.insert(sample(logits, options, 5).id);
    by_position.insert(sample(logits, {.temperature = 1, .seed = 4}, i).id);
  }
  EXPECT_GT(by_seed.size(), 15U);
  EXPECT_GT(by_position.size(), 15U);
}

TEST(Sampling, ExtremeLogits) {
  EXPECT_EQ(sample(Logits{-1e30F, 1e30F, 0}, {.temperature = 1}, 3).id, 1);
  EXPECT_EQ(sample(Logits{-INFINITY, -INFINITY, 4}, {.temperature = 5}, 3).id, 2);
  EXPECT_DOUBLE_EQ(sample(Logits{-INFINITY, 4}, {.temperature = 1}, 3).logprob, 0.0);
  EXPECT_EQ(sample(kLogits, {.temperature = 1e-6}, 3).id, 2);
}

TEST(Sampling, RefusesLogitsThatAreNoNumbers) {
  for (const Logits& logits :
       {Logits{NAN, 1, 2}, Logits{1, 2, NAN}, Logits{1, INFINITY}, Logits{-INFINITY, -INFINITY}}) {
    for (const double temperature : {0.0, 1.0}) {
      try {
        sample(logits, {.temperature = temperature}, 41);
        ADD_FAILURE() << "no error";
      } catch (const UserError& e) {
        const std::string text = e.what();
        for (const char* word : {"not finite", "token 41", "checkpoint"}) {
          EXPECT_NE(text.find(word), std::string::npos) << text << " lacks " << word;
        }
      }
    }
  }
}

TEST(Uniform, IsInTheHalfOpenUnitIntervalAndEven) {
  double sum = 0, squares = 0;
  for (std::uint64_t i = 0; i < 100000; ++i) {
    const double u = uniform(2, i);
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    sum += u;
    squares += u * u;
  }
  EXPECT_NEAR(sum / 100000, 0.5, 0.005);
  EXPECT_NEAR(squares / 100000, 1.0 / 3, 0.005);
}

}  // namespace
}  // namespace fathom
