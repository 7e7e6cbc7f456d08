// Rows that a cache takes back, and sequences that it makes of others' entries: what is computed behind them
// has the bits of a sequence that was never otherwise.
#include <algorithm>
#include <numeric>

#include <gtest/gtest.h>

#include "infer/speculate/cached_model.h"
#include "tests/devices.h"
#include "tests/infer/tiny_models.h"

namespace fathom {
namespace {

using namespace tiny_models;
using Ids = std::vector<std::int32_t>;

Ids random_ids(std::int64_t n, unsigned seed) {
  std::mt19937_64 r(seed);
  Ids ids(static_cast<std::size_t>(n));
  for (std::int32_t& id : ids) id = static_cast<std::int32_t>(r() % kVocab);
  return ids;
}

constexpr std::int64_t kContext = 160;

KvCache cache_for(Model& m, std::int64_t sequences) {
  const std::int64_t groups = sequences * (kContext / 16 + 6);
  return {m.c, m.model, {.block = 16, .bytes = groups * 16 * 4 * KvCache::entry_bytes(m.c, m.model)}};
}
CachedModel cached(Model& m, KvCache& cache) { return {m.c, m.model, m.rule, cache, kVocab, 40}; }
std::vector<std::int64_t> entries(Model& m, const KvCache& cache, SequenceId id) {
  std::vector<std::int64_t> all;
  for (std::int64_t l = 0; l < m.model.config().depth; ++l) all.push_back(cache.entries(id, l));
  return all;
}

class KvCacheCopies : public ::testing::TestWithParam<Case> {};

void expect_no_trace(Model& m) {
  for (const int bits : {16, 4}) {
    m.model.set_kv_bits(bits);
    KvCache cache = cache_for(m, 3);
    const CachedModel cm = cached(m, cache);
    const Ids ids = random_ids(150, 1);
    const SequenceId a = cache.add(), b = cache.add();
    std::mt19937_64 r(2);
    std::int64_t done = 0;
    while (done < 150) {
      const std::int64_t n = std::min<std::int64_t>(1 + static_cast<std::int64_t>(r() % 20), 150 - done);
      const auto next = std::span(ids).subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(n));
      // Others first, which are taken back in part or all.
      if (done + 25 < 150) {
        Ids others = random_ids(20, static_cast<unsigned>(done));
        const auto same = static_cast<std::ptrdiff_t>(r() % 6);
        std::copy(ids.begin() + done, ids.begin() + done + same, others.begin());
        cm.add(a, others, done, 0);
        cache.truncate(a, done + same);
        const auto rest = next.subspan(std::min(next.size(), static_cast<std::size_t>(same)));
        const std::int64_t at = std::min(done + same, done + n);
        cache.truncate(a, at);
        if (rest.empty()) {
          cm.add(b, next, done, 0);
          done += n;
          EXPECT_EQ(entries(m, cache, a), entries(m, cache, b));
          continue;
        }
        EXPECT_EQ(cm.add(a, rest, at, 1).logits, cm.add(b, next, done, 1).logits);
      } else {
        EXPECT_EQ(cm.add(a, next, done, 1).logits, cm.add(b, next, done, 1).logits);
      }
      done += n;
      EXPECT_EQ(entries(m, cache, a), entries(m, cache, b));
    }
    cache.remove(a);
    cache.remove(b);
    EXPECT_EQ(cache.pool().free_groups(), cache.pool().groups());
  }
}

void expect_that_copies_go_on(Model& m) {
  for (const int bits : {16, 8, 4}) {
    m.model.set_kv_bits(bits);
    KvCache cache = cache_for(m, 3);
    const CachedModel cm = cached(m, cache);
    const Ids ids = random_ids(100, 1), more = random_ids(9, 2);
    const SequenceId a = cache.add(), b = cache.add();
    cm.add(a, ids, 0, 0);
    for (const auto& [begin, end] : std::vector<std::pair<int, int>>{{0, 3}, {3, 50}, {50, 50}, {50, 100}})
      cache.append_tokens(m.c, b, a, begin, end);
    EXPECT_EQ(entries(m, cache, a), entries(m, cache, b));
    EXPECT_EQ(cm.add(a, more, 100, 9).logits, cm.add(b, more, 100, 9).logits);
    // Of a copy too rows are taken back.
    for (const SequenceId id : {a, b}) cache.truncate(id, 60);
    EXPECT_EQ(entries(m, cache, a), entries(m, cache, b));
    EXPECT_EQ(cm.add(a, more, 60, 9).logits, cm.add(b, more, 60, 9).logits);
  }
}

TEST_P(KvCacheCopies, RowsThatWereTakenBackLeaveNoTrace) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, GetParam().routing, kContext);
  expect_no_trace(m);
}

TEST_P(KvCacheCopies, ACopyGoesOnAsTheOriginal) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, GetParam().routing, kContext);
  expect_that_copies_go_on(m);
}

