#include "infer/quant/gptq.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>

#include <gtest/gtest.h>

#include "tests/quant/layers.h"

namespace fathom::quant_test {
namespace {

using Matrix = std::vector<std::vector<double>>;

Matrix gauss_jordan(Matrix a) {
  const std::size_t n = a.size();
  Matrix inverse(n, std::vector<double>(n));
  for (std::size_t i = 0; i < n; ++i) inverse[i][i] = 1;
  for (std::size_t c = 0; c < n; ++c) {
    std::size_t pivot = c;
    for (std::size_t i = c; i < n; ++i) {
      if (std::abs(a[i][c]) > std::abs(a[pivot][c])) pivot = i;
    }
    std::swap(a[c], a[pivot]);
    std::swap(inverse[c], inverse[pivot]);
    const double by = 1 / a[c][c];
    for (std::size_t j = 0; j < n; ++j) a[c][j] *= by, inverse[c][j] *= by;
    for (std::size_t i = 0; i < n; ++i) {
      const double times = a[i][c];
      if (i == c || times == 0) continue;
      for (std::size_t j = 0; j < n; ++j) {
        a[i][j] -= times * a[c][j];
        inverse[i][j] -= times * inverse[c][j];
      }
    }
  }
  return inverse;
}

/// As section 3.1 of the paper says it, equations 2 and 3: one column after the other, all later ones updated
/// at once, and the inverse of what is left of H by an elimination step. [rows][columns].
std::vector<double> textbook(const std::vector<float>& w, const Sizes& s, Clip clip, const Hessian& h,
                             const GptqOptions& options) {
  const auto n = static_cast<std::size_t>(s.columns),
             group = s.group == 0 ? n : static_cast<std::size_t>(s.group);
  const std::vector<double> diagonal = h.diagonal();
  double mean = 0, used = 0;
  for (const double d : diagonal) mean += d, used += d > 0 ? 1 : 0;
  mean /= used;
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), 0U);
  if (options.act_order)
    std::stable_sort(order.begin(), order.end(), [&](auto i, auto j) { return diagonal[i] > diagonal[j]; });
  Matrix damped(n, std::vector<double>(n));
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < n; ++j)
      damped[i][j] = h.at(static_cast<std::int64_t>(order[i]), static_cast<std::int64_t>(order[j]));
    if (damped[i][i] == 0) damped[i][i] = mean;
    damped[i][i] += options.damping * mean;
  }
  const Matrix whole_inverse = gauss_jordan(damped);

  const double least = -std::pow(2, s.bits - 1);
  std::vector<double> result(w.size()), weights(w.begin(), w.end());
  std::vector<double> scales(w.size() / group);
  const auto find_scale = [&](std::size_t row, std::size_t g) {
    const std::span<const double> of = std::span(weights).subspan(row * n + g * group, group);
    scales[row * (n / group) + g] = scale_of(of, s.bits, clip, std::span(diagonal).subspan(g * group, group));
  };
  for (std::size_t row = 0; row < static_cast<std::size_t>(s.rows); ++row) {
    for (std::size_t g = 0; g < n / group; ++g) find_scale(row, g);
  }
  Matrix inverse = whole_inverse;
  for (std::size_t c = 0; c < n; ++c) {
    for (std::size_t row = 0; row < static_cast<std::size_t>(s.rows); ++row) {
      const std::size_t column = order[c];
      if (!options.act_order && column % group == 0) find_scale(row, column / group);
      const double scale = scales[row * (n / group) + column / group];
      double& weight = weights[row * n + column];
      const double q = scale * std::clamp(std::nearbyint(weight / scale), least, -least - 1);
      result[row * n + column] = q;
      for (std::size_t k = c + 1; k < n; ++k)
        weights[row * n + order[k]] -= (weight - q) / inverse[c][c] * inverse[c][k];
    }
    for (std::size_t i = c + 1; i < n; ++i) {
      const double times = inverse[i][c] / inverse[c][c];
      for (std::size_t j = c + 1; j < n; ++j) inverse[i][j] -= times * inverse[c][j];
    }
  }
  return result;
}

