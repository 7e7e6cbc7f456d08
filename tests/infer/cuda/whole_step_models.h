// What the tests of whole steps of decoding have in common: models of many kinds with the same weights on a
// GPU and on the CPU, texts that go through an engine on the GPU, and steps of it over caches that are as
// long as one likes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "infer/engine.h"
#include "infer/generate.h"
#include "infer/quant/quantize_model.h"
#include "tests/devices.h"

namespace fathom::whole_step_test {

using Ids = std::vector<std::int32_t>;

inline constexpr std::int64_t kVocab = 1003;  // no multiple of a tile

struct Case {
  std::string name;
  std::int64_t width, heads, kv_heads, hidden;
  bool qk_norm, tied;
  RoutingConfig routing;
  std::int64_t head_dim = 0;  // 0: width / heads
  std::int64_t layers = 4;
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }
};

inline RoutingConfig depth(CausalMethod method, std::int64_t every, Gate gate) {
  RoutingConfig r;
  r.kind = RoutingKind::Mod;
  r.capacity = 0.25;
  r.every = every;
  r.gate = gate;
  r.causal.method = method;
  r.causal.predictor_hidden = 37;
  return r;
}

inline ModelConfig config_of(const Case& c, std::int64_t context) {
  ModelConfig m;
  m.vocab_size = kVocab;
  m.width = c.width;
  m.depth = c.layers;
  m.heads = c.heads;
  m.own_head_dim = c.head_dim;
  m.kv_heads = c.kv_heads;
  m.ffn_hidden = c.hidden;
  m.max_seq_len = context;
  m.qk_norm = c.qk_norm;
  m.tie_embeddings = c.tied;
  return m;
}

/// Codes down to the least one, as rounding to the nearest gives them only for odd scales, and now and then a
/// row whose scales are zero.
inline QuantizedMatrix uneven_codes(const MatrixToQuantize& m) {
  const PackedFormat& f = m.format;
  QuantizedMatrix q{m.rows, f.columns, f.bits, f.group, {}, {}};
  const float most = static_cast<float>((1 << (f.bits - 1)) - 1);
  const auto group = static_cast<std::size_t>(f.group);
  for (std::size_t first = 0; first < m.values.size(); first += group) {
    float largest = 0;
    for (const float w : m.values.subspan(first, group)) largest = std::max(largest, std::fabs(w));
    const float scale = largest / (most + 0.5F);
    for (const float w : m.values.subspan(first, group))
      q.codes.push_back(static_cast<std::int8_t>(std::clamp(std::round(w / scale), -most - 1, most)));
    const std::size_t row = first / static_cast<std::size_t>(f.columns);
    q.scales.push_back(row % 7 == 3 ? 0 : scale);
  }
  return q;
}

/// The same weights on both devices: numbers of bf16, or of few bits on the GPU. What is transformed while a
/// model runs, the bits of keys and values, and whether keys lose a mean are the quantization's too, on both.
/// Routed layers decide by a direction of their own in the embeddings, on one side or the other by a wide
/// margin: rounding changes nobody's way.
struct Pair {
  Context gpu, cpu;
  Transformer on_gpu, on_cpu;
  std::unique_ptr<Transformer> few_bits;  // on the GPU, in place of the one with numbers
  Causal rule;

  Pair(std::shared_ptr<Backend> backend, const Case& k, std::int64_t context,
       const std::optional<Quantization>& quantization = {})
      : gpu(std::move(backend), DType::BF16),
        cpu(make_cpu_backend({}, 2), DType::F32),
        on_gpu(model_of(gpu, k, context, quantization)),
        on_cpu(model_of(cpu, k, context, quantization)) {
    for (const ParameterSpec& spec : on_gpu.parameters().specs()) {
      const bool norm = spec.name.find("norm") != std::string::npos;
      std::vector<double> values(static_cast<std::size_t>(spec.shape.size()));
      for (double& x : values)
        x = norm ? 1 + 0.1 * normal() : normal() / std::sqrt(static_cast<double>(k.width));
      set(spec.name, values);
    }
    std::vector<double> table = values_of("model.embed_tokens.weight");
    for (double& x : table) x *= 8;  // so that the stream is not all branches
    for (const std::int64_t layer : on_gpu.routed_layers()) decide_by_a_direction(k, layer, table);
    set("model.embed_tokens.weight", table);
    if (k.routing.kind != RoutingKind::None) rule = causal_rule(k.routing);
    if (quantization && quantization->has_packed_weights()) quantize(*quantization);
    if (quantization && quantization->key_means) set_key_means();
  }

  /// What the engine on the GPU has.
  Transformer& model() { return few_bits ? *few_bits : on_gpu; }

