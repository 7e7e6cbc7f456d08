#include <cmath>
#include <random>

#include <gtest/gtest.h>

#include "kernels/hadamard.h"

namespace fathom {
namespace {

TEST(Hadamard, RowsAreOrthogonal) {
  int found = 0;
  for (std::int64_t n = 1; n <= 200; ++n) {
    const std::vector<std::int8_t> h = hadamard_matrix(n);
    if (h.empty()) continue;
    ++found;
    ASSERT_EQ(h.size(), static_cast<std::size_t>(n * n)) << n;
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j <= i; ++j) {
        std::int64_t sum = 0;
        for (std::int64_t k = 0; k < n; ++k)
          sum += h[static_cast<std::size_t>(i * n + k)] * h[static_cast<std::size_t>(j * n + k)];
        ASSERT_EQ(sum, i == j ? n : 0) << n << " rows " << i << " and " << j;
      }
    }
  }
  EXPECT_EQ(found, 36);
}

// Whole transforms for what models' widths are made of; blocks for what has none.
TEST(Hadamard, SizesHaveTheirBlocks) {
  for (const std::int64_t n :
       {1, 2, 12, 20, 28, 36, 40, 52, 60, 108, 140, 156, 172, 96, 768, 1024, 2048, 2816, 5632, 14336})
    EXPECT_EQ(HadamardTransform(n).block(), n) << n;
  EXPECT_EQ(HadamardTransform(768).factor(), 12);
  EXPECT_EQ(HadamardTransform(5632).factor(), 44);
  EXPECT_EQ(HadamardTransform(2048).factor(), 1);
  EXPECT_EQ(HadamardTransform(6).block(), 2);
  EXPECT_EQ(HadamardTransform(7).block(), 1);
  EXPECT_EQ(HadamardTransform(11008).factor(), 172);
  EXPECT_EQ(HadamardTransform(92 * 8).factor(), 368);  // none of 92 here, but of four times that
  EXPECT_EQ(HadamardTransform(107 * 128).block(), 128);
}

TEST(Hadamard, TransformsKeepLengthsAndAnglesAndSpreadOneElementEvenly) {
  std::mt19937_64 random(5);
  std::normal_distribution<double> normal;
  for (const std::int64_t n : {1, 6, 12, 56, 104, 768, 1280, 2816}) {
    const HadamardTransform transform(n);
    std::vector<double> x(static_cast<std::size_t>(n)), y(x.size());
    for (double& v : x) v = normal(random);
    for (double& v : y) v = normal(random);
    double before = 0, after = 0;
    for (std::size_t i = 0; i < x.size(); ++i) before += x[i] * y[i];
    transform.apply(x), transform.apply(y);
    for (std::size_t i = 0; i < x.size(); ++i) after += x[i] * y[i];
    EXPECT_NEAR(after, before, 1e-11 * static_cast<double>(n)) << n;

    std::vector<double> one(static_cast<std::size_t>(n), 0.0);
    one[static_cast<std::size_t>(n / 2)] = 1;
    transform.apply(one);
    const double each = 1 / std::sqrt(static_cast<double>(transform.block()));
    for (std::int64_t i = 0; i < n; ++i) {
      const bool same_block = i / transform.block() == n / 2 / transform.block();
      EXPECT_NEAR(std::abs(one[static_cast<std::size_t>(i)]), same_block ? each : 0, 1e-14)
          << n << " at " << i;
    }
  }
}

}  // namespace
}  // namespace fathom
