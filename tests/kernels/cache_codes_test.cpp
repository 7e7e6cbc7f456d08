// Keys and values as 4 and 8 bits keep them, against the definition in double (kernels/cache_codes.h).
#include <algorithm>
#include <cmath>
#include <functional>

#include <fmt/format.h>

#include "tests/kernels/cpu_backends.h"
#include "tests/kernels/cuda/on_device.h"

namespace fathom::kernel_test {
namespace {

using testing_support::backend_for;
using testing_support::expect_internal_error;
using testing_support::isas;

struct HeadKind {
  const char* name;
  std::function<double(std::int64_t e, double normal)> element;
};

// What a head's elements may be like.
const std::vector<HeadKind> kKinds = {
    {"normal", [](std::int64_t, double x) { return x; }},
    {"zeros", [](std::int64_t, double) { return 0.0; }},
    {"equal", [](std::int64_t, double) { return 0.3; }},
    {"equal, large and negative", [](std::int64_t, double) { return -7.7e5; }},
    {"one huge", [](std::int64_t e, double x) { return e == 1 ? 1e30 : x; }},
    {"huge of both signs", [](std::int64_t e, double x) { return (e % 2 == 0 ? 1e20 : -3e20) + x; }},
    {"far from zero", [](std::int64_t, double x) { return 1000 + x; }},
    {"far below zero", [](std::int64_t, double x) { return -1000 + x; }},
    {"tiny", [](std::int64_t, double x) { return 1e-38 * x; }},
};

CacheShape shape(std::int64_t rows, std::int64_t head_dim, int bits) {
  return {.rows = rows, .heads = 3, .kv_heads = 1, .head_dim = head_dim, .bits = bits};
}

/// A row of each kind: three query heads, a key of the kind, and a value of the next one.
Buffer rows_of_all_kinds(DType dtype, std::int64_t d) {
  const auto rows = static_cast<std::int64_t>(kKinds.size());
  Buffer qkv = random(dtype, rows * 5 * d, 3);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t e = 0; e < 2 * d; ++e) {
      const std::int64_t at = (r * 5 + 3) * d + e;
      const auto kind = static_cast<std::size_t>((r + e / d) % rows);
      qkv.set(at, kKinds[kind].element(e % d, qkv[at]));
    }
  }
  return qkv;
}

Buffer round_trip(Backend& backend, const Buffer& qkv, const CacheShape& s) {
  return run_on(backend, {Buffer(qkv.dtype(), qkv.size(), NAN), qkv},
                [&](Backend& b, const std::vector<View>& v) { b.cache_round_trip(v[0], v[1], s); })[0];
}

/// Of one head: as near as the grid is fine, or to the end of what is not clipped. `rounding`: of the dtype.
void expect_as_defined(const std::vector<double>& x, const std::vector<double>& got, int bits,
                       double rounding) {
  const auto [min, max] = std::minmax_element(x.begin(), x.end());
  const double middle = (*max + *min) / 2, half = cache_clip(bits) * (*max - *min) / 2;
  const double low = middle - half, high = middle + half, largest = std::max(std::fabs(*min), *max);
  // Both are rounded to bf16, so that the grid is never finer than it has to be, and hardly coarser.
  const double step =
      (high - low + std::fabs(low) / 128) / ((1 << bits) - 1) * (1 + 1.0 / 128) + std::ldexp(1, -133);
  for (std::size_t e = 0; e < x.size(); ++e) {
    ASSERT_NEAR(got[e], std::clamp(x[e], low, high), step / 2 + (rounding + 0x1p-22) * largest)
        << "element " << e;
  }
}

TEST(CacheCodes, AreWhatTheDefinitionSays) {
  for (const std::string& isa : isas()) {
    for (const DType dtype : {DType::F32, DType::F64}) {
      for (const int bits : {4, 8}) {
        for (const std::int64_t d : {1, 2, 5, 20, 64, 128}) {
          const auto rows = static_cast<std::int64_t>(kKinds.size());
          const Buffer qkv = rows_of_all_kinds(dtype, d);
          const Buffer got = round_trip(*backend_for(isa, 2, false), qkv, shape(rows, d, bits));
          for (std::int64_t head = 0; head < rows * 5; ++head) {
            std::vector<double> x, y;
            for (std::int64_t e = 0; e < d; ++e)
              x.push_back(qkv[head * d + e]), y.push_back(got[head * d + e]);
            SCOPED_TRACE(fmt::format("{} {} {} bits, {} elements, row {} head {}", isa, name_of(dtype), bits,
                                     d, head / 5, head % 5));
            if (head % 5 < 3) {
              ASSERT_EQ(x, y) << "queries";
              continue;
            }
            expect_as_defined(x, y, bits, 0);
            if (::testing::Test::HasFatalFailure()) return;
            if (std::all_of(x.begin(), x.end(), [&](double v) { return v == x[0]; })) {
              for (const double v : y) ASSERT_NEAR(v, x[0], std::fabs(x[0]) * 0x1p-12 + 0x1p-133);
            }
          }
        }
      }
    }
  }
}

