// Hessians, their factors, and the product that both are made of, against plain loops.
#include "infer/quant/hessian.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include <gtest/gtest.h>

#include "infer/quant/block_product.h"
#include "infer/quant/inverse_cholesky.h"
#include "infer/quant/round_to_nearest.h"
#include "tests/kernels/cpu_backends.h"
#include "tests/quant/layers.h"

namespace fathom::quant_test {
namespace {

using testing_support::ChosenIsa;
using testing_support::isas;

std::vector<double> normal(std::mt19937_64& random, std::int64_t n) {
  std::normal_distribution<double> distribution;
  std::vector<double> v(static_cast<std::size_t>(n));
  for (double& x : v) x = distribution(random);
  return v;
}

TEST(BlockProduct, EqualsLoopsAndDoesNotDependOnTiles) {
  std::mt19937_64 random(1);
  for (int run = 0; run < 21; ++run) {
    const ChosenIsa isa(isas()[static_cast<std::size_t>(run) % isas().size()]);
    const std::int64_t m = between(random, 1, 20), n = between(random, 1, 40), k = between(random, 1, 300);
    const std::vector<double> a = normal(random, k * m), b = normal(random, k * n), c = normal(random, m * n);
    const Sign sign = run % 2 == 0 ? Sign::Add : Sign::Subtract;
    std::vector<double> whole = c, tiled = c;
    block_product(sign, whole.data(), n, a.data(), m, b.data(), n, m, n, k);
    for (std::int64_t i = 0; i < m; ++i) {
      for (std::int64_t j = 0; j < n; ++j) {
        double sum = 0;
        for (std::int64_t t = 0; t < k; ++t)
          sum += a[static_cast<std::size_t>(t * m + i)] * b[static_cast<std::size_t>(t * n + j)];
        const auto at = static_cast<std::size_t>(i * n + j);
        ASSERT_NEAR(whole[at], c[at] + (sign == Sign::Add ? sum : -sum), 1e-11);
      }
    }
    const std::int64_t rows = between(random, 1, m), columns = between(random, 1, n);
    for (std::int64_t i = 0; i < m; i += rows) {
      for (std::int64_t j = 0; j < n; j += columns)
        block_product(sign, tiled.data() + i * n + j, n, a.data() + i, m, b.data() + j, n,
                      std::min(rows, m - i), std::min(columns, n - j), k);
    }
    ASSERT_EQ(tiled, whole);
  }
}

TEST(Hessian, SumsTokensSquares) {
  std::mt19937_64 random(2);
  for (const std::int64_t n : {1, 7, 130}) {
    const std::int64_t tokens = 150;
    const std::vector<float> x = random_inputs(random, tokens, n);
    std::vector<float> gates;
    for (const double g : normal(random, tokens)) gates.push_back(static_cast<float>(g));
    for (const bool gated : {false, true}) {
      Hessian h(n);
      h.add(x, gated ? std::span<const float>(gates) : std::span<const float>{});
      EXPECT_EQ(h.tokens(), tokens);
      for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j < n; ++j) {
          double sum = 0, size = 0;
          for (std::int64_t t = 0; t < tokens; ++t) {
            const double g = gated ? gates[static_cast<std::size_t>(t)] : 1.0;
            const double term = g * g * x[static_cast<std::size_t>(t * n + i)] *
                                static_cast<double>(x[static_cast<std::size_t>(t * n + j)]);
            sum += term, size += std::abs(term);
          }
          ASSERT_NEAR(h.at(i, j), sum, 1e-13 * size);
          ASSERT_EQ(h.at(i, j), h.at(j, i));
        }
        EXPECT_EQ(h.diagonal()[static_cast<std::size_t>(i)], h.at(i, i));
      }
    }
  }
}

TEST(Hessian, PartsAndThreadsGiveTheSameSum) {
  std::mt19937_64 random(3);
  const std::int64_t n = 150, tokens = 400;
  const std::vector<float> x = random_inputs(random, tokens, n);
  const auto sum_of = [&](const Hessian& h) {
    std::vector<double> all;
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < n; ++j) all.push_back(h.at(i, j));
    }
    return all;
  };
  Hessian whole(n), parts(n), first(n), second(n), threaded(n);
  whole.add(x);
  const std::span<const float> rows(x);
  const auto some = static_cast<std::size_t>(256 * n);
  parts.add(rows.first(some)), parts.add(rows.subspan(some)), parts.add({});
  first.add(rows.first(some)), second.add(rows.subspan(some));
  first.merge(second);
  {
    const Threads two(2);
    threaded.add(x);
  }
  EXPECT_EQ(sum_of(parts), sum_of(whole));
  EXPECT_EQ(sum_of(threaded), sum_of(whole));
  EXPECT_EQ(parts.tokens(), tokens);
  EXPECT_EQ(first.tokens(), tokens);
  const std::vector<double> merged = sum_of(first), all = sum_of(whole);
  for (std::size_t i = 0; i < all.size(); ++i) ASSERT_NEAR(merged[i], all[i], 1e-10 * (1 + std::abs(all[i])));
  // What was summed elsewhere, in fp32.
  const std::vector<float> elsewhere(all.begin(), all.end());
  Hessian added(n);
  {
    const Threads two(2);
    added.add_sum(elsewhere, 5);
    added.add_sum(elsewhere, 6);
  }
  EXPECT_EQ(added.tokens(), 11);
  std::vector<double> twice;
  for (const float x_of_h : elsewhere) twice.push_back(2 * static_cast<double>(x_of_h));
  EXPECT_EQ(sum_of(added), twice);
  // As one that was stored comes back.
  EXPECT_EQ(sum_of(Hessian(n, all, tokens)), all);
}

