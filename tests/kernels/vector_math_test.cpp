// The elementary functions against the C library in double. The copies for the instruction sets differ from
// this one only in contracting multiplications with additions.
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <functional>

#include <gtest/gtest.h>

#define FATHOM_ISA vector_math_test
#include "kernels/cpu/isa/vector_math.h"

namespace fathom::cpu::vector_math_test {
namespace {

using Reference = std::function<double(double)>;

/// The largest relative error over 10^6 numbers of [low, high], evenly spaced or evenly in their bits.
template <typename F>
double worst(F f, const Reference& reference, float low, float high, bool by_bits) {
  double most = 0;
  constexpr int kSteps = 1000000;
  for (int i = 0; i <= kSteps; ++i) {
    const double part = static_cast<double>(i) / kSteps;
    const auto bits = bits_of(low) + static_cast<std::uint32_t>(part * (bits_of(high) - bits_of(low)));
    const float x = by_bits ? float_of(bits) : static_cast<float>(low + part * (high - low));
    const double expected = reference(static_cast<double>(x));
    if (std::fabs(expected) < 1.2e-38) continue;
    const double error = std::fabs(static_cast<double>(f(x)) - expected) / std::fabs(expected);
    if (!(error <= most)) most = error;
  }
  return most;
}

TEST(VectorMath, RelativeErrorBelowTwoInTenMillion) {
  const Reference e = [](double x) { return std::exp(x); }, l = [](double x) { return std::log(x); };
  const Reference l1 = [](double x) { return std::log1p(x); }, t = [](double x) { return std::tanh(x); };
  const Reference s = [](double x) { return 1 / (1 + std::exp(-x)); };
  const auto exp_f = [](float x) { return vexp(x); };
  const auto log_f = [](float x) { return vlog(x); };
  const auto log1p_f = [](float x) { return vlog1p(x); };
  const auto tanh_f = [](float x) { return vtanh(x); };
  EXPECT_LT(worst(exp_f, e, -87.33F, 88.72F, false), 2e-7);
  EXPECT_LT(worst(exp_f, e, -1.0F, 1.0F, false), 2e-7);
  EXPECT_LT(worst(log_f, l, FLT_MIN, FLT_MAX, true), 2e-7);
  EXPECT_LT(worst(log_f, l, 0.4F, 3.0F, false), 2e-7);
  EXPECT_LT(worst(log1p_f, l1, FLT_MIN, 1e6F, true), 2e-7);
  EXPECT_LT(worst([](float x) { return vsigmoid(x); }, s, -87.0F, 87.0F, false), 2e-7);
  EXPECT_LT(worst(tanh_f, t, 1e-30F, 20.0F, true), 2e-7);
  EXPECT_LT(worst(tanh_f, t, -2.0F, 2.0F, false), 2e-7);
}

TEST(VectorMath, Limits) {
  const float inf = INFINITY, nan = std::nanf("");
  for (const float x : {-88.0F, -200.0F, -1e38F, -inf}) EXPECT_EQ(vexp(x), 0.0F);
  for (const float x : {88.8F, 1e38F, inf}) EXPECT_EQ(vexp(x), inf);
  EXPECT_EQ(vexp(0.0F), 1.0F);
  EXPECT_EQ(vlog(1.0F), 0.0F);
  EXPECT_EQ(vlog(0.0F), -inf);
  EXPECT_EQ(vlog(inf), inf);
  EXPECT_TRUE(std::isnan(vlog(-1.0F)));
  EXPECT_EQ(vlog1p(inf), inf);
  EXPECT_EQ(vsigmoid(-inf), 0.0F);
  EXPECT_EQ(vsigmoid(inf), 1.0F);
  EXPECT_EQ(vtanh(-inf), -1.0F);
  EXPECT_EQ(vtanh(inf), 1.0F);
  EXPECT_EQ(vsoftplus(inf), inf);
  EXPECT_EQ(vsoftplus(-inf), 0.0F);
  for (const float x : {nan, -nan}) {
    EXPECT_TRUE(std::isnan(vexp(x)));
    EXPECT_TRUE(std::isnan(vlog(x)));
    EXPECT_TRUE(std::isnan(vlog1p(x)));
    EXPECT_TRUE(std::isnan(vsigmoid(x)));
    EXPECT_TRUE(std::isnan(vtanh(x)));
    EXPECT_TRUE(std::isnan(vsoftplus(x)));
  }
}

}  // namespace
}  // namespace fathom::cpu::vector_math_test
