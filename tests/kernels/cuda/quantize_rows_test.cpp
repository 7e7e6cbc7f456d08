// Rows that become codes, of widths that models have and of odd ones: the bits of the CPU, which divides.
#include <fmt/format.h>

#include "tests/kernels/cuda/on_device.h"

namespace fathom::kernel_test {
namespace {

class CudaQuantizeRows : public CudaKernels {
 protected:
  static std::vector<Buffer> quantized(Backend& b, const Buffer& x, const RowQuantization& s) {
    return run_on(b, {{DType::U8, s.rows * s.format().row_bytes(), 99}, {DType::F32, s.rows}, x},
                  [&](Backend& on, const std::vector<View>& v) { on.quantize_rows(v[0], v[1], v[2], s); });
  }
  /// x as fp32, which the CPU takes.
  static Buffer floats(const Buffer& x) {
    Buffer f(DType::F32, x.size());
    for (std::int64_t i = 0; i < x.size(); ++i) f.set(i, x[i]);
    return f;
  }
  void expect_bits_of_the_cpu(const Buffer& x, const RowQuantization& s) {
    SCOPED_TRACE(fmt::format("{} {} rows of {} every {}, {} bits, clip {}", name_of(x.dtype()), s.rows,
                             s.columns, s.x_row(), s.bits, s.clip));
    const std::vector<Buffer> here = quantized(cpu(), floats(x), s), there = quantized(cuda(), x, s);
    const std::int64_t row_bytes = s.format().row_bytes();
    for (std::int64_t r = 0; r < s.rows; ++r) {
      if (std::isnan(here[1][r])) {
        ASSERT_TRUE(std::isnan(there[1][r])) << "row " << r;
      } else {
        ASSERT_EQ(there[1][r], here[1][r]) << "row " << r;
      }
      for (std::int64_t i = r * row_bytes; i < (r + 1) * row_bytes; ++i)
        ASSERT_EQ(there[0][i], here[0][i]) << "row " << r << " byte " << i - r * row_bytes;
    }
  }
  /// Rows of many sizes, among them one of zeros, of a NaN, an infinity, an outlier, of all the least number,
  /// of numbers that are not normal, and of those that lie in the middle between codes.
  static Buffer rows(DType dtype, const RowQuantization& s) {
    Buffer x = random(dtype, s.x_size(), 5);
    const double middle = s.bits == 8 ? 127 : 7;
    for (std::int64_t r = 0; r < s.rows; ++r) {
      for (std::int64_t c = 0; c < s.columns; ++c) {
        const std::int64_t i = r * s.x_row() + c;
        const bool one = c == s.columns / 2;
        switch (r % 13) {
          case 1:
            x.set(i, c % 2 == 0 ? 0.0 : -0.0);
            break;
          case 2:
            if (one) x.set(i, NAN);
            break;
          case 3:
            if (one) x.set(i, -INFINITY);
            break;
          case 4:
            if (one) x.set(i, -1e30);
            break;
          case 5:
            x.set(i, one ? -1.0 : -0.93);
            break;
          case 6:
            x.set(i, x[i] * 1e-39);
            break;
          case 7:
          case 8:
            x.set(i, one ? middle : std::floor(x[i] * 20) + 0.5);
            break;
          case 9:
            x.set(i, (one ? middle : std::floor(x[i] * 3) + 0.5) * 0x1p-9);
            break;
          case 10:
            x.set(i, x[i] * 1e37);
            break;
          case 11:
            x.set(i, x[i] * 1e-30);
            break;
          default:
            break;
        }
      }
    }
    return x;
  }
};

TEST_F(CudaQuantizeRows, HaveTheBitsOfTheCpu) {
  for (const DType dtype : {DType::BF16, DType::F32}) {
    for (const std::int64_t columns :
         {1,    7,    8,    12,   60,   63,   64,   72,   100,  128,   257,   520,   704,   768,   1031, 1032,
          2048, 2816, 3072, 4096, 4104, 5632, 8192, 8200, 9728, 11008, 14336, 16384, 20480, 32768, 32776}) {
      for (const std::int64_t count : {1, 3, 30}) {
        for (const int bits : {4, 8}) {
          RowQuantization s{.rows = count, .columns = columns, .bits = bits};
          if (count == 30) s.clip = bits == 8 ? 0.3F : 1.0F;
          expect_bits_of_the_cpu(rows(dtype, s), s);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

// Rows that a warp has to itself, and that a few have: more of them than few.
TEST_F(CudaQuantizeRows, OfManyRows) {
  for (const DType dtype : {DType::BF16, DType::F32}) {
    for (const std::int64_t columns : {64, 300, 512, 1000, 2048, 2056}) {
      const RowQuantization s{.rows = 3001, .columns = columns, .bits = 8};
      expect_bits_of_the_cpu(rows(dtype, s), s);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(CudaQuantizeRows, OfPartsOfWiderRows) {
  for (const DType dtype : {DType::BF16, DType::F32}) {
    for (const std::int64_t columns : {64, 200, 2048, 5632}) {
      for (const std::int64_t more : {8, 3}) {
        const RowQuantization s{.rows = 257, .columns = columns, .clip = 0.9F, .stride = columns + more};
        expect_bits_of_the_cpu(rows(dtype, s), s);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Every bf16 of some powers of two, so that all that lie near a middle are among them.
TEST_F(CudaQuantizeRows, EveryNumberOfARange) {
  for (const int bits : {4, 8}) {
    const RowQuantization s{.rows = 211, .columns = 4096, .bits = bits, .clip = 0.87F};
    Buffer x(DType::BF16, s.x_size());
    for (std::int64_t r = 0; r < s.rows; ++r) {
      for (std::int64_t c = 0; c < s.columns; ++c) {
        const double magnitude =
            std::ldexp(1.0 + static_cast<double>(c % 128) / 128, -static_cast<int>(c / 256));
        x.set(r * s.columns + c, c / 128 % 2 == 0 ? magnitude : -magnitude);
      }
      x.set(r * s.columns, 2.0 + static_cast<double>(r) / 64);  // the largest of the row
    }
    expect_bits_of_the_cpu(x, s);
  }
}

}  // namespace
}  // namespace fathom::kernel_test