Hessian hessian_of(std::mt19937_64& random, std::int64_t tokens, std::int64_t columns,
                   const std::vector<std::int64_t>& dead = {}) {
  std::vector<float> x = random_inputs(random, tokens, columns);
  for (const std::int64_t d : dead) {
    for (std::int64_t t = 0; t < tokens; ++t) x[static_cast<std::size_t>(t * columns + d)] = 0;
  }
  Hessian h(columns);
  h.add(x);
  return h;
}

void expect_textbook(const std::vector<float>& w, const Sizes& s, Clip clip, const Hessian& h,
                     const GptqOptions& options) {
  const GptqResult result =
      gptq(w, s.rows, s.columns, {.bits = s.bits, .group = s.group, .clip = clip}, h, options);
  ASSERT_EQ(result.failure, "");
  EXPECT_EQ(result.damping, options.damping);
  const std::vector<double> found = dequantize<double>(result.matrix),
                            right = textbook(w, s, clip, h, options);
  double largest = 0;
  for (const double v : right) largest = std::max(largest, std::abs(v));
  for (std::size_t i = 0; i < right.size(); ++i) {
    ASSERT_NEAR(found[i], right[i], 1e-6 * largest)
        << s << (options.act_order ? ", act order" : "") << ", at " << i;
  }
}

TEST(Gptq, EqualsTheTextbook) {
  std::mt19937_64 random(1);
  for (int run = 0; run < 40; ++run) {
    const Sizes s = random_sizes(random);
    std::vector<std::int64_t> dead;
    if (run % 3 == 0) dead = {0, s.columns / 2};
    const Hessian h =
        hessian_of(random, between(random, s.columns / 2 + 2, 2 * s.columns + 10), s.columns, dead);
    const Clip clip = static_cast<Clip>(run % 3);
    expect_textbook(random_weights(random, s), s, clip, h,
                    {.damping = run % 5 == 0 ? 0.1 : 0.01, .act_order = run % 2 == 1});
  }
}

// Blocks of 128 that end within the matrix, that whole groups fill, and that groups are longer than; more
// rows than are rounded together.
TEST(Gptq, EqualsTheTextbookAcrossBlocks) {
  std::mt19937_64 random(2);
  const Sizes all[] = {{5, 300, 4, 0},   {3, 256, 4, 64},  {4, 250, 4, 50},
                       {8, 320, 8, 160}, {2, 260, 4, 130}, {130, 140, 4, 0}};
  for (const Sizes& s : all) {
    const Hessian h = hessian_of(random, 400, s.columns, {17, 139});
    const std::vector<float> w = random_weights(random, s);
    for (const bool act_order : {false, true})
      expect_textbook(w, s, Clip::None, h, {.damping = 0.01, .act_order = act_order});
  }
}

// What it is for: outputs of correlated inputs.
TEST(Gptq, LosesLessThanRoundingToNearest) {
  std::mt19937_64 random(3);
  double gptq_sum = 0, nearest_sum = 0;
  for (int run = 0; run < 12; ++run) {
    const Sizes s{16, 96, 4, run % 2 == 0 ? 0 : 32};
    const std::vector<float> w = random_weights(random, s);
    const Hessian h = hessian_of(random, 300, s.columns);
    const WeightFormat format{.bits = 4, .group = s.group, .clip = static_cast<Clip>(run % 3)};
    const QuantizedMatrix nearest = round_to_nearest(w, s.rows, s.columns, format, h.diagonal());
    const GptqResult result = gptq(w, s.rows, s.columns, format, h, {.act_order = run % 4 > 1});
    ASSERT_EQ(result.failure, "");
    const double by_gptq = quantization_loss(w, result.matrix, h),
                 by_nearest = quantization_loss(w, nearest, h);
    EXPECT_LT(by_gptq, by_nearest) << run;
    gptq_sum += by_gptq, nearest_sum += by_nearest;
  }
  EXPECT_LT(gptq_sum, 0.5 * nearest_sum);
}

