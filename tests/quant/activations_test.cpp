#include "infer/quant/activations.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "tests/quant/layers.h"

namespace fathom::quant_test {
namespace {

constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kLeast = std::numeric_limits<float>::denorm_min();

struct Symmetric {
  float scale = 0;
  std::vector<std::int8_t> codes;
  std::vector<float> decoded;
};

Symmetric symmetric(const std::vector<float>& x, const ActivationFormat& format) {
  Symmetric s{0, std::vector<std::int8_t>(x.size()), std::vector<float>(x.size())};
  s.scale = encode_symmetric(x, format, s.codes);
  decode_symmetric(s.codes, s.scale, s.decoded);
  return s;
}

struct Asymmetric {
  std::vector<AffineScale> scales;
  std::vector<std::uint8_t> codes;
  std::vector<float> decoded;
};

Asymmetric asymmetric(const std::vector<float>& x, std::int64_t group, const ActivationFormat& format) {
  Asymmetric a{std::vector<AffineScale>(x.size() / static_cast<std::size_t>(group)),
               std::vector<std::uint8_t>(x.size()), std::vector<float>(x.size())};
  encode_asymmetric(x, group, format, a.codes, a.scales);
  decode_asymmetric(a.codes, group, a.scales, a.decoded);
  return a;
}

std::vector<float> row(std::mt19937_64& random, std::int64_t n, double mean = 0) {
  std::normal_distribution<double> normal(mean);
  std::vector<float> x;
  for (std::int64_t i = 0; i < n; ++i) x.push_back(static_cast<float>(normal(random)));
  return x;
}

double largest(const std::vector<float>& x) {
  double most = 0;
  for (const float v : x) most = std::max<double>(most, std::abs(v));
  return most;
}

TEST(SymmetricActivations, KnownRow) {
  const Symmetric s = symmetric({7, -7, 3.5F, 2.5F, 0.4F, 0}, {.bits = 4, .clip = 1});
  EXPECT_EQ(s.scale, 1);
  EXPECT_EQ(s.codes, (std::vector<std::int8_t>{7, -7, 4, 2, 0, 0}));  // ties to even
  const Symmetric clipped = symmetric({7, -7, 3.5F, 1, 0, 0}, {.bits = 4, .clip = 0.5});
  EXPECT_EQ(clipped.codes, (std::vector<std::int8_t>{7, -8, 7, 2, 0, 0}));
}

TEST(SymmetricActivations, AreWithinHalfAStepUnlessClipped) {
  std::mt19937_64 random(1);
  for (int run = 0; run < 60; ++run) {
    const ActivationFormat format{.bits = run % 2 == 0 ? 4 : 8, .clip = run % 3 == 0 ? 1 : 0.9};
    const std::vector<float> x = row(random, between(random, 1, 300));
    const Symmetric s = symmetric(x, format);
    const double most = std::pow(2, format.bits - 1) - 1;
    ASSERT_NEAR(s.scale, format.clip * largest(x) / most, 1e-6 * s.scale);
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (std::abs(x[i]) <= s.scale * most) {
        ASSERT_LE(std::abs(s.decoded[i] - x[i]), 0.5 * s.scale * (1 + 1e-5)) << i;
      } else {
        ASSERT_EQ(s.codes[i], x[i] > 0 ? most : std::max<double>(-most - 1, std::nearbyint(x[i] / s.scale)))
            << i;
      }
    }
    // What it gives stands still, and a power of two goes through it.
    const Symmetric again = symmetric(s.decoded, {.bits = format.bits, .clip = 1});
    if (*std::min_element(s.codes.begin(), s.codes.end()) > -most - 1) {
      EXPECT_EQ(again.codes, s.codes);
    }
    std::vector<float> twice = x;
    for (float& v : twice) v *= 2;
    EXPECT_EQ(symmetric(twice, format).codes, s.codes);
    EXPECT_EQ(symmetric(twice, format).scale, 2 * s.scale);
  }
}

TEST(SymmetricActivations, ZerosOutliersAndExtremes) {
  for (const int bits : {4, 8}) {
    for (const std::vector<float>& x : {std::vector<float>(9), std::vector<float>{kLeast, -kLeast, 0}}) {
      const Symmetric zeros = symmetric(x, {.bits = bits});
      EXPECT_EQ(zeros.scale, 1);
      EXPECT_EQ(zeros.codes, std::vector<std::int8_t>(x.size()));
      EXPECT_EQ(zeros.decoded, std::vector<float>(x.size()));
    }
    for (const float outlier : {1e6F, -1e30F, kLargest, -kLargest}) {
      for (const double clip : {0.9, 1.0}) {
        const Symmetric s = symmetric({1, outlier, -2, 0.5F}, {.bits = bits, .clip = clip});
        EXPECT_EQ(s.decoded[0], 0);
        EXPECT_EQ(s.decoded[2], 0);
        EXPECT_TRUE(std::isfinite(s.decoded[1]));
        EXPECT_NEAR(s.decoded[1] / outlier, clip, 0.2);
      }
    }
  }
  EXPECT_TRUE(symmetric({}, {}).codes.empty());
}

TEST(AsymmetricActivations, KnownGroups) {
  const Asymmetric a = asymmetric({0, 15, 7, 8.5F, 3, 3, 3, 3, -3, 0, 12, 4}, 4, {.bits = 4, .clip = 1});
  EXPECT_EQ(a.codes, (std::vector<std::uint8_t>{0, 15, 7, 8, 0, 0, 0, 0, 0, 3, 15, 7}));
  EXPECT_EQ(a.decoded, (std::vector<float>{0, 15, 7, 8, 3, 3, 3, 3, -3, 0, 12, 4}));
}

TEST(AsymmetricActivations, AreWithinHalfAStepUnlessClipped) {
  std::mt19937_64 random(2);
  for (int run = 0; run < 60; ++run) {
    const ActivationFormat format{.bits = run % 2 == 0 ? 4 : 8, .clip = run % 3 == 0 ? 1 : 0.95};
    const std::int64_t group = between(random, 2, 128), groups = between(random, 1, 5);
    const std::vector<float> x = row(random, group * groups, run % 4 == 0 ? 10 : 0);
    const Asymmetric a = asymmetric(x, group, format);
    const double levels = std::pow(2, format.bits) - 1;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const std::size_t g = i / static_cast<std::size_t>(group);
      const auto first = x.begin() + static_cast<std::ptrdiff_t>(g) * group;
      const double min = *std::min_element(first, first + group),
                   max = *std::max_element(first, first + group);
      const double scale = a.scales[g].scale, low = a.scales[g].low;
      ASSERT_NEAR(scale, format.clip * (max - min) / levels, 1e-5 * scale);
      ASSERT_NEAR(low + scale * levels / 2, (min + max) / 2, 1e-5 * (std::abs(low) + scale * levels));
      const double inside = std::clamp<double>(x[i], low, low + scale * levels);
      ASSERT_LE(std::abs(a.decoded[i] - inside), 0.5 * scale * (1 + 1e-3)) << i;
    }
  }
}

