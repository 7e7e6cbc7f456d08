#include <algorithm>
#include <set>

#include "kernel_suite.h"

namespace fathom::kernel_test {
namespace {

class Elementwise : public KernelSuite {};
INSTANTIATE_TEST_SUITE_P(Cpu, Elementwise, ::testing::ValuesIn(cases()), name_of_case);

const std::vector<std::int64_t> kSizes = {0, 1, 3, 17, 100, 40001};

TEST_P(Elementwise, AddAccumulateScaleFillCopy) {
  for (const std::int64_t n : kSizes) {
    on_threads([&](Backend& b) {
      const Buffer a = random(dtype(), n, 1), c = random(dtype(), n, 2);
      Buffer sum(dtype(), n), scaled = a, filled(dtype(), n), copied(dtype(), n), in_place = a;
      b.add(sum.view(), a.view(), c.view());
      b.add(in_place.view(), in_place.view(), c.view());
      b.scale(scaled.view(), -0.5);
      b.accumulate(scaled.view(), c.view());
      b.fill(filled.view(), 2.5);
      b.copy(copied.view(), a.view());
      std::vector<double> s, t;
      for (std::int64_t i = 0; i < n; ++i) {
        s.push_back(a[i] + c[i]);
        t.push_back(-0.5 * a[i] + c[i]);
      }
      expect_close(sum, s, tolerance(1), "add");
      expect_close(in_place, s, tolerance(1), "add in place");
      expect_close(scaled, t, tolerance(1), "scale and accumulate");
      expect_close(filled, std::vector<double>(static_cast<std::size_t>(n), 2.5), 0, "fill");
      EXPECT_EQ(copied.bytes(), a.bytes());
      return std::vector<Buffer>{sum, scaled};
    });
  }
}

TEST_P(Elementwise, CopyRowsTakesPartsOfRows) {
  on_threads([&](Backend& b) {
    constexpr std::int64_t kRows = 5, kWidth = 7;
    for (const std::int64_t in_row : {kWidth, 3 * kWidth + 1}) {
      const Buffer in = random(dtype(), (kRows - 1) * in_row + kWidth, 4);
      Buffer out(dtype(), kRows * kWidth), none(dtype(), 0);
      b.copy_rows(out.view(), in.view(), kRows, kWidth, in_row);
      for (std::int64_t i = 0; i < kRows * kWidth; ++i)
        EXPECT_EQ(out[i], in[i / kWidth * in_row + i % kWidth]);
      b.copy_rows(none.view(), none.view(), 0, kWidth, in_row);
      EXPECT_THROW(b.copy_rows(out.view(), in.view(), kRows, kWidth, in_row + 1), InternalError);
      EXPECT_THROW(b.copy_rows(out.view(), in.view(), kRows, kWidth, kWidth - 1), InternalError);
    }
    return std::vector<Buffer>{};
  });
}

TEST_P(Elementwise, SumsAreKeptInDouble) {
  for (const std::int64_t n : kSizes) {
    on_threads([&](Backend& b) {
      const Buffer a = random(dtype(), n, 3);
      Buffer sum(dtype(), 1), squares(dtype(), 1);
      b.sum(sum.view(), a.view());
      b.sum_squares(squares.view(), a.view());
      long double s = 0, q = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        s += a[i];
        q += static_cast<long double>(a[i]) * a[i];
      }
      EXPECT_NEAR(sum[0], static_cast<double>(s), 1e-11 + tolerance(1) * std::fabs(static_cast<double>(s)));
      // The rounding of n additions in a row grows as sqrt(n): a build without vectorised sums adds that
      // many.
      const double chain = std::sqrt(static_cast<double>(n)) * 0x1p-53;
      EXPECT_NEAR(squares[0], static_cast<double>(q), (tolerance(8) + chain) * static_cast<double>(q));
      return std::vector<Buffer>{sum, squares};
    });
  }
}

TEST_P(Elementwise, CountsNonfinite) {
  Buffer a = random(dtype(), 40001, 4);
  const auto b = backend();
  EXPECT_EQ(b->count_nonfinite(a.view()), 0);
  a.set(0, std::nan(""));
  a.set(17, -INFINITY);
  a.set(40000, INFINITY);
  a.set(20000, is_double() ? 1e308 : 3e38);
  EXPECT_EQ(b->count_nonfinite(a.view()), 3);
}

TEST_P(Elementwise, CastRoundsToNearest) {
  const auto b = backend();
  const Buffer a = random(dtype(), 1001, 5);
  Buffer f32(DType::F32, 1001), f64(DType::F64, 1001), back(DType::F32, 1001);
  b->cast(f32.view(), a.view());
  b->cast(f64.view(), a.view());
  std::vector<std::uint16_t> bf16(1001);
  const View bf16_view{bf16.data(), 1001, DType::BF16};
  b->cast(bf16_view, a.view());
  b->cast(back.view(), bf16_view);
  for (std::int64_t i = 0; i < 1001; ++i) {
    EXPECT_EQ(f32[i], static_cast<double>(static_cast<float>(a[i])));
    EXPECT_EQ(f64[i], a[i]);
    EXPECT_LE(std::fabs(back[i] - a[i]), std::fabs(a[i]) / 256);
  }
  // Ties go to even (1 + 2^-8 to 1, 1 + 3 * 2^-8 to 1 + 2^-6); just above a tie goes up, even in double.
  const double above = is_double() ? 1 + 0x1p-8 + 0x1p-40 : 1 + 0x1p-8 + 0x1p-23;
  const Buffer ties(dtype(), {1 + 0x1p-8, 1 + 3 * 0x1p-8, above, -above, INFINITY, std::nan("")});
  const View six{bf16.data(), 6, DType::BF16};
  b->cast(six, ties.view());
  EXPECT_EQ(bf16[0], 0x3f80);
  EXPECT_EQ(bf16[1], 0x3f82);
  EXPECT_EQ(bf16[2], 0x3f81);
  EXPECT_EQ(bf16[3], 0xbf81);
  EXPECT_EQ(bf16[4], 0x7f80);
  EXPECT_GT(bf16[5] & 0x7fff, 0x7f80);
}

TEST_P(Elementwise, FillNormalIsAPureFunctionOfItsIndex) {
  on_threads([&](Backend& b) {
    Buffer a(dtype(), 100001), prefix(dtype(), 777), other(dtype(), 777), next(dtype(), 777);
    b.fill_normal(a.view(), 2.0, 42, 7);
    b.fill_normal(prefix.view(), 2.0, 42, 7);
    b.fill_normal(other.view(), 2.0, 42, 8);
    b.fill_normal(next.view(), 2.0, 43, 7);
    double mean = 0, square = 0, fourth = 0;
    int same = 0;
    for (std::int64_t i = 0; i < a.size(); ++i) {
      const double z = a[i] / 2.0;
      mean += z;
      square += z * z;
      fourth += z * z * z * z;
      if (i >= 777) continue;
      EXPECT_EQ(a[i], prefix[i]);
      same += static_cast<int>(a[i] == other[i]) + static_cast<int>(a[i] == next[i]);
    }
    const double n = 100001;
    EXPECT_EQ(same, 0);
    EXPECT_NEAR(mean / n, 0, 0.02);
    EXPECT_NEAR(square / n, 1, 0.02);
    EXPECT_NEAR(fourth / n, 3, 0.15);
    return std::vector<Buffer>{a};
  });
}

TEST_P(Elementwise, FillNormalFromTheMiddleOn) {
  on_threads([&](Backend& b) {
    Buffer all(dtype(), 5001);
    b.fill_normal(all.view(), 2.0, 42, 7);
    for (const std::int64_t first : {0, 1, 2, 777, 4001}) {
      for (const std::int64_t n : {1, 2, 777, 1000}) {
        Buffer part(dtype(), n);
        b.fill_normal_from(part.view(), 2.0, {42, 7, {}, first});
        for (std::int64_t i = 0; i < n; ++i)
          EXPECT_EQ(part[i], all[first + i]) << first << " " << n << " " << i;
      }
    }
    return std::vector<Buffer>{all};
  });
}

TEST_P(Elementwise, FillNormalFollowsPhilox) {
  // The known answer of Philox4x32-10 for the counter 0 and the key 0 is 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
  const double u1 = (static_cast<double>(0xe169c58d6627e8d5ULL >> 11) + 1) * 0x1p-53;
  const double u2 = static_cast<double>(0x9b00dbd8bc57ac4cULL >> 11) * 0x1p-53;
  Buffer a(dtype(), 2);
  backend()->fill_normal(a.view(), 1.0, 0, 0);
  const double radius = std::sqrt(-2 * std::log(u1));
  expect_close(a, {radius * std::cos(2 * M_PI * u2), radius * std::sin(2 * M_PI * u2)}, tolerance(2),
               "normal");
}

TEST_P(Elementwise, Refusals) {
  const auto b = backend();
  Buffer a(dtype(), 4), c(dtype(), 5);
  Buffer wrong(is_double() ? DType::F32 : DType::F64, 4), index(DType::I32, 4);
  expect_error([&] { b->add(a.view(), a.view(), c.view()); }, "add", "got 5, expected 4");
  expect_error([&] { b->add(a.view(), a.view(), wrong.view()); }, "add", "expected fp");
  expect_error([&] { b->accumulate(a.view(), c.view()); }, "accumulate", "in");
  expect_error([&] { b->copy(a.view(), c.view()); }, "copy", "got 5, expected 4");
  expect_error([&] { b->copy(a.view(), wrong.view()); }, "copy", "in");
  expect_error([&] { b->cast(a.view(), c.view()); }, "cast", "got 5");
  expect_error([&] { b->cast(a.view(), index.view()); }, "cast", "int32");
  expect_error([&] { b->sum(a.view(), c.view()); }, "sum", "out");
  expect_error([&] { b->scale(index.view(), 2); }, "scale", "int32");
  expect_error([&] { b->add(View{nullptr, 4, dtype()}, a.view(), a.view()); }, "add", "null");
}

TEST_P(Elementwise, DescriptionNamesIsaAndThreads) {
  const std::string text = backend(2)->description();
  EXPECT_EQ(text.rfind("CPU, ", 0), 0U) << text;
  EXPECT_NE(text.find("2 threads"), std::string::npos) << text;
}

TEST_P(Elementwise, MemoryIsAlignedAndCopied) {
  const auto b = backend();
  void* data = b->allocate(1000);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(data) % 64, 0U);
  std::vector<char> host(1000, 'x'), back(1000, 'y');
  b->copy_from_host(data, host.data(), 1000);
  b->copy_to_host(back.data(), data, 1000);
  b->synchronize();
  EXPECT_EQ(host, back);
  b->release(data, 1000);
}

}  // namespace
}  // namespace fathom::kernel_test
