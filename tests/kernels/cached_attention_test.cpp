// Attention over a cache against attention over whole sequences: the same bits, whatever the schedule by
// which rows came, the rows beside them, and the blocks that hold them.
#include <algorithm>
#include <cmath>
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

struct Sequence {
  std::int64_t length = 0;
  std::int64_t done = 0;
  Buffer qkv{DType::F32, 0}, out{DType::F32, 0};  // whole, and what attention without a cache gives of them
                                                  // and, where there are codes, of what these keep
  std::vector<std::int32_t> blocks;
};

struct Heads {
  std::int64_t heads, kv_heads, head_dim;
  int bits = 16;           // of keys and values in the cache
  bool key_means = false;  // keys become codes without a mean
  std::int64_t row() const { return (heads + 2 * kv_heads) * head_dim; }
  double scale() const { return 1.0 / std::sqrt(static_cast<double>(head_dim)); }
};

/// Of some other keys: far from those that lose it, so that what is forgotten shows.
Buffer means_of(DType dtype, const Heads& h) {
  return random(dtype == DType::F64 ? DType::F64 : DType::F32, h.kv_heads * h.head_dim, 77, 3);
}

Sequence make_sequence(Backend& backend, DType dtype, const Heads& h, std::int64_t length, unsigned seed) {
  Sequence s;
  s.length = length;
  s.qkv = random(dtype, length * h.row(), seed);
  const AttentionShape shape{1, length, h.heads, h.kv_heads, h.head_dim, h.scale()};
  const DType stat = dtype == DType::F64 ? DType::F64 : DType::F32;
  CacheShape codes{
      .rows = length, .heads = h.heads, .kv_heads = h.kv_heads, .head_dim = h.head_dim, .bits = h.bits};
  s.out = run_on(backend,
                 {Buffer(dtype, length * h.heads * h.head_dim, NAN), Buffer(stat, length * h.heads), s.qkv,
                  means_of(dtype, h)},
                 [&](Backend& b, const std::vector<View>& v) {
                   if (h.key_means) codes.key_means = v[3];
                   if (h.bits < 16) b.cache_round_trip(v[2], v[2], codes);
                   b.attention_forward(v[0], v[1], v[2], {}, shape);
                 })[0];
  return s;
}

/// How rows come, and how close they have to be.
struct Schedule {
  bool long_chunks = false;  // many rows of a sequence at a time, as prompts have them
  double tolerance = 0;      // absolute; 0: the same bits
  std::vector<std::int64_t> lengths = {5, 70, 1, 130, 16, 200};
  std::int64_t most_rows = 90;  // of a chunk
};

void expect_equal_to_whole(Backend& backend, DType dtype, const Heads& h, std::int64_t block, unsigned seed,
                           const Schedule& schedule = {}) {
  std::mt19937 random_engine(seed);
  const auto below = [&](std::int64_t n) {
    return std::uniform_int_distribution<std::int64_t>(0, n - 1)(random_engine);
  };
  std::vector<Sequence> all;
  for (const std::int64_t length : schedule.lengths) {
    all.push_back(make_sequence(backend, dtype, h, length, seed + static_cast<unsigned>(all.size())));
  }
  CacheShape s{.heads = h.heads, .kv_heads = h.kv_heads, .head_dim = h.head_dim, .scale = h.scale()};
  s.bits = h.bits;
  s.block = block;
  s.stride = 3, s.offset = 1;
  s.sequences = static_cast<std::int64_t>(all.size());
  s.table = (*std::max_element(schedule.lengths.begin(), schedule.lengths.end()) + block - 1) / block;
  const std::int64_t ids = s.sequences * s.table;
  s.blocks = ids * s.stride;
  std::vector<std::int32_t> free(static_cast<std::size_t>(ids));
  std::iota(free.begin(), free.end(), 0);
  std::shuffle(free.begin(), free.end(), random_engine);
  const std::int64_t size = s.blocks * s.block_elements();
  // Bytes that make scales of NaN.
  DeviceBuffer pool(backend, h.bits < 16 ? Buffer(DType::U8, size, 255) : Buffer(dtype, size, NAN));
  const DeviceBuffer means(backend, means_of(dtype, h));
  if (h.key_means) s.key_means = means.view();

  while (std::any_of(all.begin(), all.end(), [](const Sequence& q) { return q.done < q.length; })) {
    std::vector<double> rows, sequences, lengths, tables(static_cast<std::size_t>(ids), -1);
    std::vector<std::pair<std::int64_t, std::int64_t>> came;  // sequence and entry of each row
    for (std::size_t i = 0; i < all.size(); ++i) {
      Sequence& q = all[i];
      const std::int64_t most = std::min<std::int64_t>(
          q.length - q.done, schedule.long_chunks || below(3) == 0 ? schedule.most_rows : 1);
      const std::int64_t n = most == 0 || below(4) == 0 ? 0 : 1 + below(most);
      for (std::int64_t r = 0; r < n; ++r, ++q.done) {
        if (q.done % block == 0) q.blocks.push_back(free.back()), free.pop_back();
        for (std::int64_t e = 0; e < h.row(); ++e) rows.push_back(q.qkv[q.done * h.row() + e]);
        sequences.push_back(static_cast<double>(i));
        lengths.push_back(static_cast<double>(q.done + 1));
        came.emplace_back(i, q.done);
      }
      for (std::size_t b = 0; b < q.blocks.size(); ++b)
        tables[i * static_cast<std::size_t>(s.table) + b] = q.blocks[b];
    }
    s.rows = static_cast<std::int64_t>(came.size());
    if (s.rows == 0) continue;
    const std::int64_t narrow = h.heads * h.head_dim;
    const Buffer out = run_on(backend,
                              {Buffer(dtype, s.rows * narrow, NAN),
                               Buffer(dtype, rows),
                               {DType::I32, tables},
                               {DType::I32, sequences},
                               {DType::I32, lengths}},
                              [&](Backend& b, const std::vector<View>& v) {
                                b.cache_append(pool.view(), v[1], v[2], v[3], v[4], s);
                                b.cached_attention(v[0], pool.view(), v[1], v[2], v[3], v[4], s);
                              })[0];
    for (std::int64_t r = 0; r < s.rows; ++r) {
      const auto [i, entry] = came[static_cast<std::size_t>(r)];
      for (std::int64_t e = 0; e < narrow; ++e) {
        ASSERT_NEAR(out[r * narrow + e], all[static_cast<std::size_t>(i)].out[entry * narrow + e],
                    schedule.tolerance)
            << "sequence " << i << " entry " << entry << " element " << e << " of " << s.rows << " rows";
      }
    }
  }
}

