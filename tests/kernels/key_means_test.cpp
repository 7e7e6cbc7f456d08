// Keys that become codes without their mean (kernels/cache_codes.h): what is coded then, and that attention
// over it is attention over the keys as they were.
#include <algorithm>
#include <cmath>
#include <cstring>

#include <fmt/format.h>

#include "tests/kernels/cpu_backends.h"
#include "tests/kernels/cuda/on_device.h"

namespace fathom::kernel_test {
namespace {

using testing_support::backend_for;
using testing_support::expect_internal_error;
using testing_support::isas;

constexpr std::int64_t kHeads = 4, kKvHeads = 2, kGroups = kHeads + 2 * kKvHeads;

CacheShape shape(std::int64_t rows, std::int64_t head_dim, int bits) {
  return {.rows = rows, .heads = kHeads, .kv_heads = kKvHeads, .head_dim = head_dim, .bits = bits};
}

DType stat_of(DType dtype) { return dtype == DType::F64 ? DType::F64 : DType::F32; }
bool is_key(std::int64_t at, std::int64_t d) {
  const std::int64_t head = at / d % kGroups;
  return head >= kHeads && head < kHeads + kKvHeads;
}
/// Of an element of a key, where its mean stands.
std::int64_t mean_at(std::int64_t at, std::int64_t d) { return (at / d % kGroups - kHeads) * d + at % d; }

/// Normal rows; to each key its head's common vector is added, `share` times as large.
struct Rows {
  Rows(DType dtype, std::int64_t n, std::int64_t d, double share)
      : qkv(random(dtype, n * kGroups * d, 5)), means(stat_of(dtype), kKvHeads * d) {
    const Buffer common = random(DType::F64, kKvHeads * d, 6);
    std::vector<double> sums(static_cast<std::size_t>(kKvHeads * d));
    for (std::int64_t i = 0; i < qkv.size(); ++i) {
      if (!is_key(i, d)) continue;
      const std::int64_t at = mean_at(i, d);
      qkv.set(i, qkv[i] + share * common[at]);
      sums[static_cast<std::size_t>(at)] += qkv[i] / static_cast<double>(n);
    }
    for (std::int64_t i = 0; i < means.size(); ++i) means.set(i, sums[static_cast<std::size_t>(i)]);
  }
  Buffer qkv, means;  // [n, (H+2G)d], and the mean of the keys [G, d]
};

Buffer round_trip(Backend& backend, const Buffer& qkv, const Buffer& means, CacheShape s) {
  return run_on(backend, {Buffer(qkv.dtype(), qkv.size(), NAN), qkv, means},
                [&](Backend& b, const std::vector<View>& v) {
                  s.key_means = v[2];
                  b.cache_round_trip(v[0], v[1], s);
                })[0];
}

// The codes of a key without its mean are those of the difference in fp32; queries and values keep theirs.
TEST(KeyMeans, AreTakenOffKeysAlone) {
  for (const std::string& isa : isas()) {
    const auto backend = backend_for(isa, 2, false);
    for (const DType dtype : {DType::F32, DType::F64}) {
      for (const int bits : {4, 8}) {
        for (const std::int64_t d : {1, 5, 20, 64, 128}) {
          SCOPED_TRACE(fmt::format("{} {} {} bits, {} elements", isa, name_of(dtype), bits, d));
          const Rows rows(dtype, 19, d, 10);
          const CacheShape s = shape(19, d, bits);
          Buffer shifted = rows.qkv;
          for (std::int64_t i = 0; i < shifted.size(); ++i) {
            if (!is_key(i, d)) continue;
            shifted.set(i, static_cast<float>(rows.qkv[i]) - static_cast<float>(rows.means[mean_at(i, d)]));
          }
          const Buffer got = round_trip(*backend, rows.qkv, rows.means, s);
          EXPECT_EQ(got.bytes(),
                    round_trip(*backend, shifted, Buffer(rows.means.dtype(), kKvHeads * d), s).bytes());
          EXPECT_NE(got.bytes(),
                    round_trip(*backend, rows.qkv, Buffer(rows.means.dtype(), kKvHeads * d), s).bytes());
        }
      }
    }
  }
}

// Against differences in double: as near as the grid is fine, or to the end of what is not clipped.
TEST(KeyMeans, LeaveWhatTheDefinitionSays) {
  for (const int bits : {4, 8}) {
    for (const std::int64_t d : {5, 64, 128}) {
      const Rows rows(DType::F32, 33, d, 10);
      const Buffer got =
          round_trip(*backend_for(isas().back(), 2, false), rows.qkv, rows.means, shape(33, d, bits));
      for (std::int64_t first = 0; first < got.size(); first += d) {
        if (!is_key(first, d)) continue;
        std::vector<double> x;
        for (std::int64_t e = 0; e < d; ++e)
          x.push_back(rows.qkv[first + e] - rows.means[mean_at(first + e, d)]);
        const auto [min, max] = std::minmax_element(x.begin(), x.end());
        const double middle = (*max + *min) / 2, half = cache_clip(bits) * (*max - *min) / 2;
        const double step = (2 * half + std::fabs(middle - half) / 128) / ((1 << bits) - 1) * (1 + 1.0 / 128);
        for (std::int64_t e = 0; e < d; ++e) {
          const double kept = std::clamp(x[static_cast<std::size_t>(e)], middle - half, middle + half);
          ASSERT_NEAR(got[first + e], kept, step / 2 + 1e-5) << bits << " bits, element " << e << " of " << d;
        }
      }
    }
  }
}

/// Attention over all rows, of keys and values as codes keep them; 16 bits: of the numbers.
Buffer attend(const Buffer& qkv, const Buffer& means, bool without_mean, int bits, std::int64_t n,
              std::int64_t d) {
  const AttentionShape whole{1, n, kHeads, kKvHeads, d, 1 / std::sqrt(static_cast<double>(d))};
  return run_on(*backend_for(isas().back(), 2, false),
                {Buffer(qkv.dtype(), n * kHeads * d, NAN), Buffer(DType::F64, n * kHeads), qkv, means},
                [&](Backend& b, const std::vector<View>& v) {
                  CacheShape s = shape(n, d, bits);
                  if (without_mean) s.key_means = v[3];
                  if (bits < 16) b.cache_round_trip(v[2], v[2], s);
                  b.attention_forward(v[0], v[1], v[2], {}, whole);
                })[0];
}

double distance(const Buffer& a, const Buffer& b) {
  double error = 0, size = 0;
  for (std::int64_t i = 0; i < a.size(); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    size += b[i] * b[i];
  }
  return std::sqrt(error / size);
}

// A vector that all keys share, ten times as large as what tells them apart: codes that have to span it lose
// what attention looks at, and codes without it lose what they lose where there is none.
TEST(KeyMeans, KeepAttentionWhereKeysShareALargeVector) {
  constexpr std::int64_t kRows = 96, kDim = 64;
  const Rows plain(DType::F64, kRows, kDim, 0), planted(DType::F64, kRows, kDim, 10);
  const Buffer exact = attend(planted.qkv, planted.means, false, 16, kRows, kDim);
  EXPECT_LT(distance(exact, attend(plain.qkv, plain.means, false, 16, kRows, kDim)), 1e-12);
  for (const int bits : {4, 8}) {
    const double usual = distance(attend(plain.qkv, plain.means, false, bits, kRows, kDim), exact);
    const double with = distance(attend(planted.qkv, planted.means, true, bits, kRows, kDim), exact);
    const double without = distance(attend(planted.qkv, planted.means, false, bits, kRows, kDim), exact);
    EXPECT_LT(with, 1.1 * usual) << bits << " bits";
    EXPECT_LT(with, bits == 4 ? 0.2 : 0.02) << bits << " bits";
    EXPECT_GT(without, 3 * with) << bits << " bits";
  }
}

TEST(KeyMeans, OfOtherShapesAndTypesAreRefused) {
  const auto backend = backend_for(isas().front(), 1, false);
  const Buffer qkv = random(DType::F32, 3 * kGroups * 8, 1);
  expect_internal_error([&] { round_trip(*backend, qkv, Buffer(DType::F32, 8), shape(3, 8, 4)); },
                        {"cache_round_trip", "key_means"});
  expect_internal_error([&] { round_trip(*backend, qkv, Buffer(DType::F64, 16), shape(3, 8, 4)); },
                        {"cache_round_trip", "key_means"});
}

/// A pool of one sequence's blocks behind an append, and how codes lie in it.
struct Pool {
  CacheShape s;
  std::vector<unsigned char> bytes;
  bool is_cpu;

