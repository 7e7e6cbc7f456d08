// Products of codes with one scale a row of weights: whichever kernel takes a shape, of few rows, of many
// (CUTLASS), or one that suits neither, the result has the bits of one formula.
#include <cmath>

#include <fmt/format.h>

#include "kernels/capture.h"
#include "kernels/cuda/codes_gemm.h"
#include "tests/kernels/packed_codes.h"

namespace fathom::kernel_test {
namespace {

struct Rows {
  std::vector<std::int8_t> codes;  // [rows, columns]
  std::vector<float> scales;       // [rows]
};

/// Random codes, the least among them; every fourth row is zero, every ninth is all the least, and scales are
/// as far apart as outliers make them, or NaN.
Rows random_rows(std::int64_t rows, std::int64_t columns, unsigned seed) {
  Rows x;
  std::mt19937 generator(seed);
  std::uniform_int_distribution<int> any(-128, 127);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) {
      const int code = r % 4 == 3 ? 0 : r % 9 == 4 || c % 5 == 0 ? -128 : any(generator);
      x.codes.push_back(static_cast<std::int8_t>(code));
    }
    x.scales.push_back(r % 16 == 1   ? 1e30F
                       : r % 16 == 2 ? 1e-38F
                       : r % 64 == 5 ? NAN
                                     : 0.01F * static_cast<float>(1 + r % 7));
  }
  return x;
}

class CudaLinearCodes : public testing_support::OnCuda<::testing::Test> {
 protected:
  struct Operands {
    Rows x;
    Quantized w;
    LinearShape s;
    PackedFormat x_format() const { return {8, s.in, s.in}; }

    Buffer codes_of_x(std::int64_t offset = 0) const {
      const std::int64_t bytes = x_format().row_bytes();
      Buffer codes(DType::U8, s.batch * s.rows * bytes + offset);
      for (std::int64_t r = 0; r < s.batch * s.rows; ++r) {
        for (std::int64_t c = 0; c < s.in; ++c) {
          const std::int8_t code = x.codes[static_cast<std::size_t>(r * s.in + c)];
          codes.set(offset + r * bytes + c, static_cast<std::uint8_t>(code));
        }
      }
      return codes;
    }
    Buffer scales_of_x() const { return {DType::F32, {x.scales.begin(), x.scales.end()}}; }

    Buffer product(DType dtype) const {
      Buffer y(dtype, s.batch * s.rows * s.out);
      for (std::int64_t row = 0; row < s.batch * s.rows; ++row) {
        const std::int8_t* from = x.codes.data() + row * s.in;
        for (std::int64_t o = 0; o < s.out; ++o) {
          const std::int64_t out = row / s.rows * s.out + o;
          const std::int8_t* codes = w.codes.data() + out * s.in;
          std::int32_t sum = 0;
          for (std::int64_t c = 0; c < s.in; ++c) sum += from[c] * codes[c];
          // Zero as a sum that begins with zero has it: never -0.
          const float scaled =
              0.0F + static_cast<float>(sum) * static_cast<float>(w.scales[static_cast<std::size_t>(out)]);
          y.set(row * s.out + o, scaled * x.scales[static_cast<std::size_t>(row)]);
        }
      }
      return y;
    }
  };

  static Operands operands(const LinearShape& s, int bits) {
    return {random_rows(s.batch * s.rows, s.in, 5), random_codes({bits, s.in, s.in}, s.batch * s.out, 3), s};
  }

  /// `offset`: bytes from where memory begins to x's codes.
  Buffer on_gpu(const Operands& o, DType dtype, std::int64_t offset = 0, bool captured = false) {
    const std::vector<Buffer> buffers = {{dtype, o.s.batch * o.s.rows * o.s.out, -1},
                                         o.codes_of_x(offset),
                                         o.scales_of_x(),
                                         o.w.packed(),
                                         {DType::F32, o.w.scales}};
    return run_on(cuda(), buffers, [&](Backend& on, const std::vector<View>& v) {
      const View x{static_cast<std::uint8_t*>(v[1].data) + offset, v[1].size - offset, v[1].dtype};
      const auto multiply = [&] {
        on.linear_codes_forward(v[0], {x, v[2], o.x_format()}, {v[3], v[4], o.w.format}, o.s);
      };
      multiply();
      if (!captured) return;
      on.fill(v[0], 0);
      const auto work = capture(on, multiply);
      work->launch();
      on.synchronize();
    })[0];
  }

  void expect_bits(const Operands& o, const Buffer& y) {
    const Buffer expected = o.product(y.dtype());
    ASSERT_EQ(y.size(), expected.size());
    for (std::int64_t i = 0; i < y.size(); ++i) {
      if (std::isnan(expected[i])) {
        ASSERT_TRUE(std::isnan(y[i])) << i;
      } else {
        ASSERT_EQ(y[i], expected[i]) << "row " << i / o.s.out << " out " << i % o.s.out;
        ASSERT_EQ(std::signbit(y[i]), std::signbit(expected[i])) << i;
      }
    }
  }
};

