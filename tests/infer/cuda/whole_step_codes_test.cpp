// Steps of decoding that a GPU does as a whole over caches of codes (kernels/cache_codes.h): against
// attention op by op over the same codes, against the whole text's forward pass in fp32 on the CPU, and what
// they append against what the op appends, byte by byte.
#include <cmath>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "infer/whole_step.h"
#include "kernels/cache_codes.h"
#include "src/ops/hadamard.h"
#include "tests/devices.h"
#include "tests/infer/cuda/whole_step_models.h"

namespace fathom::whole_step_test {
namespace {

struct Kind {
  Case model;
  int bits;
  bool transforms;  // queries and keys
  bool means;       // keys become codes without one
  std::string name() const {
    return fmt::format("{}_{}_bits{}{}", model.name, bits, transforms ? "_transformed" : "",
                       means ? "_without_mean" : "");
  }
  Quantization quantization() const {
    return {.method = "rotate-only",
            .bits = 16,
            .kv = bits,
            .key_means = means,
            .kinds = {},
            .online = {.queries_keys = transforms}};
  }
  friend void PrintTo(const Kind& k, std::ostream* out) { *out << k.name(); }
};

std::vector<Kind> kinds() {
  const std::vector<Case> models = {
      {"heads64", 256, 4, 4, 512, false, true, {}, 0, 2},
      {"heads128", 512, 4, 4, 512, true, false, {}, 0, 2},
      {"eight_queries", 512, 8, 1, 512, true, true, {}, 0, 2},
      {"three_queries", 256, 6, 2, 512, true, true, {}, 128, 2},
      {"aux", 256, 4, 2, 512, true, true, depth(CausalMethod::Aux, 2, Gate::Sigmoid)},
      {"predictor", 512, 4, 2, 512, true, true, depth(CausalMethod::Predictor, 2, Gate::Raw)},
      {"every_layer", 320, 5, 5, 256, true, true, depth(CausalMethod::Predictor, 1, Gate::Tanh), 0, 3}};
  std::vector<Kind> all;
  for (const Case& model : models) {
    const bool all_of_both = model.name.starts_with("heads");
    for (const int bits : {8, 4}) {
      for (const bool transforms : {false, true}) {
        for (const bool means : {false, true}) {
          if (all_of_both || means == transforms) all.push_back({model, bits, transforms, means});
        }
      }
    }
  }
  return all;
}

class CudaCodeSteps : public testing_support::OnCuda<::testing::TestWithParam<Kind>> {
 protected:
  Pair open(std::int64_t context) const {
    return {shared_cuda(), GetParam().model, context, GetParam().quantization()};
  }
};

// No entry and one, full steps of 16 and blocks, and one more or less; a warp's passes of several steps,
// whole and begun; pieces of a row, and texts of many lengths at once.
TEST_P(CudaCodeSteps, AreCloseToStepsOpByOp) {
  Pair m = open(2112);
  for (const std::int64_t block : {16, 48, 64, 256}) {
    for (const std::vector<std::int64_t>& lengths :
         {std::vector<std::int64_t>{1},
          {2, 1, 3},
          {16, 17, 18, 49, 50},
          {32, 33, 34, 48, 49, 50},
          {144, 145, 146, 160, 161, 272, 273, 274, 401, 402, 416, 417},
          {64, 65, 66, 256, 257, 258, 33, 1},
          {2100},
          {129, 130, 1700, 900}})
      expect_codes_close_to_ops(m, lengths, block);
  }
}

// Pieces of equal size, where entries are many: several of a head, or heads of one piece.
TEST_P(CudaCodeSteps, DealLongCachesEvenly) {
  Pair m = open(70016);
  for (const std::vector<std::int64_t>& lengths :
       {std::vector<std::int64_t>{70000}, {70000, 40, 1, 33}, {20000, 20000, 20001, 19999, 7000}})
    expect_codes_close_to_ops(m, lengths, 64);
}

// Prompts op by op, and then steps over what both have left in the cache.
TEST_P(CudaCodeSteps, AreNearTheWholePass) {
  const int bits = GetParam().bits;
  Pair m = open(160);
  EngineStats stats;
  const auto texts =
      run(m, {.texts = 9, .most_rows = 40, .block = 16, .prompt = 70, .tokens = 30}, true, stats);
  ASSERT_GT(stats.whole_steps, 0);
  double sum = 0, worst = 0;
  std::int64_t compared = 0, near = 0;
  for (const auto& text : texts) {
    const std::vector<float> whole = causal_logits(m.cpu, m.on_cpu, text.ids, m.rule);
    const std::vector<double> margin = margins(m, text.ids, m.rule);
    for (const auto& [position, logits] : text.logits) {
      if (margin[static_cast<std::size_t>(position - 1)] < 0.3) {
        ++near;  // it, or one that it sees, may be routed otherwise
        continue;
      }
      const double error = distance(
          logits, std::span(whole).subspan(static_cast<std::size_t>((position - 1) * kVocab), kVocab));
      ASSERT_FALSE(std::isnan(error)) << "position " << position;
      worst = std::max(worst, error);
      sum += error;
      ++compared;
    }
  }
  ASSERT_GT(compared, near);
  const double mean = sum / static_cast<double>(compared);
  EXPECT_LT(mean, bits == 4 ? 0.15 : 0.03);
  EXPECT_LT(worst, bits == 4 ? 0.4 : 0.1);
  std::printf("compared %lld, near %lld, mean %.2e, worst %.2e\n", static_cast<long long>(compared),
              static_cast<long long>(near), mean, worst);
}

/// A few texts by whole steps alone, a token at a time: what is in the first layer's blocks afterwards.
struct Written {
  std::vector<std::vector<std::int32_t>> blocks;  // by text: of the pool
  std::vector<std::int64_t> entries;
  std::vector<std::uint8_t> bytes;  // the pool
};

Written write(Pair& m, std::int64_t block, std::int64_t tokens) {
  constexpr std::int64_t kTexts = 3;
  KvCache cache(m.gpu, m.on_gpu, {.block = block, .bytes = std::int64_t{16} << 20});
  const auto steps = WholeStep::open(m.gpu, m.on_gpu, m.rule, cache, kVocab, kTexts);
  if (steps == nullptr) throw InternalError("no whole steps");
  std::vector<SequenceId> texts;
  for (std::int64_t i = 0; i < kTexts; ++i) texts.push_back(cache.add());
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::vector<StepRow> rows;
    for (std::int64_t i = 0; i < kTexts; ++i) {
      if (t % (i + 1) != 0) continue;  // not all as long
      rows.push_back({.sequence = texts[static_cast<std::size_t>(i)],
                      .token = static_cast<std::int32_t>((13 + 101 * t + 7 * i) % kVocab),
                      .position = cache.tokens(texts[static_cast<std::size_t>(i)])});
    }
    steps->run(rows);
  }
  const bool routed = m.on_gpu.routing().routes(0);
  Written w;
  for (const SequenceId text : texts) {
    const auto blocks = cache.blocks(text, routed ? 1 : 0);
    const std::int64_t stride = routed ? 1 : cache.pool().width();
    auto& of = w.blocks.emplace_back();
    for (const std::int32_t b : blocks) of.push_back(static_cast<std::int32_t>(b * stride));
    w.entries.push_back(cache.entries(text, 0));
  }
  w.bytes.resize(cache.memory().bytes());
  m.gpu.backend().copy_to_host(w.bytes.data(), cache.memory().data(), w.bytes.size());
  return w;
}

/// The most that two lists of codes differ by in one place.
int steps_between(const std::vector<std::uint8_t>& a, const std::vector<std::uint8_t>& b, int bits) {
  int most = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    for (int at = 0; at < 8; at += bits) {
      const auto code = [&](std::uint8_t byte) { return byte >> at & ((1 << bits) - 1); };
      most = std::max(most, std::abs(code(a[i]) - code(b[i])));
    }
  }
  return most;
}