  Pool(Backend& backend, const Buffer& qkv, const Buffer& means, std::int64_t n, std::int64_t d, int bits)
      : s(shape(n, d, bits)), is_cpu(backend.is_cpu()) {
    s.block = 16;
    s.blocks = s.table = (n + 15) / 16;
    s.sequences = 1;
    Buffer tables(DType::I32, s.table), lengths(DType::I32, n);
    for (std::int64_t i = 0; i < s.table; ++i) tables.set(i, static_cast<double>(s.table - 1 - i));
    for (std::int64_t i = 0; i < n; ++i) lengths.set(i, static_cast<double>(i + 1));
    bytes = run_on(backend,
                   {Buffer(DType::U8, s.blocks * s.block_elements()), qkv, means, tables,
                    Buffer(DType::I32, n), lengths},
                   [&](Backend& b, const std::vector<View>& v) {
                     CacheShape of = s;
                     of.key_means = v[2];
                     b.cache_append(v[0], v[1], v[3], v[4], v[5], of);
                   })[0]
                .bytes();
  }
  const unsigned char* block_of(std::int64_t entry) const {
    return bytes.data() + (s.table - 1 - entry / s.block) * s.block_elements();
  }
  /// `head`: of the keys, or with kv_heads added of the values.
  int code(std::int64_t head, std::int64_t entry, std::int64_t e) const {
    const std::int64_t size = cache_code_bytes(s.head_dim, s.bits), inside = entry % s.block;
    const bool is_value = head >= s.kv_heads;
    const std::int64_t halves = (s.head_dim + 1) / 2;
    const bool is_upper = s.bits == 4 && (is_cpu && is_value ? e >= halves : e % 2 == 1);
    const std::int64_t byte = s.bits == 8 ? e : is_cpu && is_value ? e % halves : e / 2;
    const std::int64_t at = is_cpu && !is_value ? (head * size + byte) * s.block + inside
                                                : (head * s.block + inside) * size + byte;
    const int both = block_of(entry)[at];
    return s.bits == 8 ? both : is_upper ? both >> 4 : both & 15;
  }
  std::uint32_t scale(std::int64_t head, std::int64_t entry) const {
    const std::int64_t codes = 2 * s.kv_heads * s.block * cache_code_bytes(s.head_dim, s.bits);
    std::uint32_t word = 0;
    std::memcpy(&word, block_of(entry) + codes + (head * s.block + entry % s.block) * 4, sizeof(word));
    return word;
  }
};

// What is appended is what goes through the codes and back.
TEST(KeyMeans, AreTakenOffWhatIsAppended) {
  const auto backend = backend_for(isas().back(), 2, false);
  for (const int bits : {4, 8}) {
    for (const std::int64_t d : {5, 20, 64}) {
      const Rows rows(DType::F32, 37, d, 10);
      const Buffer back = round_trip(*backend, rows.qkv, rows.means, shape(37, d, bits));
      const Pool pool(*backend, rows.qkv, rows.means, 37, d, bits);
      for (std::int64_t i = 0; i < back.size(); ++i) {
        const std::int64_t entry = i / d / kGroups, head = i / d % kGroups - kHeads;
        if (head < 0) continue;
        const std::uint32_t word = pool.scale(head, entry), steps = word << 16, lows = word & 0xffff0000U;
        float step = 0, low = 0;
        std::memcpy(&step, &steps, sizeof(step));
        std::memcpy(&low, &lows, sizeof(low));
        ASSERT_EQ(low + step * static_cast<float>(pool.code(head, entry, i % d)), back[i])
            << bits << " bits, entry " << entry << " head " << head << " element " << i % d;
      }
    }
  }
}

class CudaKeyMeans : public CudaKernels {};

TEST_F(CudaKeyMeans, LeaveTheCodesOfTheCpu) {
  for (const int bits : {4, 8}) {
    for (const std::int64_t d : {1, 5, 20, 64, 128, 200}) {
      for (const DType dtype : {DType::F32, DType::BF16}) {
        SCOPED_TRACE(fmt::format("{} {} bits, {} elements", name_of(dtype), bits, d));
        constexpr std::int64_t kRows = 37;
        const Rows rows(dtype, kRows, d, 10);
        Buffer wide(DType::F32, rows.qkv.size());
        for (std::int64_t i = 0; i < wide.size(); ++i) wide.set(i, rows.qkv[i]);
        // bf16: the same numbers, rounded once more.
        const Buffer expected = round_trip(cpu(), wide, rows.means, shape(kRows, d, bits));
        Buffer rounded(dtype, wide.size());
        for (std::int64_t i = 0; i < wide.size(); ++i) rounded.set(i, expected[i]);
        EXPECT_EQ(round_trip(cuda(), rows.qkv, rows.means, shape(kRows, d, bits)).bytes(), rounded.bytes());
        const Pool ours(cuda(), rows.qkv, rows.means, kRows, d, bits),
            theirs(cpu(), wide, rows.means, kRows, d, bits);
        for (std::int64_t entry = 0; entry < kRows; ++entry) {
          for (std::int64_t head = 0; head < 2 * kKvHeads; ++head) {
            ASSERT_EQ(ours.scale(head, entry), theirs.scale(head, entry)) << entry << " " << head;
            for (std::int64_t e = 0; e < d; ++e)
              ASSERT_EQ(ours.code(head, entry, e), theirs.code(head, entry, e))
                  << entry << " " << head << " " << e;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace fathom::kernel_test
