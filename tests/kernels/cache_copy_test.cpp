// Entries of a cache that are copied, and scores of its chunks, against rows that were appended where they
// belong and sums that are written out.
#include <numeric>
#include <random>

#include <fmt/format.h>

#include "tests/kernels/cpu_backends.h"
#include "tests/kernels/cuda/on_device.h"

namespace fathom::kernel_test {
namespace {

using testing_support::backend_for;
using testing_support::Device;
using testing_support::expect_internal_error;
using testing_support::isas;

struct Heads {
  std::int64_t heads, kv_heads, head_dim;
  int bits;
  std::int64_t row() const { return (heads + 2 * kv_heads) * head_dim; }
};
const std::vector<Heads> kHeads = {{4, 2, 20, 16}, {2, 2, 64, 16}, {8, 1, 6, 16}, {4, 2, 20, 8},
                                   {2, 2, 64, 8},  {4, 2, 20, 4},  {3, 1, 5, 4}};

CacheShape shape_of(const Heads& h, std::int64_t block, std::int64_t sequences, std::int64_t table) {
  CacheShape s{.heads = h.heads, .kv_heads = h.kv_heads, .head_dim = h.head_dim, .scale = 0.3};
  s.block = block;
  s.sequences = sequences;
  s.table = table;
  s.stride = 2, s.offset = 1;
  s.blocks = sequences * table * s.stride;
  s.bits = h.bits;
  return s;
}

/// Sequence i has the blocks i, i + sequences, and so on: none of them side by side.
std::vector<double> tables_of(const CacheShape& s) {
  std::vector<double> tables;
  for (std::int64_t i = 0; i < s.sequences; ++i) {
    for (std::int64_t b = 0; b < s.table; ++b) tables.push_back(static_cast<double>(b * s.sequences + i));
  }
  return tables;
}

double number_of(const CacheShape& s, std::int64_t sequence, std::int64_t entry) {
  const std::int64_t block = s.block_of(entry / s.block * s.sequences + sequence);
  return static_cast<double>(block * s.block + entry % s.block);
}

Buffer pool_of(const CacheShape& s, DType dtype) {
  const std::int64_t size = s.blocks * s.block_elements();
  return s.bits < 16 ? Buffer(DType::U8, size, 255) : Buffer(dtype, size, NAN);
}

// Sequence 0 has all entries; of head g entry i of sequence 1 is a copy of entry chosen[g][i]; sequence 2 was
// given the same rows one by one. A query sees the same in both.
void expect_copies(Backend& backend, DType dtype, const Heads& h, std::int64_t block, unsigned seed) {
  constexpr std::int64_t kEntries = 90, kChosen = 41;
  const CacheShape s = shape_of(h, block, 3, (kEntries + block - 1) / block);
  std::mt19937 random_engine(seed);
  std::vector<std::vector<std::int64_t>> chosen;
  for (std::int64_t g = 0; g < h.kv_heads; ++g) {
    std::vector<std::int64_t> all(kEntries);
    std::iota(all.begin(), all.end(), 0);
    std::shuffle(all.begin(), all.end(), random_engine);
    all.resize(kChosen);
    chosen.push_back(all);
  }
  const Buffer rows = random(dtype, kEntries * h.row(), seed);
  Buffer given(dtype, kChosen * h.row());  // to sequence 2
  std::vector<double> from, to, sequences(kEntries, 0), lengths(kEntries), twos(kChosen, 2);
  std::iota(lengths.begin(), lengths.end(), 1);
  for (std::int64_t g = 0; g < h.kv_heads; ++g) {
    for (std::int64_t i = 0; i < kChosen; ++i) {
      const std::int64_t entry = chosen[static_cast<std::size_t>(g)][static_cast<std::size_t>(i)];
      from.push_back(number_of(s, 0, entry));
      for (const std::int64_t head : {h.heads + g, h.heads + h.kv_heads + g}) {
        for (std::int64_t e = 0; e < h.head_dim; ++e)
          given.set(i * h.row() + head * h.head_dim + e, rows[entry * h.row() + head * h.head_dim + e]);
      }
    }
  }
  for (std::int64_t i = 0; i < kChosen; ++i) to.push_back(number_of(s, 1, i));
  const Buffer query = random(dtype, 2 * h.row(), seed + 1);
  Buffer twice(dtype, 2 * h.row());
  for (std::int64_t e = 0; e < 2 * h.row(); ++e) twice.set(e, query[e % h.row()]);
  const Buffer out = run_on(backend,
                            {Buffer(dtype, 2 * h.heads * h.head_dim, NAN),
                             pool_of(s, dtype),
                             rows,
                             given,
                             twice,
                             {DType::I32, tables_of(s)},
                             {DType::I32, sequences},
                             {DType::I32, lengths},
                             {DType::I32, twos},
                             {DType::I32, from},
                             {DType::I32, to},
                             integers({1, 2}),
                             integers({kChosen, kChosen})},
                            [&](Backend& b, const std::vector<View>& v) {
                              CacheShape of = s;
                              of.rows = kEntries;
                              b.cache_append(v[1], v[2], v[5], v[6], v[7], of);
                              of.rows = kChosen;
                              b.cache_append(v[1], v[3], v[5], v[8], {v[7].data, kChosen, DType::I32}, of);
                              b.cache_copy(v[1], v[9], v[10], kChosen, s);
                              of.rows = 2;
                              b.cached_attention(v[0], v[1], v[4], v[5], v[11], v[12], of);
                            })[0];
  for (std::int64_t e = 0; e < h.heads * h.head_dim; ++e)
    ASSERT_EQ(out[e], out[h.heads * h.head_dim + e]) << "element " << e;
}

void expect_scores(Backend& backend, DType dtype, const Heads& h, std::int64_t block, std::int64_t chunk,
                   double tolerance) {
  constexpr std::int64_t kEntries = 700;
  const std::int64_t chunks = kEntries / chunk;
  const CacheShape s = shape_of(h, block, 1, (kEntries + block - 1) / block);
  const DType stat = dtype == DType::F64 ? DType::F64 : DType::F32;
  Buffer rows = random(dtype, kEntries * h.row(), 3);
  const Buffer query = random(dtype, h.heads * h.head_dim, 4);
  std::vector<double> lengths(kEntries);
  std::iota(lengths.begin(), lengths.end(), 1);
  const std::vector<Buffer> out = run_on(backend,
                                         {Buffer(stat, h.kv_heads * chunks, NAN),
                                          pool_of(s, dtype),
                                          rows,
                                          query,
                                          {DType::I32, tables_of(s)},
                                          Buffer(DType::I32, kEntries, 0),
                                          {DType::I32, lengths}},
                                         [&](Backend& b, const std::vector<View>& v) {
                                           CacheShape of = s;
                                           of.rows = kEntries;
                                           b.cache_append(v[1], v[2], v[4], v[5], v[6], of);
                                           b.cache_chunk_scores(v[0], v[1], v[3], v[4], chunks, chunk, s);
                                           if (h.bits < 16) b.cache_round_trip(v[2], v[2], of);
                                         });
  rows = out[2];
  for (std::int64_t g = 0; g < h.kv_heads; ++g) {
    for (std::int64_t c = 0; c < chunks; ++c) {
      double expected = 0;
      for (std::int64_t e = 0; e < h.head_dim; ++e) {
        double q = 0, k = 0;
        const std::int64_t group = h.heads / h.kv_heads;
        for (std::int64_t i = 0; i < group; ++i) q += query[(g * group + i) * h.head_dim + e];
        for (std::int64_t i = c * chunk; i < (c + 1) * chunk; ++i)
          k += rows[i * h.row() + (h.heads + g) * h.head_dim + e];
        expected += q * k / static_cast<double>(chunk);
      }
      ASSERT_NEAR(out[0][g * chunks + c], expected, tolerance) << "head " << g << " chunk " << c;
    }
  }
}

TEST(CacheCopy, SeesWhatItWasGiven) {
  for (const std::string& isa : isas()) {
    const auto backend = backend_for(isa, 2, true);
    for (const DType dtype : {DType::F32, DType::F64}) {
      for (const Heads& h : kHeads) {
        for (const std::int64_t block : {16, 48, 64}) {
          SCOPED_TRACE(fmt::format("{} {} heads {}/{} of {}, {} bits, blocks of {}", isa, name_of(dtype),
                                   h.heads, h.kv_heads, h.head_dim, h.bits, block));
          expect_copies(*backend, dtype, h, block, 5);
          if (::testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(CacheChunkScores, AreThoseOfMeanKeys) {
  for (const std::string& isa : isas()) {
    const auto backend = backend_for(isa, 2, true);
    for (const DType dtype : {DType::F32, DType::F64}) {
      for (const Heads& h : kHeads) {
        for (const std::int64_t chunk : {1, 5, 8, 64, 100}) {
          SCOPED_TRACE(fmt::format("{} {} heads {}/{} of {}, {} bits, chunks of {}", isa, name_of(dtype),
                                   h.heads, h.kv_heads, h.head_dim, h.bits, chunk));
          expect_scores(*backend, dtype, h, 48, chunk, dtype == DType::F64 ? 1e-10 : 1e-3);
          if (::testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(CacheCopy, RefusesWhatWouldReadOutside) {
  const auto backend = backend_for(isas().front(), 1, true);
  const Heads h{2, 1, 4, 16};
  const CacheShape s = shape_of(h, 16, 1, 2);  // 64 entries
  std::vector<float> pool(static_cast<std::size_t>(s.blocks * s.block_elements())), scores(9);
  const std::vector<float> query(8);
  using testing_support::view;
  const auto copy = [&](std::int32_t from, std::int32_t to) {
    const std::vector<std::int32_t> source{from}, target{to};
    backend->cache_copy(view(pool), view(source), view(target), 1, s);
  };
  EXPECT_NO_THROW(copy(63, 0));
  expect_internal_error([&] { copy(64, 0); }, {"cache_copy", "an entry to copy"});
  expect_internal_error([&] { copy(0, -1); }, {"an entry's place"});
  const auto score = [&](std::int64_t chunks, std::int32_t block) {
    const std::vector<std::int32_t> table{block, 1};
    backend->cache_chunk_scores(testing_support::view(scores), view(std::as_const(pool)), view(query),
                                view(table), chunks, 4, s);
  };
  scores.resize(8);
  EXPECT_NO_THROW(score(8, 0));
  expect_internal_error([&] { score(8, 2); }, {"cache_chunk_scores", "a block of the table"});
  scores.resize(9);
  expect_internal_error([&] { score(9, 0); }, {"chunks"});
}

class CudaCacheCopy : public ::testing::Test {};

TEST_F(CudaCacheCopy, SeesWhatItWasGivenAndScoresAreThoseOfMeanKeys) {
  const testing_support::OpenedDevice opened =
      testing_support::open_device(Device::Cuda, {.invariant = true});
  testing_support::skip_without(opened);
  if (!opened.backend) return;
  for (const DType dtype : {DType::F32, DType::BF16}) {
    for (const Heads& h : kHeads) {
      for (const std::int64_t block : {16, 48, 64}) {
        SCOPED_TRACE(fmt::format("{} heads {}/{} of {}, {} bits, blocks of {}", name_of(dtype), h.heads,
                                 h.kv_heads, h.head_dim, h.bits, block));
        expect_copies(*opened.backend, dtype, h, block, 5);
        // In bf16 a key that is read as its code is more exact than the number that comes back.
        for (const std::int64_t chunk : {1, 5, 8, 100})
          expect_scores(*opened.backend, dtype, h, block, chunk, dtype == DType::F32 ? 1e-3 : 0.3);
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

}  // namespace
}  // namespace fathom::kernel_test