TEST(Hessian, RefusesOtherSizes) {
  Hessian h(4);
  const std::vector<float> x(8, 1.0F), gates(3, 1.0F);
  expect_error<InternalError>([&] { h.add(std::span(x).first(7)); }, "7 inputs and 0 gates for 4 columns");
  expect_error<InternalError>([&] { h.add(x, gates); }, "8 inputs and 3 gates for 4 columns");
  expect_error<InternalError>([&] { h.merge(Hessian(5)); }, "4 and 5 columns");
  expect_error<InternalError>([&] { h.add_sum(x, 1); }, "8 elements for 4 columns");
  expect_error<InternalError>([] { Hessian(0); }, "0 columns");
  expect_error<InternalError>([] { Hessian(3, std::vector<double>(8), 1); }, "8 elements for 3 columns");
}

// What the layer's outputs lose, token by token.
TEST(QuantizationLoss, IsTheOutputsSquaredError) {
  std::mt19937_64 random(4);
  const Sizes s{37, 48, 4, 16};
  const std::int64_t tokens = 60;
  const std::vector<float> w = random_weights(random, s), x = random_inputs(random, tokens, s.columns);
  const QuantizedMatrix q = round_to_nearest(w, s.rows, s.columns, {.group = s.group});
  const std::vector<double> v = dequantize<double>(q);
  Hessian h(s.columns);
  h.add(x);
  double loss = 0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t r = 0; r < s.rows; ++r) {
      double y = 0;
      for (std::int64_t c = 0; c < s.columns; ++c) {
        const auto i = static_cast<std::size_t>(r * s.columns + c);
        y += (w[i] - v[i]) * x[static_cast<std::size_t>(t * s.columns + c)];
      }
      loss += y * y;
    }
  }
  EXPECT_NEAR(quantization_loss(w, q, h), loss, 1e-9 * loss);
  QuantizedMatrix zeros = q;
  std::fill(zeros.codes.begin(), zeros.codes.end(), std::int8_t{0});
  const double all = quantization_loss(w, zeros, h);
  EXPECT_NEAR(relative_loss(w, q, h), loss / all, 1e-9 * loss / all);
  EXPECT_EQ(relative_loss(std::vector<float>(w.size()), zeros, h), 0);
  expect_error<InternalError>([&] { quantization_loss(w, q, Hessian(3)); }, "a Hessian of 3, 37 x 48");
}

// U A U^T is 1, U is triangular, and any number of threads gives it.
TEST(InverseCholesky, IsTheInversesFactor) {
  std::mt19937_64 random(5);
  for (const std::int64_t n : {1, 2, 63, 64, 65, 130, 200}) {
    const std::vector<double> half = normal(random, n * n);
    std::vector<double> a(half.size());
    block_product(Sign::Add, a.data(), n, half.data(), n, half.data(), n, n, n, n);
    const auto at = [n](std::int64_t i, std::int64_t j) { return static_cast<std::size_t>(i * n + j); };
    for (std::int64_t i = 0; i < n; ++i) a[at(i, i)] += 1;
    std::vector<double> u = a, threaded = a;
    ASSERT_TRUE(inverse_cholesky(u, n));
    {
      const Threads two(2);
      ASSERT_TRUE(inverse_cholesky(threaded, n));
    }
    EXPECT_EQ(threaded, u);
    std::vector<double> turned(u.size()), right(u.size()), product(u.size());  // right = A U^T
    for (std::int64_t i = 0; i < n; ++i) {
      EXPECT_GT(u[at(i, i)], 0);
      for (std::int64_t j = 0; j < n; ++j) {
        turned[at(j, i)] = u[at(i, j)];
        if (j < i) {
          EXPECT_EQ(u[at(i, j)], 0);
        }
      }
    }
    block_product(Sign::Add, right.data(), n, a.data(), n, turned.data(), n, n, n, n);
    block_product(Sign::Add, product.data(), n, turned.data(), n, right.data(), n, n, n, n);
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < n; ++j) ASSERT_NEAR(product[at(i, j)], i == j ? 1 : 0, 1e-9) << n;
    }
  }
}

TEST(InverseCholesky, RefusesWhatIsNotPositiveDefinite) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  std::vector<double> a = {1, 2, 2, 1};
  EXPECT_FALSE(inverse_cholesky(a, 2));
  a = {0, 0, 0, 1};
  EXPECT_FALSE(inverse_cholesky(a, 2));
  a = {1, kNaN, kNaN, 1};
  EXPECT_FALSE(inverse_cholesky(a, 2));
  expect_error<InternalError>([&] { inverse_cholesky(a, 3); }, "4 elements for 3 x 3");
}

}  // namespace
}  // namespace fathom::quant_test
