// Hadamard transforms of rows as wide as models have them, against the same in double, and against the kernel
// of any shape: rows that begin on no 16 bytes take it.
#include "kernels/hadamard.h"

#include <fmt/format.h>

#include "tests/kernels/cuda/on_device.h"

namespace fathom::kernel_test {
namespace {

/// The transform of vectors of `size` elements as ops have it.
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

std::vector<double> expected(const Buffer& x, std::int64_t row, const HadamardShape& s) {
  const HadamardTransform transform(s.factor * s.power);
  std::vector<double> y(static_cast<std::size_t>(s.width())), vector(y.size());
  vector.resize(static_cast<std::size_t>(s.factor * s.power));
  for (std::int64_t b = 0; b < s.blocks; ++b) {
    for (std::int64_t v = 0; v < s.inner; ++v) {
      const std::int64_t first = b * s.block() + v;
      for (std::size_t i = 0; i < vector.size(); ++i)
        vector[i] = x[row * s.x_row() + first + static_cast<std::int64_t>(i) * s.inner];
      transform.apply(vector);
      for (std::size_t i = 0; i < vector.size(); ++i)
        y[static_cast<std::size_t>(first) + i * static_cast<std::size_t>(s.inner)] = vector[i];
    }
  }
  return y;
}

class CudaHadamard : public testing_support::OnCuda<::testing::Test> {
 protected:
  Buffer transformed(const Buffer& x, const HadamardShape& s, bool in_place = false) {
    const Buffer y = in_place ? x : Buffer(x.dtype(), s.y_size(), 7);
    return run_on(cuda(), {y, x, matrix_of(s)}, [&](Backend& on, const std::vector<View>& v) {
      on.hadamard_forward(v[0], in_place ? v[0] : v[1], v[2], s);
    })[0];
  }
  /// To one rounding of the result, and of fp32's sums.
  void expect_transform(DType dtype, const HadamardShape& s, bool in_place = false) {
    SCOPED_TRACE(fmt::format("{} rows, {} blocks of {} x {} x {}, strides {} and {}", s.rows, s.blocks,
                             s.factor, s.power, s.inner, s.x_row(), s.y_row()));
    const Buffer x = random(dtype, s.x_size(), 5), y = transformed(x, s, in_place);
    const double relative = dtype == DType::BF16 ? 0x1.01p-8 : 0;
    for (const std::int64_t r : {std::int64_t{0}, s.rows / 2, s.rows - 1}) {
      const std::vector<double> row = expected(x, r, s);
      for (std::int64_t i = 0; i < s.width(); ++i) {
        const double value = row[static_cast<std::size_t>(i)];
        ASSERT_NEAR(y[r * s.y_row() + i], value, relative * std::fabs(value) + 2e-5)
            << "row " << r << " element " << i;
      }
      for (std::int64_t i = r * s.y_row() + s.width(); i < std::min(s.y_size(), (r + 1) * s.y_row()); ++i)
        ASSERT_EQ(y[i], in_place ? x[i] : 7) << i;
    }
  }
};

TEST_F(CudaHadamard, IsTheTransformOfWidthsThatModelsHave) {
  for (const std::int64_t size :
       {64,   96,   128,  160,  256,  320,  512,   672,   768,   1024,  2048,  2816,  3072,  4096,
        4864, 5632, 6144, 8192, 8960, 9728, 11008, 12288, 13824, 14336, 16384, 18944, 28672, 32768}) {
    for (const std::int64_t rows : {1, 3, 257}) {
      if (rows > 3 && size > 6144) continue;
      expect_transform(DType::BF16, shape_of(rows, size));
      if (size <= 16384) expect_transform(DType::F32, shape_of(rows, size));
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(CudaHadamard, IsTheTransformAcrossAndOfHeads) {
  for (const std::int64_t head : {8, 24, 64, 80, 96, 128, 192, 256}) {
    for (const std::int64_t heads : {1, 2, 4, 12, 14, 16, 20, 28, 32, 36, 40, 44, 48, 52, 60, 64}) {
      if (heads * head > 8192) continue;
      expect_transform(DType::BF16, shape_of(3, heads, head));
      HadamardShape each = shape_of(3, head);
      each.blocks *= heads;
      expect_transform(DType::BF16, each);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(CudaHadamard, TakesPartsOfWiderRowsAndInPlace) {
  for (const std::int64_t size : {256, 1536, 2048, 5632}) {
    for (const std::int64_t more : {0, 8, 5, 64}) {
      HadamardShape s = shape_of(300, size);
      s.x_stride = s.y_stride = size + more;
      for (const bool in_place : {false, true}) expect_transform(DType::BF16, s, in_place);
      s.y_stride = size + 16;
      expect_transform(DType::BF16, s);
      if (HasFatalFailure()) return;
    }
  }
}

// What a whole step's kernel makes of heads (decode_code_attention.cuh) is what this one does.
TEST_F(CudaHadamard, OfHeadsHasTheBitsOfTheKernelOfAnyShape) {
  for (const DType dtype : {DType::BF16, DType::F32}) {
    for (const std::int64_t head : {16, 64, 128, 256, 1024}) {
      HadamardShape s = shape_of(67, head);
      s.blocks = 5;
      const Buffer x = random(dtype, s.x_size(), 5);
      HadamardShape odd = s;
      odd.x_stride = odd.y_stride = s.width() + 1;
      Buffer apart(dtype, odd.x_size());
      for (std::int64_t r = 0; r < s.rows; ++r) {
        for (std::int64_t i = 0; i < s.width(); ++i) apart.set(r * odd.x_row() + i, x[r * s.width() + i]);
      }
      const Buffer y = transformed(x, s), any = transformed(apart, odd);
      for (std::int64_t r = 0; r < s.rows; ++r) {
        for (std::int64_t i = 0; i < s.width(); ++i)
          ASSERT_EQ(y[r * s.width() + i], any[r * odd.y_row() + i]) << head << ": " << r << " " << i;
      }
    }
  }
}

// Neither how many rows there are, which changes how they are shared among thread blocks, nor what they hold.
TEST_F(CudaHadamard, WhatARowBecomesDependsOnNoOther) {
  for (const HadamardShape& shape :
       {shape_of(1100, 5632), shape_of(2100, 16, 128), shape_of(2100, 12, 64), shape_of(1100, 2816)}) {
    HadamardShape s = shape;
    SCOPED_TRACE(fmt::format("{} x {} x {}", s.factor, s.power, s.inner));
    Buffer x = random(DType::BF16, s.x_size(), 5);
    const std::int64_t nan_row = 17, outlier_row = 18;
    x.set(nan_row * s.width() + 3, NAN);
    x.set(outlier_row * s.width() + 5, 1e30);
    const Buffer all = transformed(x, s);
    for (std::int64_t i = 0; i < s.factor * s.power; ++i)
      ASSERT_TRUE(std::isnan(all[nan_row * s.width() + i * s.inner + 3 % s.inner])) << i;
    s.rows = 1;
    for (const std::int64_t r :
         {std::int64_t{0}, std::int64_t{16}, outlier_row, std::int64_t{19}, shape.rows / 2, shape.rows - 1}) {
      Buffer row(DType::BF16, s.width());
      for (std::int64_t i = 0; i < s.width(); ++i) row.set(i, x[r * s.width() + i]);
      const Buffer one = transformed(row, s);
      for (std::int64_t i = 0; i < s.width(); ++i) {
        ASSERT_TRUE(std::isfinite(one[i])) << r << " " << i;
        ASSERT_EQ(one[i], all[r * s.width() + i]) << r << " " << i;
      }
    }
  }
}

}  // namespace
}  // namespace fathom::kernel_test
