// Linear layers on the CPU, on every instruction set that this machine has.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "tests/kernels/cpu_backends.h"

namespace fathom {
namespace {

using testing_support::backend_for;
using testing_support::expect_internal_error;
using testing_support::isas;
using testing_support::normal;
using testing_support::same_bits;
using testing_support::view;

template <typename T>
std::vector<double> reference_forward(const std::vector<T>& x, const std::vector<T>& w,
                                      const LinearShape& s) {
  std::vector<double> y(static_cast<std::size_t>(s.rows * s.out));
  for (std::int64_t r = 0; r < s.rows; ++r) {
    for (std::int64_t o = 0; o < s.out; ++o) {
      double sum = 0;
      for (std::int64_t k = 0; k < s.in; ++k) sum += double(x[r * s.in + k]) * double(w[o * s.in + k]);
      y[r * s.out + o] = sum;
    }
  }
  return y;
}

/// Partial sums of n products of normal numbers grow as sqrt(n), and as many roundings of them add up.
template <typename T>
double tolerance(std::int64_t terms) {
  return (sizeof(T) == 4 ? 1.2e-7 : 2.3e-16) * (8 + 2 * static_cast<double>(terms));
}

template <typename T>
void expect_close(const std::vector<T>& got, const std::vector<double>& want, double bound) {
  ASSERT_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(got[i], want[i], bound * (1 + std::abs(want[i]))) << "element " << i;
  }
}

const LinearShape kShapes[] = {{1, 1, 1},    {1, 17, 5},    {1, 64, 64},   {1, 300, 131},
                               {2, 33, 7},   {3, 96, 80},   {4, 20, 130},  {5, 40, 3},
                               {16, 31, 65}, {17, 65, 49},  {31, 16, 16},  {32, 257, 30},
                               {33, 64, 64}, {40, 300, 67}, {100, 513, 9}, {1100, 24, 70}};

template <typename T>
class Gemm : public ::testing::Test {};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Gemm, Types);

TYPED_TEST(Gemm, MatchesADoubleReference) {
  using T = TypeParam;
  for (const std::string& isa : isas()) {
    for (const bool invariant : {false, true}) {
      const auto backend = backend_for(isa, 2, invariant);
      for (const LinearShape& s : kShapes) {
        SCOPED_TRACE(
            fmt::format("{} invariant {} rows {} in {} out {}", isa, invariant, s.rows, s.in, s.out));
        const auto x = normal<T>(s.rows * s.in, 1);
        const auto w = normal<T>(s.out * s.in, 2);
        const auto dy = normal<T>(s.rows * s.out, 3);
        std::vector<T> y(s.rows * s.out, T(NAN));
        backend->linear_forward(view(y), view(x), view(w), s);
        expect_close(y, reference_forward(x, w, s), tolerance<T>(s.in));

        // With a base: the bits of a product and a sum.
        const auto base = normal<T>(s.rows * s.out, 5);
        std::vector<T> onto(s.rows * s.out, T(NAN)), sum = onto;
        backend->linear_add_forward(view(onto), view(base), view(x), view(w), s);
        backend->add(view(sum), view(y), view(base));
        EXPECT_TRUE(same_bits(onto.data(), sum.data(), sum.size()));

        std::vector<double> want_dx(x.size(), 0.0);
        const auto before = normal<T>(s.out * s.in, 4);
        std::vector<double> want_dw(before.begin(), before.end());
        for (std::int64_t r = 0; r < s.rows; ++r) {
          for (std::int64_t o = 0; o < s.out; ++o) {
            for (std::int64_t k = 0; k < s.in; ++k) {
              want_dx[r * s.in + k] += double(dy[r * s.out + o]) * double(w[o * s.in + k]);
              want_dw[o * s.in + k] += double(dy[r * s.out + o]) * double(x[r * s.in + k]);
            }
          }
        }
        std::vector<T> dx(x.size(), T(NAN));
        backend->linear_backward_input(view(dx), view(dy), view(w), s);
        expect_close(dx, want_dx, tolerance<T>(s.out));
        std::vector<T> dw = before;
        backend->linear_backward_weight_accumulate(view(dw), view(dy), view(x), s);
        expect_close(dw, want_dw, tolerance<T>(s.rows));
      }
    }
  }
}

TYPED_TEST(Gemm, RefusesABaseThatIsTheOutput) {
  using T = TypeParam;
  for (const bool invariant : {false, true}) {
    const auto backend = backend_for(isas().front(), 1, invariant);
    const auto x = normal<T>(2 * 3, 1), w = normal<T>(4 * 3, 2);
    std::vector<T> y(2 * 4, T(1));
    EXPECT_THROW(backend->linear_add_forward(view(y), view(y), view(x), view(w), {2, 3, 4}), InternalError);
    EXPECT_EQ(y, std::vector<T>(2 * 4, T(1)));
  }
}