 private:
  /// With weights that are numbers.
  static Transformer model_of(Context& c, const Case& k, std::int64_t context,
                              const std::optional<Quantization>& quantization) {
    if (!quantization) return {c, config_of(k, context), k.routing, false};
    const Quantization numbers{.method = "rotate-only",
                               .bits = 16,
                               .kv = quantization->kv,
                               .key_means = quantization->key_means,
                               .kinds = {},
                               .online = quantization->online};
    return {c, config_of(k, context), k.routing, numbers};
  }
  double normal() { return normal_(generator_); }
  std::vector<double> values_of(const std::string& name) {
    return to_doubles(gpu.backend(), on_gpu.parameters().get(name));
  }
  /// On the CPU there are the numbers that the codes stand for.
  void quantize(const Quantization& q) {
    for (const ParameterSpec& spec : on_gpu.parameters().specs())
      from_doubles(gpu.backend(), on_gpu.parameters().master(spec.name), values_of(spec.name));
    few_bits = quantize_model(gpu, on_gpu, q, uneven_codes).model;
    for (const ParameterSpec& spec : few_bits->parameters().specs()) {
      if (!spec.is_packed) continue;
      const std::vector<float> w = dequantized(gpu.backend(), few_bits->parameters().packed(spec.name));
      from_doubles(cpu.backend(), on_cpu.parameters().get(spec.name), {w.begin(), w.end()});
    }
  }
  /// As if a calibration had shown them.
  void set_key_means() {
    const ModelConfig& m = on_gpu.config();
    for (std::int64_t layer = 0; layer < m.depth; ++layer) {
      std::vector<float> means(static_cast<std::size_t>(m.kv_heads * m.head_dim()));
      for (float& x : means) x = 0.25F * static_cast<float>(normal());
      on_gpu.set_key_means(gpu, layer, means);
      on_cpu.set_key_means(cpu, layer, means);
      if (few_bits) few_bits->set_key_means(gpu, layer, means);
    }
  }
  void set(const std::string& name, const std::vector<double>& values) {
    from_doubles(gpu.backend(), on_gpu.parameters().get(name), values);
    from_doubles(cpu.backend(), on_cpu.parameters().get(name), values_of(name));
  }
  void decide_by_a_direction(const Case& k, std::int64_t layer, std::vector<double>& table) {
    const auto width = static_cast<std::size_t>(k.width);
    std::vector<double> u(width);
    double norm = 0;
    for (double& x : u) x = normal(), norm += x * x;
    for (double& x : u) x /= std::sqrt(norm);
    for (std::size_t token = 0; token < table.size() / width; ++token) {
      const double side = normal() < 0 ? -6 : 6;
      for (std::size_t i = 0; i < width; ++i) table[token * width + i] += side * u[i];
    }
    const auto name = [&](const char* part) { return fmt::format("model.layers.{}.{}", layer, part); };
    std::vector<double> router = u;
    for (double& x : router) x *= 0.25;
    set(name("router.weight"), router);
    if (!k.routing.has_predictor()) return;
    std::vector<double> in = values_of(name("router_predictor.0.weight"));
    std::copy(u.begin(), u.end(), in.begin());
    set(name("router_predictor.0.weight"), in);
    std::vector<double> out = values_of(name("router_predictor.2.weight"));
    out[0] = 0.5;
    set(name("router_predictor.2.weight"), out);
    set(name("router_predictor.2.bias"), {-1.5});
  }

  std::mt19937_64 generator_{5};
  std::normal_distribution<double> normal_;
};

struct Text {
  Request request;
  Ids ids;
  std::map<std::int64_t, std::vector<float>> logits;  // by the position of the id that they were for
};

struct Schedule {
  std::int64_t texts, most_rows, block, prompt, tokens;
  std::int64_t whole_rows = 64;  // several steps for more texts than one has room for
  /// Every third text goes through no routed layer and every third one through all of them.
  bool own_thresholds = false;
  /// Prompts are beginnings of the first one with another last token, and what was computed of them is
  /// shared.
  bool shares = false;
};