// Inputs that have nothing to do with each other leave nothing to take over.
TEST(Gptq, OfADiagonalHessianIsRoundingToNearest) {
  std::mt19937_64 random(4);
  const Sizes s{9, 200, 4, 40};
  const std::vector<float> w = random_weights(random, s);
  std::vector<double> sum(200 * 200);
  for (std::size_t i = 0; i < 200; ++i) sum[i * 201] = static_cast<double>(i % 7);  // some never used
  const Hessian h(200, sum, 50);
  for (const bool act_order : {false, true}) {
    const GptqResult result = gptq(w, s.rows, s.columns, {.group = 40}, h, {.act_order = act_order});
    const QuantizedMatrix nearest = round_to_nearest(w, s.rows, s.columns, {.group = 40});
    EXPECT_EQ(result.matrix.codes, nearest.codes);
    EXPECT_EQ(result.matrix.scales, nearest.scales);
  }
}

TEST(Gptq, ThreadsAndRepetitionChangeNothing) {
  std::mt19937_64 random(5);
  const Sizes s{200, 288, 4, 96};
  const std::vector<float> w = random_weights(random, s);
  const Hessian h = hessian_of(random, 300, s.columns);
  for (const bool act_order : {false, true}) {
    const auto quantized = [&](int threads) {
      const Threads set(threads);
      return gptq(w, s.rows, s.columns, {.group = s.group}, h, {.act_order = act_order}).matrix;
    };
    const QuantizedMatrix one = quantized(1);
    for (const int threads : {1, 2, 3}) {
      const QuantizedMatrix other = quantized(threads);
      EXPECT_EQ(other.codes, one.codes) << threads;
      EXPECT_EQ(other.scales, one.scales) << threads;
    }
  }
}

// More columns than tokens: H has no inverse, and its damping gives it one.
TEST(Gptq, RaisesTheDampingWhereItHasTo) {
  std::mt19937_64 random(6);
  const Sizes s{4, 64, 4, 0};
  const std::vector<float> w = random_weights(random, s);
  const GptqResult of_few = gptq(w, 4, 64, {}, hessian_of(random, 8, 64));
  EXPECT_EQ(of_few.failure, "");
  EXPECT_EQ(of_few.damping, 0.01);
  check(of_few.matrix);
  // Sums in low precision may be off by more: eigenvalues 1.3 and -0.3 beside a mean diagonal of 0.5.
  std::vector<double> sum(64 * 64);
  for (std::size_t i = 0; i < 64; ++i) sum[i * 65] = 0.5;
  sum[1] = sum[64] = 0.8;
  const GptqResult raised = gptq(w, 4, 64, {}, Hessian(64, sum, 10), {.damping = 0});
  EXPECT_EQ(raised.failure, "");
  EXPECT_EQ(raised.damping, 1);  // 0, 0.01, 0.1, 1
}

