// Hadamard transforms of rows against their matrices in double: on every instruction set of the CPU, and on a
// GPU.
#include "kernels/hadamard.h"

#include <fmt/format.h>

#include "tests/kernels/packed_codes.h"

namespace fathom::kernel_test {
namespace {

/// Sylvester's H_power by way of its definition: the parity of common bits.
double sylvester(std::int64_t i, std::int64_t j) {
  return __builtin_popcountll(static_cast<unsigned long long>(i & j)) % 2 == 0 ? 1 : -1;
}

Buffer factor_matrix(std::int64_t factor) {
  std::vector<double> values;
  for (const std::int8_t h : hadamard_matrix(factor)) values.push_back(h);
  return {DType::F32, values};
}

/// What a row becomes, by sums over the whole of each vector.
std::vector<double> expected(const Buffer& x, std::int64_t row, const HadamardShape& s) {
  const Buffer matrix = factor_matrix(s.factor);
  std::vector<double> y(static_cast<std::size_t>(s.width()));
  const std::int64_t n = s.factor * s.power;
  for (std::int64_t b = 0; b < s.blocks; ++b) {
    for (std::int64_t v = 0; v < s.inner; ++v) {
      const auto at = [&](std::int64_t i) { return b * s.block() + i * s.inner + v; };
      for (std::int64_t i = 0; i < n; ++i) {
        double sum = 0;
        for (std::int64_t j = 0; j < n; ++j) {
          sum += matrix[i / s.power * s.factor + j / s.power] * sylvester(i % s.power, j % s.power) *
                 x[row * s.x_row() + at(j)];
        }
        y[static_cast<std::size_t>(at(i))] = sum / std::sqrt(static_cast<double>(n));
      }
    }
  }
  return y;
}

class Hadamard : public OnSubject {
 protected:
  double tolerance() const { return dtype() == DType::F64 ? 1e-13 : dtype() == DType::F32 ? 4e-6 : 2e-2; }
  /// Rows of other rows' places hold 7, in x and in y, and stay.
  void expect_transform(const HadamardShape& s, bool in_place = false) const {
    SCOPED_TRACE(fmt::format("{} rows, {} blocks of {} x {} x {}, strides {} and {}", s.rows, s.blocks,
                             s.factor, s.power, s.inner, s.x_row(), s.y_row()));
    const Buffer x = random(dtype(), s.x_size(), 5);
    const Buffer y = in_place ? x : Buffer(dtype(), s.y_size(), 7);
    const std::vector<Buffer> after = run_on(*backend(false), {y, x, factor_matrix(s.factor)},
                                             [&](Backend& on, const std::vector<View>& v) {
                                               on.hadamard_forward(v[0], in_place ? v[0] : v[1], v[2], s);
                                             });
    for (std::int64_t r = 0; r < s.rows; ++r) {
      const std::vector<double> row = expected(x, r, s);
      for (std::int64_t i = 0; i < s.width(); ++i) {
        ASSERT_NEAR(after[0][r * s.y_row() + i], row[static_cast<std::size_t>(i)],
                    tolerance() * std::sqrt(static_cast<double>(s.factor)))
            << "row " << r << " element " << i;
      }
      for (std::int64_t i = r * s.y_row() + s.width(); i < std::min(s.y_size(), (r + 1) * s.y_row()); ++i)
        ASSERT_EQ(after[0][i], in_place ? x[i] : 7) << i;
    }
  }
};

TEST_P(Hadamard, IsTheMatrixInDouble) {
  for (const std::int64_t power : {1, 2, 4, 8, 16, 32, 64, 256, 1024})
    expect_transform({.rows = power > 100 ? 2 : 5, .power = power});
  for (const std::int64_t factor : {12, 20, 28, 36, 40, 52, 60, 108, 140, 156, 172}) {
    if (hadamard_matrix(factor).empty()) continue;  // an even one's half times two
    for (const std::int64_t power : {1, 2, 8})
      expect_transform({.rows = 2, .factor = factor, .power = power});
  }
  expect_transform({.rows = 2, .factor = 12, .power = 64});
  expect_transform({.rows = 1, .factor = 28, .power = 32});
}

TEST_P(Hadamard, BlocksAndVectorsSideBySide) {
  for (const std::int64_t inner : {1, 3, 4, 6, 16, 64}) {
    for (const std::int64_t blocks : {1, 3, 5}) {
      expect_transform({.rows = 3, .blocks = blocks, .power = 4, .inner = inner});
      expect_transform({.rows = 3, .blocks = blocks, .factor = 12, .power = 2, .inner = inner});
      expect_transform({.rows = 3, .blocks = blocks, .factor = 12, .inner = inner});
    }
  }
  // More blocks than a GPU's thread block takes at once.
  expect_transform({.rows = 2, .blocks = 75, .power = 64});
}

TEST_P(Hadamard, PartsOfWiderRowsAndInPlace) {
  for (const bool in_place : {false, true}) {
    expect_transform({.rows = 6, .blocks = 3, .power = 8, .x_stride = 40, .y_stride = 40}, in_place);
    expect_transform({.rows = 6, .blocks = 2, .factor = 12, .power = 2, .x_stride = 50, .y_stride = 50},
                     in_place);
    expect_transform({.rows = 1, .power = 16}, in_place);
  }
  expect_transform({.rows = 4, .power = 16, .x_stride = 33});
  expect_transform({.rows = 4, .power = 16, .y_stride = 33});
}

TEST_P(Hadamard, NoRowsAreNothingAndBlocksOfOneAreTheirOwn) {
  expect_transform({.rows = 0, .power = 8});
  const Buffer x = random(dtype(), 21, 5);
  const std::vector<Buffer> after =
      run_on(*backend(false), {{dtype(), 21}, x}, [](Backend& on, const std::vector<View>& v) {
        on.hadamard_forward(v[0], v[1], {}, {.rows = 3, .blocks = 7});
      });
  for (std::int64_t i = 0; i < 21; ++i) EXPECT_EQ(after[0][i], x[i]);
}

TEST_P(Hadamard, WhatARowBecomesDependsOnNoOther) {
  const HadamardShape s{.rows = 70, .blocks = 2, .factor = 12, .power = 16};
  const Buffer x = random(dtype(), s.x_size(), 5);
  const Op op = [&](Backend& on, const std::vector<View>& v) {
    HadamardShape some = s;
    some.rows = v[0].size / s.width();
    on.hadamard_forward(v[0], v[1], v[2], some);
  };
  const Buffer all = run_on(*backend(false), {{dtype(), s.x_size()}, x, factor_matrix(12)}, op)[0];
  for (const int threads : {1, 3}) {
    Buffer first(dtype(), s.width());
    for (std::int64_t i = 0; i < s.width(); ++i) first.set(i, x[i]);
    const Buffer one =
        run_on(*backend(false, threads), {{dtype(), s.width()}, first, factor_matrix(12)}, op)[0];
    for (std::int64_t i = 0; i < s.width(); ++i) ASSERT_EQ(one[i], all[i]);
  }
}

TEST_P(Hadamard, WhatDoesNotFitIsNamed) {
  const std::shared_ptr<Backend> b = backend(false);
  const auto refused = [&](const HadamardShape& s, std::int64_t size, const char* what) {
    testing_support::expect_internal_error(
        [&] {
          run_on(*b, {{dtype(), size}, {DType::F32, 100}},
                 [&](Backend& on, const std::vector<View>& v) { on.hadamard_forward(v[0], v[0], v[1], s); });
        },
        {"hadamard_forward", what});
  };
  refused({.rows = 2, .power = 6}, 12, "power");
  refused({.rows = 2, .power = 8}, 15, "y");
  refused({.rows = 2, .factor = 12}, 24, "matrix");
  refused({.rows = 2, .factor = 516}, 1032, "factor");
  refused({.rows = 2, .blocks = 0}, 0, "blocks");
  refused({.rows = 2, .power = 8, .x_stride = 7}, 16, "stride");
}

INSTANTIATE_TEST_SUITE_P(Devices, Hadamard, ::testing::ValuesIn(subjects()),
                         [](const auto& p) { return p.param.str(); });

}  // namespace
}  // namespace fathom::kernel_test