TYPED_TEST(Gemm, InvariantRowsAreBitEqualForAnyNumberOfRowsAndThreads) {
  using T = TypeParam;
  for (const std::string& isa : isas()) {
    for (const auto& [in, out] : {std::pair{64, 64}, {300, 131}, {20, 7}, {513, 96}, {1, 1}}) {
      SCOPED_TRACE(fmt::format("{} in {} out {}", isa, in, out));
      const std::int64_t rows = 1060;
      const auto x = normal<T>(rows * in, 5);
      const auto w = normal<T>(out * in, 6);
      std::vector<T> all(rows * out);
      backend_for(isa, 2, true)->linear_forward(view(all), view(x), view(w), {rows, in, out});
      for (const std::int64_t count : {1, 2, 3, 7, 16, 17, 32, 33, 64, 100, 1030}) {
        for (const int threads : {1, 3}) {
          for (const std::int64_t first : {std::int64_t{0}, std::int64_t{5}, rows - count}) {
            std::vector<T> y(count * out);
            backend_for(isa, threads, true)
                ->linear_forward(view(y), ConstView(x.data() + first * in, count * in, dtype_of<T>::value),
                                 view(w), {count, in, out});
            ASSERT_TRUE(same_bits(y.data(), all.data() + first * out, y.size()))
                << count << " rows from " << first << " on " << threads << " threads";
          }
        }
      }
    }
  }
}

// x as part of wider rows is x.
TYPED_TEST(Gemm, RowsOfAWiderMatrix) {
  using T = TypeParam;
  for (const std::string& isa : isas()) {
    for (const bool invariant : {false, true}) {
      const auto backend = backend_for(isa, 2, invariant);
      for (LinearShape s : kShapes) {
        for (const std::int64_t batch : {1, 2}) {
          SCOPED_TRACE(fmt::format("{} invariant {} rows {} in {} out {} batch {}", isa, invariant, s.rows,
                                   s.in, s.out, batch));
          s.batch = batch, s.x_stride = 0;
          const std::int64_t rows = batch * s.rows, stride = 2 * s.in + 1;
          const auto wide = normal<T>(rows * stride, 1);
          const auto w = normal<T>(batch * s.out * s.in, 2), dy = normal<T>(rows * s.out, 3);
          std::vector<T> x(rows * s.in);
          for (std::int64_t r = 0; r < rows; ++r) {
            for (std::int64_t k = 0; k < s.in; ++k) x[r * s.in + k] = wide[r * stride + s.in + k];
          }
          std::vector<T> y(rows * s.out, T(NAN)), y_wide = y, dw(batch * s.out * s.in, T(1)), dw_wide = dw;
          backend->linear_forward(view(y), view(x), view(w), s);
          backend->linear_backward_weight_accumulate(view(dw), view(dy), view(x), s);
          s.x_stride = stride;
          const ConstView part(wide.data() + s.in, s.x_size(), dtype_of<T>::value);
          backend->linear_forward(view(y_wide), part, view(w), s);
          backend->linear_backward_weight_accumulate(view(dw_wide), view(dy), part, s);
          if (invariant) {
            EXPECT_EQ(y_wide, y);
          }
          expect_close(y_wide, std::vector<double>(y.begin(), y.end()), tolerance<T>(s.in));
          expect_close(dw_wide, std::vector<double>(dw.begin(), dw.end()), tolerance<T>(s.rows));
        }
      }
    }
  }
}

TYPED_TEST(Gemm, RepeatedCallsGiveTheSameBits) {
  using T = TypeParam;
  const LinearShape s{130, 96, 70};
  const auto x = normal<T>(s.rows * s.in, 7);
  const auto w = normal<T>(s.out * s.in, 8);
  std::vector<T> a(s.rows * s.out);
  std::vector<T> b(s.rows * s.out);
  const auto backend = backend_for("portable", 2, false);
  backend->linear_forward(view(a), view(x), view(w), s);
  backend->linear_forward(view(b), view(x), view(w), s);
  EXPECT_TRUE(same_bits(a.data(), b.data(), a.size()));
}

TEST(GemmCalls, EmptyBatchLeavesTheGradientAlone) {
  const auto backend = backend_for("portable", 1, false);
  std::vector<float> none;
  std::vector<float> w(12, 1.0F);
  std::vector<float> dw(12, 2.0F);
  const LinearShape s{0, 3, 4};
  backend->linear_forward(view(none), view(none), view(w), s);
  backend->linear_backward_input(view(none), view(none), view(w), s);
  backend->linear_backward_weight_accumulate(view(dw), view(none), view(none), s);
  EXPECT_EQ(dw, std::vector<float>(12, 2.0F));
}