/// All texts through the engine. `watch`: their logits are kept, and the host chooses from them.
inline std::vector<Text> run(Pair& m, const Schedule& s, bool watch, EngineStats& stats) {
  EngineOptions o;
  o.rule = m.rule;
  o.cache.block = s.block;
  o.cache.bytes = 512 << 20;
  o.max_rows = s.most_rows;
  o.max_sequences = 20;
  o.whole_rows = s.whole_rows;
  o.prefix_cache = s.shares;
  Engine engine(m.gpu, m.model(), o);
  std::map<RequestId, Text> texts;
  if (watch) {
    engine.observe_logits([&](RequestId id, std::int64_t position, std::span<const float> logits) {
      texts[id].logits[position].assign(logits.begin(), logits.end());
    });
  }
  std::mt19937_64 r(7);
  std::uniform_int_distribution<std::int32_t> any(0, static_cast<std::int32_t>(kVocab) - 1);
  for (std::int64_t i = 0; i < s.texts; ++i) {
    Request q;
    q.max_tokens = s.tokens - i % 5;
    q.prompt.resize(static_cast<std::size_t>(i == 0 ? s.prompt : 1 + (i * 37) % s.prompt));
    for (std::int32_t& id : q.prompt) id = any(r);
    if (s.shares && i > 0)
      std::copy_n(texts.begin()->second.request.prompt.begin(), q.prompt.size() - 1, q.prompt.begin());
    q.sampling.temperature = i % 2 == 0 ? 0.0 : 0.9;
    q.sampling.seed = static_cast<std::uint64_t>(i);
    if (s.own_thresholds && i % 3 > 0) q.threshold = i % 3 == 1 ? 0.01 : 0.99;
    Text text;
    text.request = q;
    text.ids = q.prompt;
    texts[engine.submit(q)] = text;
  }
  while (!engine.idle()) {
    for (const Event& e : engine.step()) {
      if (e.finish == Finish::Error) ADD_FAILURE() << e.error;
      if (e.has_token) texts.at(e.request).ids.push_back(e.token.id);
    }
  }
  stats = engine.stats();
  EXPECT_EQ(stats.free_blocks, stats.blocks);
  EXPECT_EQ(stats.prefix_hit_tokens > 0, s.shares);
  std::vector<Text> all;
  for (auto& [id, text] : texts) all.push_back(std::move(text));
  return all;
}

/// How near each row's decisions came to going the other way: their logits' distance from the threshold.
inline std::vector<double> margins(Pair& m, const Ids& ids, const Causal& rule) {
  const NoGrad no_grad(m.cpu);
  const auto n = static_cast<std::int64_t>(ids.size());
  const ForwardResult pass = m.on_cpu.forward(m.cpu, make_batch(m.cpu, 1, n, ids, {}), rule);
  std::vector<double> least(ids.size(), INFINITY);
  for (const RoutedLayer& l : pass.routing) {
    const bool predictor = rule.logit == Causal::Logit::Predictor;
    const auto scores = to_doubles(m.cpu.backend(), predictor ? l.predicted : l.scores);
    for (std::size_t i = 0; i < ids.size(); ++i)
      least[i] = std::min(least[i], std::fabs(scores[i] - logit(rule.threshold)));
  }
  return least;
}

/// One step of texts that have random caches of these lengths, their last id less: the logits of each.
/// `comes`: whether a whole step is expected where one is asked for.
inline std::vector<std::vector<float>> one_step(Pair& m, const std::vector<std::int64_t>& lengths, bool whole,
                                                bool comes = true,
                                                const KvCacheOptions& cache = {.bytes = std::int64_t{2}
                                                                                        << 30}) {
  EngineOptions o;
  o.rule = m.rule;
  o.cache = cache;
  o.max_sequences = static_cast<std::int64_t>(lengths.size());
  o.whole_rows = whole ? 16 : 0;
  Engine engine(m.gpu, m.model(), o);
  std::map<RequestId, std::vector<float>> seen;
  engine.observe_logits([&](RequestId id, std::int64_t, std::span<const float> logits) {
    seen[id].assign(logits.begin(), logits.end());
  });
  std::vector<RequestId> ids;
  ids.reserve(lengths.size());
  for (const std::int64_t n : lengths) {
    const auto token = static_cast<std::int32_t>(7 + ids.size());
    ids.push_back(engine.submit({.prompt = Ids(static_cast<std::size_t>(n), token), .max_tokens = 1}));
  }
  for (const RequestId id : ids) engine.assume_computed(id, 0.3);
  while (!engine.idle()) engine.step();
  EXPECT_EQ(engine.stats().whole_steps > 0, whole && comes);
  std::vector<std::vector<float>> all;
  for (auto& [id, logits] : seen) all.push_back(std::move(logits));
  return all;
}

/// |a - b| / |b|
inline double distance(std::span<const float> a, std::span<const float> b) {
  double error = 0, size = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    const double x = a[i], y = b[i];
    error += (x - y) * (x - y);
    size += y * y;
  }
  return std::sqrt(error / size);
}

/// A cache of no more than such texts need: one of codes takes long to fill.
inline KvCacheOptions small_cache(Pair& m, const std::vector<std::int64_t>& lengths, std::int64_t block) {
  KvCacheOptions cache{.block = block};
  for (const std::int64_t n : lengths)
    cache.bytes += KvCache::entry_bytes(m.gpu, m.model()) * m.model().config().depth * (n + 8 * block);
  return cache;
}