TEST_F(CudaLinearCodes, HaveTheBitsOfTheFormulaInEveryShape) {
  const LinearShape shapes[] = {{1, 512, 256},
                                {1, 64, 5000},
                                {3, 2048, 4352},
                                {16, 576, 64},
                                {17, 512, 256},
                                {64, 2048, 72},
                                {65, 320, 2400},
                                {128, 512, 256},
                                {129, 512, 256},
                                {256, 128, 512},
                                {300, 512, 256},
                                {257, 320, 264},
                                {200, 65, 8},
                                {131, 1031, 40},
                                {150, 100, 67},
                                {300, 2048, 520},
                                {150, 192, 64, 3},
                                {129, 640, 24, 2},
                                {20, 192, 40, 3},
                                {2, 129, 9, 5},
                                // Enough of them for CUTLASS's large tiles.
                                {2100, 128, 1040},
                                {700, 65, 1040, 3}};
  for (const int bits : {4, 8}) {
    for (const LinearShape& s : shapes) {
      const Operands o = operands(s, bits);
      for (const DType dtype : {DType::BF16, DType::F32}) {
        SCOPED_TRACE(fmt::format("bits {} rows {} in {} out {} batch {} of {}", bits, s.rows, s.in, s.out,
                                 s.batch, name_of(dtype)));
        expect_bits(o, on_gpu(o, dtype));
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(CudaLinearCodes, OntoABaseAreAProductAndASum) {
  const LinearShape shapes[] = {{3, 512, 256},     {65, 320, 2400},   {129, 512, 256},
                                {300, 2048, 520},  {257, 100, 264},   {150, 100, 67},
                                {150, 192, 64, 3}, {2100, 128, 1040}, {700, 65, 1040, 3}};
  for (const int bits : {4, 8}) {
    for (const LinearShape& s : shapes) {
      const Operands o = operands(s, bits);
      for (const DType dtype : {DType::BF16, DType::F32}) {
        SCOPED_TRACE(fmt::format("bits {} rows {} in {} out {} batch {} of {}", bits, s.rows, s.in, s.out,
                                 s.batch, name_of(dtype)));
        const Buffer base = random(dtype, s.batch * s.rows * s.out, 9);
        Buffer expected = o.product(dtype);
        for (std::int64_t i = 0; i < expected.size(); ++i)
          expected.set(i, static_cast<float>(base[i]) + static_cast<float>(expected[i]));
        const Buffer y = run_on(cuda(),
                                {{dtype, expected.size(), -1},
                                 base,
                                 o.codes_of_x(),
                                 o.scales_of_x(),
                                 o.w.packed(),
                                 {DType::F32, o.w.scales}},
                                [&](Backend& on, const std::vector<View>& v) {
                                  on.linear_codes_add_forward(v[0], v[1], {v[2], v[3], o.x_format()},
                                                              {v[4], v[5], o.w.format}, o.s);
                                })[0];
        for (std::int64_t i = 0; i < expected.size(); ++i) {
          if (std::isnan(expected[i])) {
            ASSERT_TRUE(std::isnan(y[i])) << i;
          } else {
            ASSERT_EQ(y[i], expected[i]) << "row " << i / s.out << " out " << i % s.out;
          }
        }
      }
    }
  }
}

TEST_F(CudaLinearCodes, TheLargestSumsAreExact) {
  for (const int bits : {4, 8}) {
    for (const std::int64_t rows : {7, 140}) {
      Operands o = operands({rows, 65535, 16}, bits);
      const auto least = static_cast<std::int8_t>(-(1 << (bits - 1)));
      std::fill(o.w.codes.begin(), o.w.codes.end(), least);
      std::fill(o.x.codes.begin(), o.x.codes.end(), std::int8_t{-128});
      std::fill(o.x.scales.begin(), o.x.scales.end(), 0.5F);
      for (const DType dtype : {DType::BF16, DType::F32}) {
        SCOPED_TRACE(fmt::format("bits {} rows {} of {}", bits, rows, name_of(dtype)));
        expect_bits(o, on_gpu(o, dtype));
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(CudaLinearCodes, RowsThatBeginAnywhereAreTakenToo) {
  for (const int bits : {4, 8}) {
    for (const std::int64_t rows : {5, 140}) {
      const Operands o = operands({rows, 320, 72}, bits);
      expect_bits(o, on_gpu(o, DType::BF16, 8));
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(CudaLinearCodes, CanBeCaptured) {
  for (const int bits : {4, 8}) {
    for (const std::int64_t rows : {5, 300}) {
      const Operands o = operands({rows, 512, 256}, bits);
      expect_bits(o, on_gpu(o, DType::BF16, 0, true));
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(CudaLinearCodes, CutlassTakesWhatItIsFor) {
  if (*cuda::why_no_codes_gemm() != 0) GTEST_SKIP() << cuda::why_no_codes_gemm();
  cuda::CodesGemm g{};
  g.batch = 1, g.rows = 300, g.out = 256, g.row_bytes = 512;
  if (!cuda::takes_codes_gemm(g)) GTEST_SKIP() << "not a Hopper, or FATHOM_CUTLASS is 0";
  g.out = 252;
  EXPECT_FALSE(cuda::takes_codes_gemm(g));
  alignas(16) const std::uint8_t codes[16] = {};
  g.out = 256;
  g.x = codes;
  EXPECT_TRUE(cuda::takes_codes_gemm(g));
  g.x = codes + 8;
  EXPECT_FALSE(cuda::takes_codes_gemm(g));
}

}  // namespace
}  // namespace fathom::kernel_test