// The first layer's keys and values are the same whatever the cache holds, but for the order of sums: what it
// holds as bf16, transformed and appended by the ops, are the bytes that it holds as codes.
TEST_P(CudaCodeSteps, AppendTheBytesThatTheOpAppends) {
  constexpr std::int64_t kTokens = 75;
  const Case& model = GetParam().model;
  const int bits = GetParam().bits;
  for (const std::int64_t block : {16, 48}) {
    SCOPED_TRACE(block);
    Pair plain(shared_cuda(), model, 160), m = open(160);
    const Written numbers = write(plain, block, kTokens), codes = write(m, block, kTokens);
    ASSERT_EQ(numbers.entries, codes.entries);
    const std::int64_t d = m.on_gpu.config().head_dim(), heads = model.kv_heads;
    const std::int64_t of_code = cache_code_bytes(d, bits);
    const std::int64_t block_bytes = 2 * heads * block * (of_code + kCacheScaleBytes);
    std::int64_t compared = 0, same = 0;
    for (std::size_t text = 0; text < codes.blocks.size(); ++text) {
      const std::int64_t n = codes.entries[text], used = (n + block - 1) / block;
      // The entries as rows of keys and values, [n, 2G*d].
      std::vector<std::uint16_t> rows;
      const auto* const pool = reinterpret_cast<const std::uint16_t*>(numbers.bytes.data());
      for (std::int64_t e = 0; e < n; ++e) {
        const std::int64_t at = numbers.blocks[text][static_cast<std::size_t>(e / block)];
        for (std::int64_t head = 0; head < 2 * heads; ++head) {
          const auto* const from = pool + ((at * 2 * heads + head) * block + e % block) * d;
          rows.insert(rows.end(), from, from + d);
        }
      }
      Tensor qkv = m.gpu.empty({n, 2 * heads * d});
      m.gpu.backend().copy_from_host(qkv.data(), rows.data(), qkv.bytes());
      if (GetParam().transforms)
        qkv = ops::hadamard_heads(m.gpu, std::move(qkv), heads, ops::Hadamard(m.gpu, d));
      CacheShape s{.rows = n, .heads = 0, .kv_heads = heads, .head_dim = d};
      if (const Tensor means = m.on_gpu.key_means(0); means.defined()) s.key_means = means;
      s.block = block, s.blocks = used, s.sequences = 1, s.table = used, s.bits = bits;
      std::vector<std::int32_t> table, lengths;
      for (std::int64_t i = 0; i < used; ++i) table.push_back(static_cast<std::int32_t>(i));
      for (std::int64_t i = 0; i < n; ++i) lengths.push_back(static_cast<std::int32_t>(i + 1));
      std::vector<std::uint8_t> bytes(static_cast<std::size_t>(used * block_bytes));
      const Tensor expected = m.gpu.empty({used * block_bytes}, DType::U8);
      const Tensor tables = m.gpu.empty({used}, DType::I32), all_lengths = m.gpu.empty({n}, DType::I32),
                   first = m.gpu.empty({n}, DType::I32);
      from_host(m.gpu.backend(), tables, table);
      from_host(m.gpu.backend(), all_lengths, lengths);
      from_host(m.gpu.backend(), first, std::vector<std::int32_t>(lengths.size(), 0));
      m.gpu.backend().cache_append(expected, qkv, tables, first, all_lengths, s);
      m.gpu.backend().copy_to_host(bytes.data(), expected.data(), bytes.size());
      const auto part = [&](const std::vector<std::uint8_t>& of, std::int64_t number, std::int64_t from,
                            std::int64_t size) {
        const auto* const begin = of.data() + number * block_bytes + from;
        return std::vector<std::uint8_t>(begin, begin + size);
      };
      for (std::int64_t e = 0; e < n; ++e) {
        const std::int64_t at = codes.blocks[text][static_cast<std::size_t>(e / block)];
        for (std::int64_t head = 0; head < 2 * heads; ++head) {
          const std::int64_t inside = head * block + e % block;
          const std::int64_t scale = 2 * heads * block * of_code + inside * kCacheScaleBytes;
          const auto got = part(codes.bytes, at, inside * of_code, of_code),
                     right = part(bytes, e / block, inside * of_code, of_code);
          // Sums by another kernel: a number near the border of two codes, or a head's least or greatest one,
          // may become its neighbour.
          ASSERT_LE(steps_between(got, right, bits), 1)
              << "text " << text << ", entry " << e << ", head " << head;
          same += got == right && part(codes.bytes, at, scale, kCacheScaleBytes) ==
                                      part(bytes, e / block, scale, kCacheScaleBytes);
          ++compared;
        }
      }
    }
    EXPECT_GT(compared, 2 * heads * kTokens / 2);
    EXPECT_GT(same, compared * 97 / 100);
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, CudaCodeSteps, ::testing::ValuesIn(kinds()),
                         [](const auto& kind) { return kind.param.name(); });

}  // namespace
}  // namespace fathom::whole_step_test
