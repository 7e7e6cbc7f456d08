// What the tests of whole steps of decoding have in common: models of many kinds with the same weights on a
// GPU and on the CPU, and steps of an engine over caches that are as long as one likes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "infer/engine.h"
#include "infer/generate.h"

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

/// The same weights on both devices: numbers of bf16. Routed layers decide by a direction of their own in the
/// embeddings, on one side or the other by a wide margin: rounding changes nobody's way.
struct Pair {
  Context gpu, cpu;
  Transformer on_gpu, on_cpu;
  Causal rule;

  Pair(std::shared_ptr<Backend> backend, const Case& k, std::int64_t context,
       const OnlineHadamards& online = {})
      : gpu(std::move(backend), DType::BF16),
        cpu(make_cpu_backend({}, 2), DType::F32),
        on_gpu(model_of(gpu, k, context, online)),
        on_cpu(model_of(cpu, k, context, online)) {
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
  }

 private:
  static Transformer model_of(Context& c, const Case& k, std::int64_t context,
                              const OnlineHadamards& online) {
    if (!online.any()) return {c, config_of(k, context), k.routing, false};
    const Quantization rotated{.method = "rotate-only", .bits = 16, .kinds = {}, .online = online};
    return {c, config_of(k, context), k.routing, rotated};
  }
  double normal() { return normal_(generator_); }
  std::vector<double> values_of(const std::string& name) {
    return to_doubles(gpu.backend(), on_gpu.parameters().get(name));
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
  Engine engine(m.gpu, m.on_gpu, o);
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
    q.sampling.temperature = i % 2 == 0 ? 0.0 : 0.9;
    q.sampling.seed = static_cast<std::uint64_t>(i);
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
  std::vector<Text> all;
  for (auto& [id, text] : texts) all.push_back(std::move(text));
  return all;
}

/// How near each row's decisions came to going the other way: their logits' distance from the threshold.
inline std::vector<double> margins(Pair& m, const Ids& ids) {
  const NoGrad no_grad(m.cpu);
  const auto n = static_cast<std::int64_t>(ids.size());
  const ForwardResult pass = m.on_cpu.forward(m.cpu, make_batch(m.cpu, 1, n, ids, {}), m.rule);
  std::vector<double> least(ids.size(), INFINITY);
  for (const RoutedLayer& l : pass.routing) {
    const bool predictor = m.rule.logit == Causal::Logit::Predictor;
    const auto scores = to_doubles(m.cpu.backend(), predictor ? l.predicted : l.scores);
    for (std::size_t i = 0; i < ids.size(); ++i)
      least[i] = std::min(least[i], std::fabs(scores[i] - logit(m.rule.threshold)));
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
  Engine engine(m.gpu, m.on_gpu, o);
  std::map<RequestId, std::vector<float>> seen;
  engine.observe_logits([&](RequestId id, std::int64_t, std::span<const float> logits) {
    seen[id].assign(logits.begin(), logits.end());
  });
  std::vector<RequestId> ids;
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

}  // namespace fathom::whole_step_test
