// Rows that are made and become codes in one pass have the bits of the ops one after the other.
#include <fmt/format.h>

#include "kernels/hadamard.h"
#include "tests/composed_codes.h"
#include "tests/kernels/cuda/on_device.h"

namespace fathom::kernel_test {
namespace {

/// The transform of rows of `heads` heads of `inner` elements, or of `size` elements where inner is 1.
HadamardShape shape_of(std::int64_t rows, std::int64_t size, std::int64_t inner = 1) {
  const HadamardTransform t(size);
  return {.rows = rows,
          .blocks = size / t.block(),
          .factor = t.factor(),
          .power = t.block() / t.factor(),
          .inner = inner};
}

Buffer matrix_of(const HadamardShape& s) {
  std::vector<double> values = {1};
  if (s.factor > 1) {
    values.clear();
    for (const std::int8_t h : hadamard_matrix(s.factor)) values.push_back(h);
  }
  return {DType::F32, values};
}

/// Rows among which are zeros, huge and tiny ones, outliers, and some that are not finite.
Buffer rows_of(DType dtype, std::int64_t rows, std::int64_t columns, std::int64_t stride, unsigned seed) {
  Buffer x = random(dtype, (rows - 1) * stride + columns, seed);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) {
      const std::int64_t i = r * stride + c;
      const bool one = c == columns / 3;
      switch (r % 11) {
        case 1:
          x.set(i, 0);
          break;
        case 2:
          if (one) x.set(i, NAN);
          break;
        case 3:
          if (one) x.set(i, INFINITY);
          break;
        case 4:
          if (one) x.set(i, -1e30);
          break;
        case 5:
          x.set(i, x[i] * 1e-25);
          break;
        case 6:
          x.set(i, x[i] * 1e18);
          break;
        case 7:
          x.set(i, x[i] * 30);
          break;
        case 8:
          x.set(i, one ? 300.0 : 0);
          break;
        default:
          break;
      }
    }
  }
  return x;
}

class CudaMakeCodes : public testing_support::OnCuda<::testing::Test> {
 protected:
  /// from's views are filled in from the buffers: x, weights of a norm, addend, matrix, each empty where
  /// there is none. Whether there was such a pass.
  bool expect_bits(CodeSource from, const RowQuantization& s, const Buffer& x, const Buffer& norm,
                   const Buffer& addend, const Buffer& matrix) {
    const std::int64_t n = s.rows * s.format().row_bytes();
    bool made = false;
    const auto run = [&](bool in_one) {
      return run_on(cuda(),
                    {{DType::U8, n, 99},
                     {DType::F32, s.rows, -1},
                     {x.dtype(), addend.size(), 7},
                     x,
                     norm,
                     addend,
                     matrix},
                    [&](Backend& on, const std::vector<View>& v) {
                      const auto view = [&](std::size_t i) { return v[i].size > 0 ? v[i] : View{}; };
                      from.x = v[3], from.norm = view(4), from.addend = view(5), from.sum = view(2);
                      from.matrix = view(6);
                      if (in_one) {
                        made = on.make_codes(v[0], v[1], from, s);
                      } else {
                        testing_support::compose_codes(on, v[0], v[1], from, s);
                      }
                    });
    };
    const std::vector<Buffer> ours = run(true);
    if (!made) return false;
    const std::vector<Buffer> expected = run(false);
    const std::int64_t row_bytes = s.format().row_bytes();
    for (std::int64_t r = 0; r < s.rows; ++r) {
      if (std::isnan(expected[1][r])) {
        EXPECT_TRUE(std::isnan(ours[1][r])) << "row " << r;
      } else {
        EXPECT_EQ(ours[1][r], expected[1][r]) << "row " << r;
      }
      for (std::int64_t i = r * row_bytes; i < (r + 1) * row_bytes; ++i) {
        EXPECT_EQ(ours[0][i], expected[0][i]) << "row " << r << " byte " << i - r * row_bytes;
        if (HasFailure()) return true;
      }
    }
    EXPECT_EQ(ours[2].bytes(), expected[2].bytes());
    return true;
  }
};

TEST_F(CudaMakeCodes, OfNorms) {
  for (const DType dtype : {DType::BF16, DType::F32}) {
    for (const std::int64_t columns : {8, 72, 248, 256, 520, 768, 1024, 1536, 2048, 2816, 4096, 5632}) {
      for (const std::int64_t rows : {1, 3, 259}) {
        for (const bool adds : {false, true}) {
          const int bits = rows == 3 ? 4 : 8;
          const RowQuantization s{rows, columns, bits, bits == 4 ? 0.9F : 1.0F};
          SCOPED_TRACE(fmt::format("{} {} rows of {} {}", name_of(dtype), rows, columns, adds));
          const Buffer x = rows_of(dtype, rows, columns, columns, 5), none(dtype, 0);
          const Buffer addend = adds ? random(dtype, rows * columns, 6) : none;
          const bool fits = columns * static_cast<std::int64_t>(size_of(dtype)) <= 16384;
          const Buffer norm = random(DType::F32, columns, 7);
          EXPECT_EQ(expect_bits({.x = {}, .norm_eps = 1e-5}, s, x, norm, addend, none), fits);
          if (HasFailure()) return;
        }
      }
    }
  }
}