const std::vector<Heads> kHeads = {{4, 2, 20}, {2, 2, 64}, {8, 1, 32}, {1, 1, 6}};

TEST(CachedAttention, HasTheBitsOfAttentionOverTheWholeSequence) {
  for (const std::string& isa : isas()) {
    for (const int threads : {1, 3}) {
      const auto backend = backend_for(isa, threads, true);
      for (const DType dtype : {DType::F32, DType::F64}) {
        for (const Heads& h : kHeads) {
          for (const std::int64_t block : {16, 32, 48, 64, 128}) {
            SCOPED_TRACE(fmt::format("{} {} threads {} heads {}/{} of {} blocks of {}", isa, threads,
                                     name_of(dtype), h.heads, h.kv_heads, h.head_dim, block));
            expect_equal_to_whole(*backend, dtype, h, block, 7);
            if (::testing::Test::HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

// Of codes: of what they keep. 5, 6 and 20 elements are no whole bytes, words or vectors.
TEST(CachedAttention, OfCodesHasTheBitsOfAttentionOverWhatTheyKeep) {
  for (const std::string& isa : isas()) {
    const auto backend = backend_for(isa, 2, true);
    for (const DType dtype : {DType::F32, DType::F64}) {
      for (const int bits : {4, 8}) {
        for (Heads h :
             {Heads{4, 2, 20, bits}, {2, 2, 64, bits}, {8, 1, 32, bits}, {1, 1, 6, bits}, {3, 1, 5, bits}}) {
          for (const std::int64_t block : {16, 48, 64, 128}) {
            h.key_means = block == 48;
            SCOPED_TRACE(fmt::format("{} {} heads {}/{} of {}, {} bits, blocks of {}", isa, name_of(dtype),
                                     h.heads, h.kv_heads, h.head_dim, bits, block));
            expect_equal_to_whole(*backend, dtype, h, block, 7);
            if (::testing::Test::HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST(CachedAttention, RefusesWhatWouldReadOutside) {
  const auto backend = backend_for(isas().front(), 1, true);
  const CacheShape good{.rows = 1,
                        .heads = 2,
                        .kv_heads = 1,
                        .head_dim = 4,
                        .scale = 1,
                        .block = 16,
                        .blocks = 2,
                        .sequences = 1,
                        .table = 2};
  const auto attend = [&](const CacheShape& s, std::int32_t block, std::int32_t sequence,
                          std::int32_t length) {
    std::vector<float> pool(static_cast<std::size_t>(s.blocks * s.block_elements())), qkv(16), out(8);
    const std::vector<std::int32_t> table{block, 1}, sequences{sequence}, lengths{length};
    using testing_support::view;
    backend->cached_attention(view(out), view(std::as_const(pool)), view(std::as_const(qkv)), view(table),
                              view(sequences), view(lengths), s);
  };
  EXPECT_NO_THROW(attend(good, 0, 0, 3));
  expect_internal_error([&] { attend(good, 2, 0, 3); }, {"cached_attention", "block of a table"});
  expect_internal_error([&] { attend(good, -1, 0, 3); }, {"block of a table"});
  expect_internal_error([&] { attend(good, 0, 1, 3); }, {"a sequence"});
  expect_internal_error([&] { attend(good, 0, 0, 0); }, {"a length"});
  expect_internal_error([&] { attend(good, 0, 0, 33); }, {"a length"});
  CacheShape odd = good;
  odd.block = 24;
  expect_internal_error([&] { attend(odd, 0, 0, 3); }, {"block modulo 16"});
  CacheShape strange = good;
  strange.bits = 5;
  expect_internal_error([&] { attend(strange, 0, 0, 3); }, {"cached_attention", "bits"});
  strange.bits = 4;  // the pool is of floats
  expect_internal_error([&] { attend(strange, 0, 0, 3); }, {"pool", "uint8"});
}

class CudaCachedAttention : public ::testing::Test {};

TEST_F(CudaCachedAttention, HasTheBitsOfAttentionOverTheWholeSequence) {
  const testing_support::OpenedDevice opened =
      testing_support::open_device(Device::Cuda, {.invariant = true});
  testing_support::skip_without(opened);
  if (!opened.backend) return;
  for (const DType dtype : {DType::F32, DType::BF16}) {
    for (const int bits : {16, 8, 4}) {
      for (Heads h : {Heads{4, 2, 20}, {2, 2, 64}, {8, 1, 32}, {1, 1, 6}, {3, 1, 5}}) {
        h.bits = bits;
        for (const std::int64_t block : {16, 48, 64}) {
          h.key_means = block == 48;
          SCOPED_TRACE(fmt::format("{} heads {}/{} of {}, {} bits, blocks of {}", name_of(dtype), h.heads,
                                   h.kv_heads, h.head_dim, bits, block));
          expect_equal_to_whole(*opened.backend, dtype, h, block, 7);
          if (::testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
}

// Prompts: in bf16 and without the invariant mode many rows of a sequence are one block of threads.
TEST_F(CudaCachedAttention, OfPromptsIsCloseToAttentionOverTheWholeSequence) {
  const testing_support::OpenedDevice opened = testing_support::open_device(Device::Cuda, {});
  testing_support::skip_without(opened);
  if (!opened.backend) return;
  for (const int bits : {16, 8, 4}) {
    for (Heads h : {Heads{2, 2, 64}, Heads{8, 1, 32}, Heads{4, 2, 128}, Heads{3, 3, 48}, Heads{4, 2, 20}}) {
      h.bits = bits;
      for (const std::int64_t block : {16, 48, 64, 128}) {
        h.key_means = block == 48;
        for (const unsigned seed : {3U, 11U}) {
          SCOPED_TRACE(fmt::format("heads {}/{} of {}, {} bits, blocks of {}", h.heads, h.kv_heads,
                                   h.head_dim, bits, block));
          expect_equal_to_whole(*opened.backend, DType::BF16, h, block, seed,
                                {.long_chunks = true, .tolerance = 0.02});
          if (::testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
}

// Decoding: single rows, whose entries are cut into pieces where they are many. No means: what this kernel
// reads of codes is exact, and what it is compared with is rounded to bf16, which is more where keys are
// farther from zero.
TEST_F(CudaCachedAttention, OfSingleRowsIsCloseToAttentionOverTheWholeSequence) {
  const testing_support::OpenedDevice opened = testing_support::open_device(Device::Cuda, {});
  testing_support::skip_without(opened);
  if (!opened.backend) return;
  for (const int bits : {16, 8, 4}) {
    for (Heads h : {Heads{2, 2, 64}, Heads{8, 1, 64}, Heads{6, 2, 128}, Heads{4, 4, 128}}) {
      h.bits = bits;
      for (const std::int64_t block : {16, 48, 128}) {
        SCOPED_TRACE(fmt::format("heads {}/{} of {}, {} bits, blocks of {}", h.heads, h.kv_heads, h.head_dim,
                                 bits, block));
        const Schedule schedule{.tolerance = 0.02, .lengths = {5, 700, 1, 300, 31, 32, 33, 47, 48, 49}};
        expect_equal_to_whole(*opened.backend, DType::BF16, h, block, 5, schedule);
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

// What speculative decoding checks: some rows of one sequence.
TEST_F(CudaCachedAttention, OfSomeRowsOfOneSequenceIsCloseToAttentionOverTheWholeSequence) {
  const testing_support::OpenedDevice opened = testing_support::open_device(Device::Cuda, {});
  testing_support::skip_without(opened);
  if (!opened.backend) return;
  for (const int bits : {16, 8, 4}) {
    for (Heads h : {Heads{2, 2, 64}, Heads{8, 1, 64}, Heads{6, 2, 128}, Heads{4, 4, 128}}) {
      h.bits = bits;
      for (const std::int64_t block : {16, 48, 128}) {
        h.key_means = block == 48;
        SCOPED_TRACE(fmt::format("heads {}/{} of {}, {} bits, blocks of {}", h.heads, h.kv_heads, h.head_dim,
                                 bits, block));
        const Schedule schedule{.long_chunks = true, .tolerance = 0.02, .lengths = {700}, .most_rows = 20};
        expect_equal_to_whole(*opened.backend, DType::BF16, h, block, 5, schedule);
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

}  // namespace
}  // namespace fathom::kernel_test