TEST(GemmCalls, LogEveryLaunch) {
  const auto backend = backend_for("portable", 1, false);
  backend->flop_log.enabled = true;
  backend->flop_log.set_item("mlp");
  const LinearShape s{5, 3, 4};
  std::vector<float> x(15, 1.0F);
  std::vector<float> w(12, 1.0F);
  std::vector<float> y(20, 1.0F);
  backend->linear_forward(view(y), view(x), view(w), s);
  backend->linear_backward_input(view(x), view(y), view(w), s);
  backend->linear_backward_weight_accumulate(view(w), view(y), view(x), s);
  EXPECT_EQ(backend->flop_log.items().at("mlp"), 3 * 2 * 5 * 3 * 4);
}

TEST(GemmCalls, WrongSizesNameTheOpAndTheView) {
  const auto backend = backend_for("portable", 1, false);
  std::vector<float> x(15);
  std::vector<float> w(12);
  std::vector<float> y(20);
  std::vector<float> wrong(19);
  std::vector<double> other(20);
  std::vector<std::int32_t> integers(12);
  const LinearShape s{5, 3, 4};
  expect_internal_error([&] { backend->linear_forward(view(wrong), view(x), view(w), s); },
                        {"linear_forward", "y", "19", "20"});
  expect_internal_error([&] { backend->linear_forward(view(y), view(wrong), view(w), s); },
                        {"linear_forward", "x", "19", "15"});
  expect_internal_error([&] { backend->linear_forward(view(other), view(x), view(w), s); },
                        {"linear_forward", "fp64"});
  expect_internal_error([&] { backend->linear_forward(view(y), view(x), view(integers), s); },
                        {"linear_forward", "int32"});
  expect_internal_error([&] { backend->linear_backward_input(view(x), view(wrong), view(w), s); },
                        {"linear_backward_input", "dy"});
  expect_internal_error([&] { backend->linear_backward_weight_accumulate(view(wrong), view(y), view(x), s); },
                        {"linear_backward_weight_accumulate", "dw"});
}

/// The upper halves of floats, which are then numbers of bf16.
std::vector<std::uint16_t> to_bf16(std::vector<float>& values) {
  std::vector<std::uint16_t> halves;
  for (float& x : values) {
    std::uint32_t word = 0;
    std::memcpy(&word, &x, sizeof(word));
    word &= 0xffff0000U;
    std::memcpy(&x, &word, sizeof(word));
    halves.push_back(static_cast<std::uint16_t>(word >> 16));
  }
  return halves;
}
ConstView bf16_view(const std::vector<std::uint16_t>& v) {
  return {v.data(), static_cast<std::int64_t>(v.size()), DType::BF16};
}

// Weights of bf16 are those numbers in fp32; in the row-invariant mode to the bit (in the fast one the
// compiler may add up the last columns otherwise).
TEST(GemmOfBf16Weights, AreTheSameWeightsInFp32) {
  for (const std::string& isa : isas()) {
    for (const bool invariant : {false, true}) {
      const auto backend = backend_for(isa, 2, invariant);
      for (const LinearShape& s : kShapes) {
        SCOPED_TRACE(
            fmt::format("{} invariant {} rows {} in {} out {}", isa, invariant, s.rows, s.in, s.out));
        const auto x = normal<float>(s.rows * s.in, 1);
        auto w = normal<float>(s.out * s.in, 2);
        const std::vector<std::uint16_t> halves = to_bf16(w);
        std::vector<float> whole(s.rows * s.out, NAN), from_halves(s.rows * s.out, NAN);
        backend->linear_forward(view(whole), view(x), view(w), s);
        backend->linear_forward(view(from_halves), view(x), bf16_view(halves), s);
        expect_close(from_halves, reference_forward(x, w, s), tolerance<float>(s.in));
        if (invariant) {
          EXPECT_TRUE(same_bits(whole.data(), from_halves.data(), whole.size()));
        }
      }
    }
    const auto backend = backend_for(isa, 2, false);
    auto table = normal<float>(7 * 19, 3);
    const std::vector<std::uint16_t> halves = to_bf16(table);
    const std::vector<std::int32_t> tokens = {6, 0, 3, 3};
    std::vector<float> whole(4 * 19, NAN), from_halves(4 * 19, NAN);
    backend->embedding_forward(view(whole), view(table), view(tokens), 4, 19);
    backend->embedding_forward(view(from_halves), bf16_view(halves), view(tokens), 4, 19);
    EXPECT_TRUE(same_bits(whole.data(), from_halves.data(), whole.size())) << isa;
  }
}

}  // namespace
}  // namespace fathom