// Other groups are not touched by one's outlier, and a shift changes nothing.
TEST(AsymmetricActivations, GroupsStandForThemselves) {
  std::mt19937_64 random(3);
  std::vector<float> x = row(random, 96);
  for (float& v : x) v = std::nearbyint(64 * v) / 64;  // so that sums are exact
  const Asymmetric before = asymmetric(x, 32, {.bits = 4, .clip = 1});
  std::vector<float> shifted = x;
  for (float& v : shifted) v += 8;
  EXPECT_EQ(asymmetric(shifted, 32, {.bits = 4, .clip = 1}).codes, before.codes);
  x[40] = 1e20F;
  const Asymmetric after = asymmetric(x, 32, {.bits = 4, .clip = 1});
  for (std::size_t i = 0; i < 96; ++i) {
    if (i / 32 != 1) {
      EXPECT_EQ(after.decoded[i], before.decoded[i]);
    }
  }
  EXPECT_EQ(after.codes[40], 15);
}

TEST(AsymmetricActivations, EqualElementsAreExactAndExtremesFinite) {
  for (const int bits : {4, 8}) {
    for (const float value : {0.0F, -0.1F, kLeast, 1e30F, kLargest, -kLargest}) {
      const std::vector<float> x(16, value);
      const Asymmetric a = asymmetric(x, 8, {.bits = bits, .clip = 0.95});
      EXPECT_EQ(a.decoded, x) << value;
      EXPECT_EQ(a.scales[1].scale, 1);
      EXPECT_EQ(a.codes, std::vector<std::uint8_t>(16));
    }
    const Asymmetric widest = asymmetric({kLargest, -kLargest, 0, 1}, 4, {.bits = bits, .clip = 1});
    for (const float v : widest.decoded) EXPECT_TRUE(std::isfinite(v)) << v;
    EXPECT_NEAR(widest.decoded[0] / kLargest, 1, 1e-6);
    EXPECT_NEAR(widest.decoded[1] / kLargest, -1, 1e-6);
    EXPECT_EQ(asymmetric({0, kLeast, 0, -kLeast}, 4, {.bits = bits}).scales[0].scale, 1);
  }
}

TEST(Activations, RefuseWhatCannotBe) {
  std::vector<float> x(8, 1.0F);
  std::vector<std::int8_t> codes(8);
  std::vector<std::uint8_t> unsigned_codes(8);
  std::vector<AffineScale> scales(2);
  expect_error<UserError>([&] { encode_symmetric(x, {.bits = 6}, codes); }, "Activations of 6 bits");
  for (const double clip : {0.0, -1.0, 1.5, std::nan("")})
    expect_error<UserError>([&] { encode_symmetric(x, {.clip = clip}, codes); }, "Choose a share above 0");
  expect_error<InternalError>([&] { encode_symmetric(x, {}, std::span(codes).first(7)); },
                              "8 elements and 7 codes");
  expect_error<InternalError>([&] { encode_asymmetric(x, 3, {}, unsigned_codes, scales); },
                              "2 scales for 8 elements in groups of 3");
  expect_error<InternalError>([&] { encode_asymmetric(x, 2, {}, unsigned_codes, scales); },
                              "2 scales for 8 elements in groups of 2");
  expect_error<InternalError>([&] { decode_asymmetric(unsigned_codes, 0, scales, x); }, "in groups of 0");
  x[5] = std::nanf("");
  expect_error<InternalError>([&] { encode_symmetric(x, {}, codes); }, "element 5 of 8 is nan");
  expect_error<InternalError>([&] { encode_asymmetric(x, 4, {}, unsigned_codes, scales); },
                              "element 5 of 8 is nan");
}

}  // namespace
}  // namespace fathom::quant_test