TEST(QuantizeMatrix, FallsBackToRoundingAndSaysWhy) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  std::mt19937_64 random(7);
  const Sizes s{6, 32, 4, 0};
  const std::vector<float> w = random_weights(random, s);
  const QuantizedMatrix nearest = round_to_nearest(w, 6, 32, {});
  const auto expect_nearest = [&](const Hessian* h, const std::string& failure, Clip clip) {
    const QuantizedLayer layer = quantize_matrix(w, 6, 32, {.clip = clip}, h);
    EXPECT_EQ(layer.by, Quantizer::RoundToNearest);
    EXPECT_EQ(layer.failure, failure);
    if (clip == Clip::LeastSquares) {
      EXPECT_EQ(layer.matrix.codes, nearest.codes);
    }
    check(layer.matrix);
  };
  std::vector<float> x = random_inputs(random, 50, 32);
  x[32 * 7 + 3] = kNaN;
  Hessian of_nan(32), of_inf(32);
  of_nan.add(x);
  x[32 * 7 + 3] = std::numeric_limits<float>::infinity();
  of_inf.add(x);
  std::vector<double> indefinite(32 * 32), negative(32 * 32);
  for (std::size_t i = 0; i < 32; ++i) indefinite[i * 33] = negative[i * 33] = 1;
  indefinite[1] = 100;
  negative[33] = -1;
  const Hessian empty(32), no_square(32, indefinite, 5), below_zero(32, negative, 5);
  for (const Clip clip : {Clip::LeastSquares, Clip::Weighted}) {
    expect_nearest(nullptr, "", clip);
    expect_nearest(&empty, "its Hessian has seen no token", clip);
    expect_nearest(&of_nan, "its Hessian has nan at row 0, column 3", clip);
    const QuantizedLayer layer = quantize_matrix(w, 6, 32, {.clip = clip}, &of_inf);
    EXPECT_NE(layer.failure.find("inf at row 0, column 3"), std::string::npos) << layer.failure;
    expect_nearest(&below_zero, "its Hessian has -1 on the diagonal at 1", clip);
    expect_nearest(&no_square, "its Hessian is not positive definite, even damped by 10 of its mean diagonal",
                   clip);
  }
  const Hessian good = hessian_of(random, 50, 32);
  const QuantizedLayer layer = quantize_matrix(w, 6, 32, {}, &good);
  EXPECT_EQ(layer.by, Quantizer::Gptq);
  EXPECT_EQ(layer.failure, "");
  EXPECT_EQ(layer.damping, 0.01);
  EXPECT_EQ(layer.matrix.codes, gptq(w, 6, 32, {}, good).matrix.codes);
}

TEST(Gptq, RefusesWhatCannotBe) {
  std::mt19937_64 random(8);
  std::vector<float> w = random_weights(random, {2, 8, 4, 0});
  const Hessian h = hessian_of(random, 20, 8);
  expect_error<UserError>([&] { gptq(w, 2, 8, {}, h, {.damping = -0.5}); },
                          "A damping of -0.5 is out of range. Choose a share");
  expect_error<UserError>([&] { gptq(w, 2, 8, {.bits = 2}, h); }, "Weights of 2 bits are not supported.");
  expect_error<UserError>([&] { gptq(w, 2, 8, {.group = 3}, h); }, "Groups of 3 columns do not divide");
  expect_error<InternalError>([&] { gptq(w, 4, 4, {}, h); }, "a Hessian of 8 columns for 4 x 4 weights");
  expect_error<InternalError>([&] { gptq(w, 3, 8, {}, h); }, "16 weights for 3 x 8");
  w[9] = std::numeric_limits<float>::quiet_NaN();
  expect_error<UserError>([&] { quantize_matrix(w, 2, 8, {}, &h); },
                          "The weight at row 1, column 1 of a matrix");
}

// Rows of zeros stay zeros, and one weight far out does not make others than its row's worse.
TEST(Gptq, ZeroRowsAndOutliers) {
  std::mt19937_64 random(9);
  std::vector<float> w = random_weights(random, {3, 64, 4, 0});
  const Hessian h = hessian_of(random, 100, 64);
  std::fill(w.begin() + 64, w.begin() + 128, 0.0F);
  const QuantizedMatrix before = gptq(w, 3, 64, {}, h).matrix;
  w[20] = 1e30F;
  const GptqResult after = gptq(w, 3, 64, {}, h);
  ASSERT_EQ(after.failure, "");
  check(after.matrix);
  for (std::size_t i = 64; i < 192; ++i) EXPECT_EQ(after.matrix.codes[i], before.codes[i]);
  for (std::size_t i = 64; i < 128; ++i) EXPECT_EQ(after.matrix.codes[i], 0);
  EXPECT_EQ(after.matrix.scales[1], 1);
}

}  // namespace
}  // namespace fathom::quant_test