TEST_P(KvCacheCopies, AllEntriesChosenAreACopyToo) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, GetParam().routing, kContext);
  KvCache cache = cache_for(m, 3);
  const CachedModel cm = cached(m, cache);
  const Ids ids = random_ids(70, 1), more = random_ids(9, 2);
  const SequenceId a = cache.add(), b = cache.add();
  cm.add(a, ids, 0, 0);
  std::vector<KvCache::Chosen> chosen;
  for (const std::int64_t n : entries(m, cache, a)) {
    KvCache::Chosen all(static_cast<std::size_t>(2 * n));
    for (std::size_t i = 0; i < all.size(); ++i)
      all[i] = static_cast<std::int32_t>(i % static_cast<std::size_t>(n));
    chosen.push_back(all);
  }
  cache.append_chosen(m.c, b, a, 70, chosen);
  EXPECT_EQ(entries(m, cache, a), entries(m, cache, b));
  const std::vector<float> expected = cm.add(a, more, 70, 9).logits;
  EXPECT_EQ(cm.add(b, more, 70, 9).logits, expected);
  // What was chosen stays when later rows are taken back.
  cache.truncate(b, 70);
  EXPECT_EQ(cm.add(b, more, 70, 9).logits, expected);
}

// A layer that gave entries back keeps its blocks, and they are no help to another layer that is at an edge.
TEST(KvCacheRoom, WhatOneLayerHoldsTooMuchIsNotAnothers) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, depth(CausalMethod::Predictor, 1), kContext);
  KvCache cache = cache_for(m, 3);
  const std::vector<std::int64_t> routed = m.model.routed_layers();
  ASSERT_GE(routed.size(), 2U);
  const SequenceId a = cache.add(), b = cache.add();
  cache.assume(a, 60, 30);
  // So many entries of both heads, by layer: of the first routed one, of the others, of dense ones.
  const auto append = [&](std::int64_t first, std::int64_t others, std::int64_t tokens) {
    std::vector<KvCache::Chosen> chosen;
    for (std::int64_t l = 0; l < m.model.config().depth; ++l) {
      const std::int64_t n = l == routed[0] ? first : m.model.routing().routes(l) ? others : tokens;
      KvCache::Chosen of_layer;
      for (std::int64_t i = 0; i < 2 * n; ++i) of_layer.push_back(static_cast<std::int32_t>(i % n));
      chosen.push_back(of_layer);
    }
    cache.append_chosen(m.c, b, a, tokens, chosen);
  };
  append(12, 16, 20);
  append(6, 0, 6);
  cache.truncate(b, 20);
  ASSERT_EQ(cache.entries(b, routed[0]), 12);
  ASSERT_EQ(cache.entries(b, routed[1]), 16);
  // As many groups as it says are enough.
  const std::int64_t need = cache.missing_groups(b, 21, 1);
  while (cache.pool().free_groups() > need) {
    const SequenceId other = cache.add();
    cache.assume(other, cache.block(), 0);
    if (cache.tokens(other) == 0) break;
  }
  EXPECT_NO_THROW(cache.reserve(b, 1));
}

// A chunk of one entry scores as its key does: the newest query's product with it.
TEST_P(KvCacheCopies, ChunksAreScoredByTheNewestQueryOfTheSequence) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, GetParam().routing, kContext);
  KvCache cache = cache_for(m, 3);
  const CachedModel cm = cached(m, cache);
  const SequenceId a = cache.add(), b = cache.add();
  cache.watch(a);
  EXPECT_TRUE(cache.chunk_scores(m.c, a, 0, 1, 1).empty());
  cm.add(a, random_ids(60, 1), 0, 0);
  const auto scores = [&](std::int64_t chunk) {
    std::vector<std::vector<float>> all;
    for (std::int64_t l = 0; l < m.model.config().depth; ++l)
      all.push_back(cache.chunk_scores(m.c, a, l, cache.entries(a, l) / chunk, chunk));
    return all;
  };
  const auto before = scores(1), wide = scores(4);
  cm.add(b, random_ids(30, 3), 0, 0);  // of others nothing is kept
  EXPECT_EQ(scores(1), before);
  for (std::size_t l = 0; l < before.size(); ++l) {
    const std::size_t n = before[l].size() / 2, chunks = wide[l].size() / 2;
    for (std::size_t g = 0; g < 2; ++g) {
      for (std::size_t k = 0; k < chunks; ++k) {
        double mean = 0;
        for (std::size_t i = 0; i < 4; ++i) mean += before[l][g * n + 4 * k + i] / 4;
        EXPECT_NEAR(wide[l][g * chunks + k], mean, 1e-4);
      }
    }
  }
  cm.add(a, random_ids(8, 9), 60, 0);
  EXPECT_NE(scores(1), before);
}

class CudaKvCacheCopies : public ::testing::TestWithParam<Case> {};

TEST_P(CudaKvCacheCopies, AreAsGoodAsTheOriginalAndLeaveNoTrace) {
  const testing_support::OpenedDevice opened =
      testing_support::open_device(testing_support::Device::Cuda, {.invariant = true});
  testing_support::skip_without(opened);
  if (!opened.backend) return;
  for (const DType dtype : {DType::F32, DType::BF16}) {
    SCOPED_TRACE(name_of(dtype));
    Model m(opened.backend, dtype, GetParam().routing, kContext);
    expect_no_trace(m);
    expect_that_copies_go_on(m);
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, CudaKvCacheCopies, ::testing::ValuesIn(cases()),
                         [](const auto& kind) { return kind.param.name; });

INSTANTIATE_TEST_SUITE_P(Kinds, KvCacheCopies, ::testing::ValuesIn(cases()),
                         [](const auto& kind) { return kind.param.name; });

}  // namespace
}  // namespace fathom