TEST(CacheCodes, HaveTheSameBitsByEveryInstructionSetAndInPlace) {
  const Buffer qkv = rows_of_all_kinds(DType::F32, 21);
  const auto rows = static_cast<std::int64_t>(kKinds.size());
  for (const int bits : {4, 8}) {
    const CacheShape s = shape(rows, 21, bits);
    const Buffer first = round_trip(*backend_for(isas().front(), 1, false), qkv, s);
    for (const std::string& isa : isas()) {
      for (const int threads : {1, 3}) {
        const auto backend = backend_for(isa, threads, false);
        EXPECT_EQ(round_trip(*backend, qkv, s).bytes(), first.bytes()) << isa;
        const Buffer in_place = run_on(*backend, {qkv}, [&](Backend& b, const std::vector<View>& v) {
          b.cache_round_trip(v[0], v[0], s);
        })[0];
        EXPECT_EQ(in_place.bytes(), first.bytes()) << isa;
      }
    }
    // What went through once is not finer than the codes: it may move by one more rounding, and no further.
    const Buffer again = round_trip(*backend_for(isas().front(), 1, false), first, s);
    for (std::int64_t i = 0; i < qkv.size(); ++i) ASSERT_TRUE(std::isfinite(again[i]));
  }
}

TEST(CacheCodes, ShowWhatIsNotFinite) {
  for (const double strange : {std::numeric_limits<double>::quiet_NaN(), HUGE_VAL, -HUGE_VAL}) {
    Buffer qkv = random(DType::F32, 2 * 5 * 8, 3);
    qkv.set(5 * 8 + 3 * 8 + 2, strange);  // row 1, its key
    const Buffer got = round_trip(*backend_for(isas().back(), 1, false), qkv, shape(2, 8, 4));
    for (std::int64_t i = 0; i < got.size(); ++i)
      EXPECT_EQ(std::isnan(got[i]), i / 8 == 5 + 3) << "element " << i << " is " << got[i];
  }
}

TEST(CacheCodes, TakeAsManyBytesAsTheySay) {
  CacheShape s{.heads = 8, .kv_heads = 4, .head_dim = 64, .block = 16};
  EXPECT_EQ(s.block_elements(), 2 * 4 * 16 * 64);
  s.bits = 8;
  EXPECT_EQ(s.block_elements(), 2 * 4 * 16 * (64 + 4));
  s.bits = 4;
  EXPECT_EQ(s.block_elements(), 2 * 4 * 16 * (32 + 4));
  s.head_dim = 5;
  EXPECT_EQ(s.block_elements(), 2 * 4 * 16 * (3 + 4));
}

TEST(CacheCodes, RefuseOtherBits) {
  const auto backend = backend_for(isas().front(), 1, false);
  for (const int bits : {0, 2, 5, 16}) {
    expect_internal_error([&] { round_trip(*backend, Buffer(DType::F32, 5 * 4), shape(1, 4, bits)); },
                          {"cache_round_trip", "bits"});
  }
}

class CudaCacheCodes : public CudaKernels {};

TEST_F(CudaCacheCodes, HaveTheBitsOfTheCpu) {
  const auto rows = static_cast<std::int64_t>(kKinds.size());
  for (const int bits : {4, 8}) {
    for (const std::int64_t d : {1, 5, 20, 64, 128, 200}) {
      SCOPED_TRACE(fmt::format("{} bits, {} elements", bits, d));
      const CacheShape s = shape(rows, d, bits);
      const Buffer qkv = rows_of_all_kinds(DType::F32, d);
      EXPECT_EQ(round_trip(cuda(), qkv, s).bytes(), round_trip(cpu(), qkv, s).bytes());
      // bf16: the same numbers, rounded once more.
      const Buffer narrow = rows_of_all_kinds(DType::BF16, d);
      Buffer wide(DType::F32, narrow.size());
      for (std::int64_t i = 0; i < narrow.size(); ++i) wide.set(i, narrow[i]);
      const Buffer expected = round_trip(cpu(), wide, s), got = round_trip(cuda(), narrow, s);
      Buffer rounded(DType::BF16, narrow.size());
      for (std::int64_t i = 0; i < narrow.size(); ++i) rounded.set(i, expected[i]);
      EXPECT_EQ(got.bytes(), rounded.bytes());
    }
  }
}

}  // namespace
}  // namespace fathom::kernel_test
