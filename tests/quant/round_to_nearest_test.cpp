#include "infer/quant/round_to_nearest.h"

#include <cmath>
#include <limits>
#include <random>
#include <string>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "kernels/cpu/host.h"
#include "kernels/hadamard.h"
#include "tests/quant/layers.h"

namespace fathom::quant_test {
namespace {

double squared_error(const std::vector<float>& w, const QuantizedMatrix& q,
                     std::span<const double> importance = {}) {
  const std::vector<double> v = dequantize<double>(q);
  double sum = 0;
  for (std::size_t i = 0; i < w.size(); ++i) {
    const double h = importance.empty() ? 1.0 : importance[i % static_cast<std::size_t>(q.columns)];
    sum += h * (w[i] - v[i]) * (w[i] - v[i]);
  }
  return sum;
}

TEST(QuantizedMatrix, DequantizesCodesTimesScales) {
  const QuantizedMatrix q{.rows = 2,
                          .columns = 4,
                          .bits = 4,
                          .group = 2,
                          .codes = {-8, 7, 1, 2, 0, -1, 3, -4},
                          .scales = {0.5F, 2, 0.25F, 1}};
  EXPECT_EQ(dequantize<float>(q), (std::vector<float>{-4, 3.5F, 2, 4, 0, -0.25F, 3, -4}));
  EXPECT_EQ(dequantize<double>(q), (std::vector<double>{-4, 3.5, 2, 4, 0, -0.25, 3, -4}));
}

TEST(QuantizedMatrix, RefusesWhatCannotBe) {
  const QuantizedMatrix good{
      .rows = 1, .columns = 4, .bits = 4, .group = 2, .codes = {1, 2, 3, 4}, .scales = {1, 1}};
  check(good);
  QuantizedMatrix q = good;
  q.bits = 3;
  expect_error<UserError>([&] { check(q); }, "Weights of 3 bits are not supported. Choose 4 or 8.");
  q = good, q.group = 3;
  expect_error<UserError>([&] { check(q); }, "Groups of 3 columns do not divide a matrix of 1 x 4.");
  q = good, q.group = 0;
  expect_error<UserError>([&] { check(q); }, "Groups of 0 columns");
  q = good, q.rows = 0;
  expect_error<InternalError>([&] { check(q); }, "a matrix of 0 x 4");
  q = good, q.codes[3] = 8;
  expect_error<InternalError>([&] { check(q); }, "the code at row 0, column 3 is 8, outside -8..7");
  q.bits = 8;
  check(q);
  q = good, q.codes.pop_back();
  expect_error<InternalError>([&] { dequantize<float>(q); }, "3 codes and 2 scales for 1 x 4 in groups of 2");
  q = good, q.scales[1] = std::numeric_limits<float>::infinity();
  expect_error<InternalError>([&] { check(q); }, "the scale at row 0, group 1 is inf");
}

TEST(RoundToNearest, ErrorsSayWhereAndWhatToDo) {
  std::vector<float> w(12, 1.0F);
  w[7] = std::numeric_limits<float>::quiet_NaN();
  expect_error<UserError>([&] { round_to_nearest(w, 3, 4, {}); },
                          "The weight at row 1, column 3 of a matrix of 3 x 4 is nan.");
  w[7] = -std::numeric_limits<float>::infinity();
  expect_error<UserError>([&] { round_to_nearest(w, 3, 4, {}); }, "column 3 of a matrix of 3 x 4 is -inf.");
  w[7] = 1;
  expect_error<UserError>([&] { round_to_nearest(w, 3, 4, {.bits = 5}); }, "Weights of 5 bits");
  expect_error<UserError>([&] { round_to_nearest(w, 3, 4, {.group = 3}); }, "Groups of 3 columns");
  expect_error<InternalError>([&] { round_to_nearest(w, 3, 5, {}); }, "12 weights for 3 x 5");
  expect_error<InternalError>([&] { round_to_nearest(w, 3, 4, {.clip = Clip::Weighted}); },
                              "importance of 0 columns, not of 4");
}

// Every weight has the nearest code of its scale, and without clipping the scale is the largest weight's.
TEST(RoundToNearest, RoundsEachWeightToTheNearestCode) {
  std::mt19937_64 random(1);
  for (int run = 0; run < 30; ++run) {
    const Sizes s = random_sizes(random);
    const std::vector<float> w = random_weights(random, s);
    for (const Clip clip : {Clip::None, Clip::LeastSquares}) {
      const QuantizedMatrix q =
          round_to_nearest(w, s.rows, s.columns, {.bits = s.bits, .group = s.group, .clip = clip});
      check(q);
      ASSERT_EQ(q.group, s.group == 0 ? s.columns : s.group);
      const int least = -(1 << (s.bits - 1)), most = -least - 1;
      for (std::size_t i = 0; i < w.size(); ++i) {
        const std::size_t g = i / static_cast<std::size_t>(q.group);
        const double scale = q.scales[g], error = std::abs(w[i] - scale * q.codes[i]);
        for (const int other : {q.codes[i] - 1, q.codes[i] + 1}) {
          if (other < least || other > most) continue;
          ASSERT_LE(error, std::abs(w[i] - scale * other) * (1 + 1e-12)) << s << " at " << i;
        }
        if (clip == Clip::None) {
          ASSERT_LE(error, 0.5 * scale * (1 + 1e-6)) << s << " at " << i;
          ASSERT_GT(q.codes[i], least);
        }
      }
    }
  }
}

TEST(RoundToNearest, SearchedClipsAreNeverWorseAndAreTheGridsBest) {
  std::mt19937_64 random(2);
  int better = 0;
  for (int run = 0; run < 30; ++run) {
    const Sizes s = random_sizes(random);
    const std::vector<float> w = random_weights(random, s);
    std::vector<double> importance(static_cast<std::size_t>(s.columns));
    for (double& h : importance) h = std::exp(std::normal_distribution<double>()(random));
    const auto quantized = [&](Clip clip) {
      return round_to_nearest(w, s.rows, s.columns, {.bits = s.bits, .group = s.group, .clip = clip},
                              importance);
    };
    const QuantizedMatrix plain = quantized(Clip::None), searched = quantized(Clip::LeastSquares);
    const QuantizedMatrix weighted = quantized(Clip::Weighted);
    EXPECT_LE(squared_error(w, searched), squared_error(w, plain) * (1 + 1e-12)) << s;
    EXPECT_LE(squared_error(w, weighted, importance), squared_error(w, plain, importance) * (1 + 1e-12)) << s;
    EXPECT_LE(squared_error(w, weighted, importance), squared_error(w, searched, importance) * (1 + 1e-12));
    better += squared_error(w, searched) < squared_error(w, plain) ? 1 : 0;
    // By hand, for the first group.
    const auto group = static_cast<std::size_t>(plain.group);
    double least = std::numeric_limits<double>::infinity();
    for (int step = 7; step <= 64; ++step) {
      const double clip = step == 7 ? 1 - std::pow(2, 1 - s.bits) : step / 64.0;
      const double scale = plain.scales[0] * clip, bottom = -std::pow(2, s.bits - 1);
      double sum = 0;
      for (std::size_t i = 0; i < group; ++i) {
        const double code = std::clamp(std::nearbyint(w[i] / scale), bottom, -bottom - 1);
        sum += (w[i] - scale * code) * (w[i] - scale * code);
      }
      least = std::min(least, sum);
    }
    double found = 0;
    const std::vector<double> v = dequantize<double>(searched);
    for (std::size_t i = 0; i < group; ++i) found += (w[i] - v[i]) * (w[i] - v[i]);
    EXPECT_NEAR(found, least, 1e-5 * least + 1e-12) << s;
  }
  EXPECT_GT(better, 20);
}

// What was quantized once is what quantizing it again gives, the lowest code included.
TEST(RoundToNearest, IsIdempotent) {
  std::mt19937_64 random(3);
  for (int run = 0; run < 20; ++run) {
    const Sizes s = random_sizes(random);
    const WeightFormat format{.bits = s.bits, .group = s.group};
    const std::vector<float> once =
        dequantize<float>(round_to_nearest(random_weights(random, s), s.rows, s.columns, format));
    const std::vector<float> twice = dequantize<float>(round_to_nearest(once, s.rows, s.columns, format));
    for (std::size_t i = 0; i < once.size(); ++i)
      ASSERT_NEAR(twice[i], once[i], 1e-5 * std::abs(once[i])) << s << " at " << i;
  }
}

TEST(RoundToNearest, UsesTheLowestCode) {
  const std::vector<float> w = {-8, 7, 3, -1, 0, 5, -6, 2};
  const QuantizedMatrix q = round_to_nearest(w, 1, 8, {});
  EXPECT_EQ(q.codes, (std::vector<std::int8_t>{-8, 7, 3, -1, 0, 5, -6, 2}));
  EXPECT_EQ(q.scales, std::vector<float>{1});
  const std::vector<float> wide = {-128, 127, 3, 1};
  EXPECT_EQ(round_to_nearest(wide, 1, 4, {.bits = 8}).codes, (std::vector<std::int8_t>{-128, 127, 3, 1}));
}

TEST(RoundToNearest, ZerosAndWhatNoFloatScalesBecomeZeros) {
  constexpr float kLeast = std::numeric_limits<float>::denorm_min();
  const std::vector<float> w = {0, 0, -0.0F, 0, kLeast, -kLeast, 0, 0, 3, 0, -3, 1};
  for (const Clip clip : {Clip::None, Clip::LeastSquares, Clip::Weighted}) {
    const std::vector<double> importance(4, 1.0);
    const QuantizedMatrix q = round_to_nearest(w, 3, 4, {.clip = clip}, importance);
    check(q);
    for (int i = 0; i < 8; ++i) EXPECT_EQ(q.codes[static_cast<std::size_t>(i)], 0);
    EXPECT_EQ(q.scales[0], 1);
    EXPECT_NE(q.codes[8], 0);
  }
}

TEST(RoundToNearest, LargestFloatsStayFinite) {
  constexpr float kMost = std::numeric_limits<float>::max();
  std::vector<float> w = {kMost, -kMost, 1, 0};
  for (const Clip clip : {Clip::None, Clip::LeastSquares}) {
    for (const float v : dequantize<float>(round_to_nearest(w, 1, 4, {.clip = clip})))
      EXPECT_TRUE(std::isfinite(v));
  }
}

// One weight far out takes the steps from all others of its row, or of its group only.
TEST(RoundToNearest, OneOutlierCostsItsGroupOnly) {
  std::mt19937_64 random(4);
  const Sizes s{1, 256, 4, 32};
  std::vector<float> w = random_weights(random, s);
  w[40] = 1000;
  const QuantizedMatrix of_row = round_to_nearest(w, 1, 256, {.clip = Clip::None});
  const QuantizedMatrix of_groups = round_to_nearest(w, 1, 256, {.group = 32, .clip = Clip::None});
  for (std::size_t i = 0; i < 256; ++i) {
    EXPECT_EQ(of_row.codes[i], i == 40 ? 7 : 0);
    if (i / 32 == 1) {
      EXPECT_EQ(of_groups.codes[i], i == 40 ? 7 : 0);
    }
  }
  EXPECT_LT(squared_error(w, of_groups), 0.3 * squared_error(w, of_row));
  EXPECT_LE(squared_error(w, round_to_nearest(w, 1, 256, {})), squared_error(w, of_row));
}

TEST(RoundToNearest, WeightsOfUnimportantColumnsAreClipped) {
  std::mt19937_64 random(5);
  std::vector<float> w = random_weights(random, {1, 64, 4, 0});
  w[9] = 12;
  std::vector<double> importance(64, 1.0);
  importance[9] = 0;
  const QuantizedMatrix q = round_to_nearest(w, 1, 64, {.clip = Clip::Weighted}, importance);
  EXPECT_LT(q.scales[0], 0.5 * 12 / 7);
  const std::vector<double> none(64, 0.0);
  EXPECT_EQ(round_to_nearest(w, 1, 64, {.clip = Clip::Weighted}, none).scales,
            round_to_nearest(w, 1, 64, {}).scales);
}

TEST(RoundToNearest, ThreadsChangeNothing) {
  std::mt19937_64 random(6);
  const Sizes s{300, 192, 4, 64};
  const std::vector<float> w = random_weights(random, s);
  const auto quantized = [&](int threads) {
    const Threads set(threads);
    return round_to_nearest(w, s.rows, s.columns, {.group = s.group});
  };
  const QuantizedMatrix one = quantized(1), two = quantized(2);
  EXPECT_EQ(one.codes, two.codes);
  EXPECT_EQ(one.scales, two.scales);
}

// y = W x of activations with a few large channels, where training has made the weights of these channels
// large as well: with both rotated (W Q^T)(Q x) is the same y, and rounding costs far less.
TEST(RoundToNearest, RotationTakesOutliersAway) {
  std::mt19937_64 random(7);
  std::normal_distribution<double> normal;
  for (const std::int64_t columns : {64, 96, 256}) {
    const std::int64_t rows = 24;
    const auto n = static_cast<std::size_t>(columns);
    std::vector<float> w = random_weights(random, {rows, columns, 4, 0});
    for (std::size_t i = 0; i < w.size(); ++i) {
      if (i % n == 5 || i % n == 40) w[i] *= 30;
    }
    std::vector<double> x(n);
    for (double& v : x) v = normal(random);
    const HadamardTransform transform(columns);
    const auto rotated = [&](std::span<const float> of) {
      std::vector<double> v(of.begin(), of.end());
      transform.apply(v);
      return v;
    };
    std::vector<float> turned;
    for (std::size_t r = 0; r < w.size(); r += n) {
      for (const double v : rotated(std::span(w).subspan(r, n))) turned.push_back(static_cast<float>(v));
    }
    std::vector<double> turned_x = x;
    transform.apply(turned_x);
    const auto error = [&](const std::vector<float>& weights, const std::vector<double>& input) {
      const std::vector<double> q = dequantize<double>(round_to_nearest(weights, rows, columns, {}));
      double sum = 0;
      for (std::size_t r = 0; r < weights.size(); r += n) {
        double difference = 0;
        for (std::size_t i = 0; i < n; ++i) difference += (weights[r + i] - q[r + i]) * input[i];
        sum += difference * difference;
      }
      return sum;
    };
    EXPECT_LT(error(turned, turned_x), 0.5 * error(w, x)) << columns;
  }
}

}  // namespace
}  // namespace fathom::quant_test