/// A step over caches of codes of these lengths, whole and op by op: the same random codes for both; only the
/// new entry is each one's own. A number near the border of two codes becomes one or the other by its last
/// bits, which differ from engine to engine: a step of 4 bits is a third of what a typical value is. Where an
/// output is made of few entries that shows, so bounds are on the error's whole length, by the bits and by
/// how many entries there are.
inline void expect_codes_close_to_ops(Pair& m, const std::vector<std::int64_t>& lengths, std::int64_t block) {
  constexpr std::int64_t kFew = 64;  // entries: of routed layers less than a third
  const int bits = m.model().kv_bits();
  const KvCacheOptions cache = small_cache(m, lengths, block);
  const auto whole = one_step(m, lengths, true, true, cache),
             by_ops = one_step(m, lengths, false, true, cache);
  ASSERT_EQ(whole.size(), lengths.size());
  ASSERT_EQ(by_ops.size(), lengths.size());
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    const double bound = lengths[i] < kFew ? (bits == 4 ? 0.2 : 0.05) : (bits == 4 ? 0.05 : 0.03);
    const double error = distance(whole[i], by_ops[i]);
    // Not "not less": what is not a number must fail.
    EXPECT_TRUE(error < bound) << error << ", text of " << lengths[i] << ", the " << i << "th of "
                               << lengths.size() << ", blocks of " << block;
  }
}

/// Logits of the same texts, by two ways.
inline void expect_like(const std::vector<std::vector<float>>& a, const std::vector<std::vector<float>>& b,
                        double tolerance = 2e-2) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    double size = 0, error = 0;
    for (std::size_t j = 0; j < a[i].size(); ++j) {
      size = std::max(size, std::fabs(static_cast<double>(b[i][j])));
      error = std::max(error, std::fabs(static_cast<double>(a[i][j]) - b[i][j]));
    }
    EXPECT_LT(error, tolerance * size) << "the " << i << "th of " << a.size() << " texts";
  }
}

/// Every row's logits against those of the whole text's pass in fp32.
inline void expect_close(Pair& m, const Schedule& schedule) {
  EngineStats stats;
  const std::vector<Text> texts = run(m, schedule, true, stats);
  ASSERT_GT(stats.whole_steps, 0);
  std::int64_t compared = 0, near = 0, seeing = 0;
  double worst = 0;
  for (const Text& text : texts) {
    Causal rule = m.rule;
    rule.threshold = text.request.threshold.value_or(rule.threshold);
    const std::vector<float> whole = causal_logits(m.cpu, m.on_cpu, text.ids, rule);
    const std::vector<double> margin = margins(m, text.ids, rule);
    for (const auto& [position, logits] : text.logits) {
      if (margin[static_cast<std::size_t>(position - 1)] < 0.03) {
        ++near;  // bf16 may route it otherwise
        continue;
      }
      const double seen = *std::min_element(margin.begin(), margin.begin() + position);
      if (seen < 0.003) {
        ++seeing;  // or has done so with one that it sees
        continue;
      }
      const float* expected = whole.data() + (position - 1) * kVocab;
      double size = 0, error = 0;
      for (std::int64_t i = 0; i < kVocab; ++i) {
        size = std::max(size, std::fabs(static_cast<double>(expected[i])));
        error = std::max(error,
                         std::fabs(static_cast<double>(logits[static_cast<std::size_t>(i)]) - expected[i]));
      }
      ASSERT_LT(error, 2e-2 * size) << "text of " << text.request.prompt.size() << " ids, position "
                                    << position << ", which is decided by a margin of "
                                    << margin[static_cast<std::size_t>(position - 1)]
                                    << ", and what it sees by one of " << seen;
      worst = std::max(worst, error / size);
      ++compared;
    }
  }
  EXPECT_GT(compared + seeing, 20 * near);
  EXPECT_GT(compared, 4 * seeing);
  if (!stats.routed_rows.empty()) {
    const double kept = static_cast<double>(stats.routed_rows[0]) / static_cast<double>(stats.rows);
    EXPECT_GT(kept, 0.2);
    EXPECT_LT(kept, 0.8);
  }
  ::testing::Test::RecordProperty("compared", static_cast<int>(compared));
  ::testing::Test::RecordProperty("near_the_threshold", static_cast<int>(near));
  std::printf("compared %lld, near %lld, seeing such %lld, worst %.2e\n", static_cast<long long>(compared),
              static_cast<long long>(near), static_cast<long long>(seeing), worst);
}

}  // namespace fathom::whole_step_test
