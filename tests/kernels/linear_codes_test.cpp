// Rows of few bits and their products with weights of few bits, against the same sums in double: on every
// instruction set of the CPU, and on a GPU.
#include <fmt/format.h>

#include "tests/kernels/packed_codes.h"

namespace fathom::kernel_test {
namespace {

int code_of(double byte) { return static_cast<std::int8_t>(static_cast<std::uint8_t>(byte)); }

class LinearCodes : public OnSubject {
 protected:
  std::vector<Buffer> quantized(Backend& b, const Buffer& x, const RowQuantization& s) const {
    return run_on(b, {{DType::U8, s.rows * s.format().row_bytes(), 99}, {DType::F32, s.rows}, x},
                  [&](Backend& on, const std::vector<View>& v) { on.quantize_rows(v[0], v[1], v[2], s); });
  }
  /// Random codes, -2^(bits-1) among them; every fourth row is zero.
  static std::vector<Buffer> random_rows(std::int64_t rows, std::int64_t columns, int bits, unsigned seed) {
    const PackedFormat f{8, columns, columns};
    Buffer codes(DType::U8, rows * f.row_bytes()), scales(DType::F32, rows);
    std::mt19937 generator(seed);
    const int half = 1 << (bits - 1);
    std::uniform_int_distribution<int> any(-half, half - 1);
    for (std::int64_t r = 0; r < rows; ++r) {
      scales.set(r, 0.01 * static_cast<double>(1 + r % 7));
      for (std::int64_t c = 0; c < columns; ++c) {
        const int code = r % 4 == 3 ? 0 : c % 5 == 0 ? -half : any(generator);
        codes.set(r * f.row_bytes() + c, static_cast<std::uint8_t>(code));
      }
    }
    return {codes, scales};
  }
  /// To a rounding of the groups' sums and of the scales; of bf16's result.
  void expect_product(const std::vector<Buffer>& x, const Quantized& w, const LinearShape& s,
                      int threads = 2) const {
    const PackedFormat f{8, s.in, s.in};
    const Buffer y =
        run_on(*backend(false, threads),
               {{dtype(), s.batch * s.rows * s.out, NAN}, x[0], x[1], w.packed(), {DType::F32, w.scales}},
               [&](Backend& on, const std::vector<View>& v) {
                 on.linear_codes_forward(v[0], {v[1], v[2], f}, {v[3], v[4], w.format}, s);
               })[0];
    const double relative = dtype() == DType::BF16 ? 8e-3 : 3e-7;
    for (std::int64_t row = 0; row < s.batch * s.rows; ++row) {
      for (std::int64_t o = 0; o < s.out; ++o) {
        // One group's sum is exact. Of several, AVX adds those of each lane, which may be larger than theirs.
        double sum = 0, size = 0;
        const std::int64_t out = row / s.rows * s.out + o;
        for (std::int64_t c = 0; c < s.in; ++c) {
          const double term = code_of(x[0][row * f.row_bytes() + c]) * w(out, c);
          sum += term, size += std::fabs(term);
        }
        if (w.format.groups() == 1) size = std::fabs(sum);
        ASSERT_NEAR(y[row * s.out + o], sum * x[1][row], relative * size * x[1][row] + 1e-30)
            << "row " << row << " out " << o;
      }
    }
  }
};

TEST_P(LinearCodes, RowsBecomeTheirNearestCodes) {
  const std::shared_ptr<Backend> b = backend(false);
  for (const int bits : {4, 8}) {
    for (const float clip : {1.0F, 0.9F, 0.3F}) {
      for (const std::int64_t columns : {1, 5, 64, 100, 257}) {
        RowQuantization s{.rows = 7, .columns = columns, .bits = bits, .clip = clip, .stride = columns + 3};
        Buffer x = random(dtype(), s.x_size(), 5);
        for (std::int64_t c = 0; c < columns; ++c) x.set(s.x_row() + c, 0);  // zeros
        x.set(2 * s.x_row(), 1e30);                                          // an outlier
        for (std::int64_t c = 0; c < columns; ++c)
          x.set(3 * s.x_row() + c, c == 0 ? -1 : -0.93);                             // the least code
        for (std::int64_t c = 0; c < columns; ++c) x.set(4 * s.x_row() + c, 1e-45);  // no float is its scale
        SCOPED_TRACE(fmt::format("bits {} clip {} columns {}", bits, clip, columns));
        const std::vector<Buffer> q = quantized(*b, x, s);
        const std::int64_t row_bytes = s.format().row_bytes();
        const int most = (1 << (bits - 1)) - 1;
        for (std::int64_t r = 0; r < s.rows; ++r) {
          float largest = 0;
          for (std::int64_t c = 0; c < columns; ++c)
            largest = std::max(largest, std::fabs(static_cast<float>(x[r * s.x_row() + c])));
          float scale = largest * (clip / static_cast<float>(most));
          if (!(scale > 0)) scale = 1;
          ASSERT_EQ(q[1][r], scale) << r;
          for (std::int64_t c = 0; c < row_bytes; ++c) {
            const float of = c < columns ? static_cast<float>(x[r * s.x_row() + c]) / scale : 0;
            const double code =
                std::clamp(std::nearbyint(of), static_cast<float>(-most - 1), static_cast<float>(most));
            ASSERT_EQ(code_of(q[0][r * row_bytes + c]), code) << r << " " << c;
          }
        }
        if (clip < 0.9F) {
          EXPECT_EQ(code_of(q[0][3 * row_bytes]), -most - 1);
        }
      }
    }
  }
}

TEST_P(LinearCodes, WhatIsNotFiniteShows) {
  RowQuantization s{.rows = 4, .columns = 70, .bits = 4, .clip = 0.9F};
  Buffer x = random(dtype(), s.x_size(), 5);
  x.set(70 + 3, NAN);
  x.set(140 + 69, -INFINITY);
  const std::vector<Buffer> q = quantized(*backend(false), x, s);
  for (const std::int64_t row : {0, 3}) EXPECT_TRUE(std::isfinite(q[1][row]));
  for (const std::int64_t row : {1, 2}) {
    EXPECT_TRUE(std::isnan(q[1][row]));
    for (std::int64_t i = 0; i < s.format().row_bytes(); ++i)
      ASSERT_EQ(q[0][row * s.format().row_bytes() + i], 0);
  }
  const Quantized w = random_codes({4, 70, 70}, 3, 3);
  const Buffer y =
      run_on(*backend(false), {{dtype(), 12}, q[0], q[1], w.packed(), {DType::F32, w.scales}},
             [&](Backend& on, const std::vector<View>& v) {
               on.linear_codes_forward(v[0], {v[1], v[2], s.format()}, {v[3], v[4], w.format}, {4, 70, 3});
             })[0];
  for (std::int64_t i = 0; i < 12; ++i) EXPECT_EQ(std::isnan(y[i]), i / 3 == 1 || i / 3 == 2) << i;
}

TEST_P(LinearCodes, IsTheProductInDouble) {
  const std::vector<std::pair<std::int64_t, std::int64_t>> columns_and_groups = {
      {1, 1},     {3, 3},    {17, 17},  {64, 64},  {65, 65}, {100, 100}, {320, 320}, {1031, 1031},
      {256, 128}, {256, 64}, {192, 32}, {160, 16}, {60, 20}, {15, 5},    {1060, 20}, {1536, 512}};
  for (const int bits : {4, 8}) {
    for (const int of_x : {4, 8}) {
      for (const auto& [columns, group] : columns_and_groups) {
        const Quantized w = random_codes({bits, columns, group}, 19, 3);
        for (const std::int64_t rows : {1, 2, 3, 5, 8, 70}) {
          if (columns > 1000 && rows > 5) continue;
          SCOPED_TRACE(
              fmt::format("bits {} of x {} columns {} group {} rows {}", bits, of_x, columns, group, rows));
          expect_product(random_rows(rows, columns, of_x, 5), w, {rows, columns, 19});
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

// All codes the least there are: the largest sums that there can be.
TEST_P(LinearCodes, TheLargestSumsAreExact) {
  const std::int64_t columns = 16384;
  for (const int bits : {4, 8}) {
    Quantized w = random_codes({bits, columns, columns}, 5, 3);
    for (std::int8_t& code : w.codes) code = static_cast<std::int8_t>(-(1 << (bits - 1)));
    for (double& scale : w.scales) scale = 0.5;
    Buffer codes(DType::U8, 3 * columns, 128), scales(DType::F32, {1, 1, 1});
    expect_product({codes, scales}, w, {3, columns, 5});
  }
}

TEST_P(LinearCodes, ExpertsAndThreads) {
  for (const int bits : {4, 8}) {
    for (const std::int64_t group : {32, 64, 192}) {
      const LinearShape s{21, 192, 67, 3};
      const Quantized w = random_codes({bits, s.in, group}, s.batch * s.out, 3);
      const std::vector<Buffer> x = random_rows(s.batch * s.rows, s.in, 8, 5);
      for (const int threads : {1, 3}) expect_product(x, w, s, threads);
    }
  }
}

TEST_P(LinearCodes, NothingIsNothingAndWhatDoesNotFitIsNamed) {
  const Quantized w = random_codes({4, 8, 8}, 3, 3);
  expect_product(random_rows(0, 8, 4, 5), w, {0, 8, 3});
  const std::shared_ptr<Backend> b = backend(false);
  const auto refused = [&](const LinearShape& s, std::int64_t rows, const PackedFormat& of_x,
                           const char* what) {
    testing_support::expect_internal_error(
        [&] {
          const std::vector<Buffer> x = random_rows(rows, 8, 4, 5);
          run_on(*b, {{dtype(), s.rows * s.out}, x[0], x[1], w.packed(), {DType::F32, w.scales}},
                 [&](Backend& on, const std::vector<View>& v) {
                   on.linear_codes_forward(v[0], {v[1], v[2], of_x}, {v[3], v[4], w.format}, s);
                 });
        },
        {"linear_codes_forward", what});
  };
  refused({2, 8, 3}, 1, {8, 8, 8}, "x");
  refused({2, 8, 4}, 2, {8, 8, 8}, "codes");
  refused({2, 9, 3}, 2, {8, 8, 8}, "columns");
  refused({2, 8, 3}, 2, {4, 8, 8}, "bits of x");
  refused({2, 8, 3}, 2, {8, 8, 4}, "bits of x");
  const auto not_quantized = [&](const RowQuantization& s, const char* what) {
    testing_support::expect_internal_error([&] { quantized(*b, {dtype(), 16}, s); }, {"quantize_rows", what});
  };
  not_quantized({.rows = 2, .columns = 8, .bits = 5}, "bits");
  not_quantized({.rows = 2, .columns = 8, .bits = 4, .clip = 0}, "clip");
  not_quantized({.rows = 2, .columns = 7, .bits = 4}, "x");
}

INSTANTIATE_TEST_SUITE_P(Devices, LinearCodes, ::testing::ValuesIn(subjects()),
                         [](const auto& p) { return p.param.str(); });

}  // namespace
}  // namespace fathom::kernel_test
