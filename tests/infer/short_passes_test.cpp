// Passes that are recorded by their numbers of rows have the bits of the same passes op by op, in the
// row-invariant mode: over sequences that grow, are cut and take turns.
#include "infer/speculate/short_passes.h"

#include <random>

#include <gtest/gtest.h>

#include "infer/speculate/cached_model.h"
#include "kernels/error.h"
#include "tests/devices.h"
#include "tests/infer/tiny_models.h"

namespace fathom {
namespace {

using namespace tiny_models;

void expect_same_passes(const std::shared_ptr<Backend>& backend, DType dtype, int bits, bool skips) {
  constexpr std::int64_t kContext = 300;
  Model m(backend, dtype, skips ? depth(CausalMethod::Aux) : RoutingConfig{}, kContext);
  m.model.set_kv_bits(bits);
  Causal rule = m.rule;
  if (skips) rule.blocks = Causal::Blocks::Skipped;
  const KvCacheOptions options{.block = 16, .bytes = KvCache::entry_bytes(m.c, m.model) * 6 * kContext};
  KvCache ours(m.c, m.model, options), theirs(m.c, m.model, options);
  const auto passes = ShortPasses::open(m.c, m.model, rule, ours, true);
  ASSERT_NE(passes, nullptr);
  const CachedModel recorded{m.c, m.model, rule, ours, kVocab, 50, nullptr, nullptr, passes.get()};
  const CachedModel by_op{m.c, m.model, rule, theirs, kVocab, 50};
  const CachedModel unrecorded{m.c, m.model, rule, ours, kVocab, 50};  // as where many are being written
  std::mt19937_64 r(1);
  std::vector<SequenceId> sequences;
  std::vector<std::int64_t> positions(2, 0);  // of the text, where entries may be fewer
  for (int i = 0; i < 2; ++i) {
    sequences.push_back(ours.add());
    ASSERT_EQ(theirs.add(), sequences.back());
  }
  for (const SequenceId id : sequences) {
    ours.watch(id);
    theirs.watch(id);
  }
  for (int i = 0; i < 90; ++i) {
    const std::size_t which = r() % 2;
    const SequenceId id = sequences[which];
    const auto n = static_cast<std::int64_t>(1 + r() % 7);
    const auto wanted = static_cast<std::int64_t>(1 + r() % static_cast<std::uint64_t>(n));
    if (ours.tokens(id) + 2 * n > kContext || r() % 10 == 0) {
      const std::int64_t left = ours.tokens(id) - static_cast<std::int64_t>(r() % 9) * (ours.tokens(id) / 9);
      ours.truncate(id, left);
      theirs.truncate(id, left);
      positions[which] = left + static_cast<std::int64_t>(r() % 20);
      continue;
    }
    std::vector<std::int32_t> tokens;
    for (std::int64_t k = 0; k < n; ++k) tokens.push_back(static_cast<std::int32_t>(r() % kVocab));
    const std::vector<float> a = recorded.add(id, tokens, positions[which], wanted).logits;
    const std::vector<float> b = by_op.add(id, tokens, positions[which], wanted).logits;
    positions[which] += n;
    ASSERT_EQ(a.size(), static_cast<std::size_t>(wanted * kVocab));
    ASSERT_EQ(a, b) << "pass " << i << " of " << n << " rows, " << wanted << " wanted";
    ASSERT_EQ(ours.tokens(id), theirs.tokens(id));
    // What a gathering goes by is there as well: each sequence's own, whoever had the last pass, and of
    // whatever kind that was.
    if (r() % 8 == 0) {
      ASSERT_EQ(by_op.add(id, tokens, positions[which], 1).logits,
                unrecorded.add(id, tokens, positions[which], 1).logits);
      positions[which] += n;
    }
    for (const SequenceId any : sequences) {
      const std::int64_t chunks = ours.tokens(any) / 4;
      for (std::int64_t layer = 0; chunks > 0 && layer < m.model.config().depth; ++layer) {
        if (skips && m.model.routing().routes(layer)) continue;
        ASSERT_EQ(ours.chunk_scores(m.c, any, layer, chunks, 4),
                  theirs.chunk_scores(m.c, any, layer, chunks, 4))
            << "pass " << i << " of sequence " << id << ", queries of " << any << " in layer " << layer;
      }
    }
  }
}

TEST(ShortPasses, HaveTheBitsOfPassesOpByOp) {
  const std::shared_ptr<Backend> backend = make_cpu_backend({.invariant = true}, 1);
  for (const int bits : {16, 4}) {
    for (const bool skips : {false, true}) expect_same_passes(backend, DType::F32, bits, skips);
  }
}

TEST(ShortPasses, AreNotThereWhereNothingCanBeRecorded) {
  const std::shared_ptr<Backend> backend = make_cpu_backend({}, 1);
  Model routed(backend, DType::F32, depth(CausalMethod::Aux)), dense(backend, DType::F32, {});
  const KvCacheOptions options{.block = 16, .bytes = 1 << 20};
  KvCache of_routed(routed.c, routed.model, options), of_dense(dense.c, dense.model, options);
  EXPECT_EQ(ShortPasses::open(routed.c, routed.model, routed.rule, of_routed, true), nullptr);
  EXPECT_EQ(ShortPasses::open(dense.c, dense.model, dense.rule, of_dense), nullptr);  // a CPU records nothing
}

TEST(CudaShortPasses, HaveTheBitsOfPassesOpByOp) {
  const testing_support::OpenedDevice opened =
      testing_support::open_device(testing_support::Device::Cuda, {.invariant = true});
  testing_support::skip_without(opened);
  if (!opened.backend) return;
  for (const DType dtype : {DType::F32, DType::BF16}) {
    for (const int bits : {16, 8, 4}) {
      for (const bool skips : {false, true}) {
        SCOPED_TRACE(testing::Message() << name_of(dtype) << " " << bits << " " << skips);
        expect_same_passes(opened.backend, dtype, bits, skips);
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
}

}  // namespace
}  // namespace fathom