// There is no pass for some shapes: then nothing was done, which is an answer.
TEST_F(CudaMakeCodes, OfHadamardTransforms) {
  struct Case {
    std::int64_t size, inner;
    bool is_taken;  // of bf16
  };
  const Case all[] = {{5632, 1, true},  {2048, 1, true},   {1024, 1, true},  {256, 1, true},
                      {16, 128, true},  {12, 64, false},   {12, 128, true},  {40, 128, true},
                      {8192, 1, true},  {3072, 1, true},   {6144, 1, true},  {14336, 1, true},
                      {13824, 1, true}, {9728, 1, true},   {2816, 1, false}, {11008, 1, false},
                      {672, 1, false},  {28672, 1, false}, {32, 128, true},  {12, 40, false}};
  for (const Case& c : all) {
    for (const std::int64_t rows : {1, 5, 1000}) {
      const std::int64_t columns = c.size * c.inner;
      if (rows > 5 && columns > 6144) continue;
      for (const bool swiglu : {false, true}) {
        for (const std::int64_t more : {0, 8, 3}) {
          if (more > 0 && (swiglu || rows > 5)) continue;
          const HadamardShape h = shape_of(rows, c.size, c.inner);
          RowQuantization s{rows, columns, 8, 1.0F, columns + more};
          if (rows == 5) s.bits = 4, s.clip = 0.9F;
          const std::int64_t of_row = swiglu ? 2 * columns : columns + more;
          const Buffer x = rows_of(DType::BF16, rows, swiglu ? of_row : columns, of_row, 5),
                       none(DType::F32, 0);
          SCOPED_TRACE(
              fmt::format("{} rows of {} x {} and {}, swiglu {}", rows, c.size, c.inner, more, swiglu));
          if (swiglu) s.stride = 0;
          const bool made =
              expect_bits({.x = {}, .swiglu = swiglu, .hadamard = h}, s, x, none, none, matrix_of(h));
          EXPECT_EQ(made, c.is_taken && more != 3);
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST_F(CudaMakeCodes, OfHadamardTransformsOfFp32) {
  for (const std::int64_t size : {64, 256, 1024}) {
    for (const bool swiglu : {false, true}) {
      const HadamardShape h = shape_of(37, size);
      const Buffer x = rows_of(DType::F32, 37, swiglu ? 2 * size : size, swiglu ? 2 * size : size, 5);
      const Buffer none(DType::F32, 0);
      SCOPED_TRACE(fmt::format("{} swiglu {}", size, swiglu));
      EXPECT_TRUE(expect_bits({.x = {}, .swiglu = swiglu, .hadamard = h}, {37, size}, x, none, none, none));
    }
  }
}

// What a row becomes depends on no other row, however the rows are shared out.
TEST_F(CudaMakeCodes, ARowAloneHasTheBitsThatItHasAmongOthers) {
  constexpr std::int64_t kColumns = 5632, kRows = 2100;
  const HadamardShape h = shape_of(kRows, kColumns);
  const Buffer x = rows_of(DType::BF16, kRows, 2 * kColumns, 2 * kColumns, 5);
  const auto codes = [&](const Buffer& of, std::int64_t rows) {
    return run_on(cuda(), {{DType::U8, rows * kColumns, 99}, {DType::F32, rows, -1}, of, matrix_of(h)},
                  [&](Backend& on, const std::vector<View>& v) {
                    CodeSource from{.x = v[2], .swiglu = true};
                    from.matrix = v[3], from.hadamard = h, from.hadamard.rows = rows;
                    EXPECT_TRUE(on.make_codes(v[0], v[1], from, {rows, kColumns}));
                  });
  };
  const std::vector<Buffer> all = codes(x, kRows);
  for (const std::int64_t r : {0, 1, 7, 131, 132, 791, 792, 1583, 2099}) {
    Buffer row(DType::BF16, 2 * kColumns);
    for (std::int64_t i = 0; i < 2 * kColumns; ++i) row.set(i, x[r * 2 * kColumns + i]);
    const std::vector<Buffer> one = codes(row, 1);
    if (!std::isnan(all[1][r])) {
      ASSERT_EQ(one[1][0], all[1][r]) << r;
    }
    for (std::int64_t i = 0; i < kColumns; ++i)
      ASSERT_EQ(one[0][i], all[0][r * kColumns + i]) << r << " " << i;
  }
}

}  // namespace
}  // namespace fathom::kernel_test
