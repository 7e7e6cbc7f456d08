// fathom bench decode and prefill: the engine's speed, against what reading the weights and the cache takes.
#include "app/bench_decode.h"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <memory>
#include <string_view>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "app/bench_kernels.h"
#include "app/gemm_rate.h"
#include "kernels/error.h"
#include "src/core/stopwatch.h"
#include "src/flops/flops.h"

namespace fathom::app {

namespace {

constexpr std::int64_t kSettling = 400;  // steps in which the routers come to the capacity

// Bytes that a step of `rows` texts has to read: each weight of what it computes once, and each text's
// entries. A routed block's weights are read when any of the texts goes through it.
double least_bytes(const Config& config, const Transformer& model, const Context& c, std::int64_t rows,
                   double kept, double context) {
  const ModelConfig& m = config.model;
  const auto element = static_cast<double>(size_of(c.weight_dtype()));
  double bytes = element * static_cast<double>(m.vocab_size * m.width);  // the head; a row of the table
  double entries = 0;
  double of_block = 0;
  for (const ParameterSpec& spec : model.parameters().specs()) {
    if (product_kind(spec).empty() || !spec.name.starts_with("model.layers.0.")) continue;
    const auto size = static_cast<double>(spec.shape.size());
    if (!spec.is_packed) {
      of_block += element * size;
      continue;
    }
    const PackedFormat f = model.quantization()->format(spec);
    of_block += size / static_cast<double>(f.columns) *
                static_cast<double>(f.code_bytes() + f.groups() * static_cast<std::int64_t>(sizeof(float)));
  }
  const auto entry = static_cast<double>(KvCache::entry_bytes(c, model));
  for (std::int64_t layer = 0; layer < m.depth; ++layer) {
    const bool routed = config.routing.routes(layer);
    const double computed = routed ? 1 - std::pow(1 - kept, static_cast<double>(rows)) : 1.0;
    bytes += computed * of_block;
    entries += static_cast<double>(rows) * (routed ? kept * kept : 1.0) * context * entry;
    if (routed)
      bytes += element * static_cast<double>(m.width * (1 + config.routing.causal.predictor_hidden));
  }
  return bytes + entries;
}

// Texts that have their context, and write.
std::vector<RequestId> begin_texts(Engine& engine, const EngineBench& s, const DecodeFlags& flags) {
  // Tokens as random as those that the routers were fitted to: a text of its own would have another share.
  SamplingOptions any;
  any.temperature = 1000;
  std::vector<RequestId> texts;
  const std::int64_t before = engine.stats().prompt_tokens;
  for (std::int64_t i = 0; i < flags.batch; ++i) {
    any.seed = static_cast<std::uint64_t>(1 + i);
    texts.push_back(
        engine.submit({.prompt = random_ids(flags.context, flags.model.vocab, static_cast<unsigned>(10 + i)),
                       .max_tokens = new_tokens(flags),
                       .sampling = any}));
  }
  if (flags.random_cache) {
    for (const RequestId text : texts) engine.assume_computed(text, s.config.routing.capacity);
  }
  while (engine.stats().prompt_tokens - before < (flags.random_cache ? 1 : flags.context) * flags.batch)
    step(engine);
  return texts;
}

// Moves the predictors' biases after each step by what it kept too many or too few (Robbins and Monro 1951,
// for a quantile), until decoding keeps the capacity: a random model's stream is another one there than in
// one pass.
void settle(Engine& engine, const EngineBench& s, const DecodeFlags& flags) {
  const std::vector<std::int64_t> layers = s.model->routed_layers();
  std::vector<double> bias;
  bias.reserve(layers.size());
  for (const std::int64_t layer : layers) bias.push_back(item(s.c->backend(), bias_of(*s.model, layer)));
  const std::vector<RequestId> texts = begin_texts(engine, s, flags);
  std::vector<std::int64_t> before = engine.stats().routed_rows;
  for (std::int64_t n = 0; n < kSettling; ++n) {
    step(engine);
    const std::vector<std::int64_t> now = engine.stats().routed_rows;
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const double kept = static_cast<double>(now[i] - before[i]) / static_cast<double>(flags.batch);
      bias[i] -= s.spread[i] * 4 / (20 + static_cast<double>(n)) * (kept - s.config.routing.capacity);
      from_doubles(s.c->backend(), bias_of(*s.model, layers[i]), {bias[i]});
    }
    before = now;
  }
  for (const RequestId text : texts) engine.cancel(text);
}

}  // namespace

// Tokens of each text: the first ones come while the last texts' prompts still go in.
std::int64_t new_tokens(const DecodeFlags& flags) {
  const std::int64_t chunk = flags.chunk > 0 ? flags.chunk : 512;  // at the least
  const std::int64_t rows = std::max(chunk, 2 * flags.batch) - flags.batch;
  return std::max(flags.steps, kSettling) + flags.batch * flags.context / rows + 2 * flags.batch + 16;
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

EngineBench prepare_decode(const DecodeFlags& flags, const Globals& globals, std::int64_t more) {
  constexpr std::int64_t kFitted = 1024;
  return prepare_engine(flags, globals, new_tokens(flags) + more,
                        std::max<std::int64_t>(0, flags.context + flags.steps - kFitted), flags.steps);
}

DecodeTimes time_decode(Engine& engine, const EngineBench& s, const DecodeFlags& flags) {
  if (!s.spread.empty()) settle(engine, s, flags);
  begin_texts(engine, s, flags);
  for (int i = 0; i < 3; ++i) step(engine);
  const EngineStats before = engine.stats();
  std::vector<double> times;
  while (static_cast<std::int64_t>(times.size()) < flags.steps) {
    const Stopwatch watch;
    step(engine);
    times.push_back(watch.seconds());
    if (engine.stats().running != flags.batch)
      throw InternalError("[bench] a text has ended before its time");
  }
  DecodeTimes t{median(times), engine.stats(), engine.stats().whole_steps > before.whole_steps};
  t.during.rows -= before.rows;
  for (std::size_t i = 0; i < t.during.routed_rows.size(); ++i)
    t.during.routed_rows[i] -= before.routed_rows[i];
  return t;
}

namespace {

void run_decode(const DecodeFlags& flags, const Globals& globals) {
  const EngineBench s = prepare_decode(flags, globals);
  const double ceiling = read_rate(*s.backend);
  Engine engine(*s.c, *s.model, s.options);
  const DecodeTimes times = time_decode(engine, s, flags);
  const EngineStats& during = times.during;
  const double kept = kept_share(during), seconds = times.seconds;
  const double bytes =
      least_bytes(s.config, *s.model, *s.c, flags.batch, kept, static_cast<double>(flags.context));
  nlohmann::json json = line_of("decode", flags, s);
  json["ms"] = 1e3 * seconds;
  json["tok_s"] = static_cast<double>(flags.batch) / seconds;
  json["routed_fraction"] = s.config.routing.routes_depth() ? nlohmann::json(kept) : nullptr;
  json["random_cache"] = flags.random_cache;
  json["whole_steps"] = times.is_whole;
  // Which experts' weights are read depends on the tokens; what is not known is not said.
  const bool known = !s.config.routing.has_experts();
  json["least_bytes"] = known ? nlohmann::json(bytes) : nullptr;
  json["cache_bytes"] = during.most_bytes;
  json["gb_per_s"] = known ? nlohmann::json(bytes / seconds / 1e9) : nullptr;
  json["ceiling"] = "reading, same process";
  json["ceiling_gb_per_s"] = ceiling / 1e9;
  json["share_of_ceiling"] = known ? nlohmann::json(bytes / seconds / ceiling) : nullptr;
  if (globals.json) {
    std::cout << json.dump() << "\n";
    return;
  }
  std::cout << fmt::format("{} {}, context {}, batch {}: {:.3f} ms a token, {:.0f} tok/s", flags.model.preset,
                           flags.model.variant, flags.context, flags.batch, 1e3 * seconds,
                           static_cast<double>(flags.batch) / seconds)
            << (known ? fmt::format(", {:.3g} GB/s ({:.0f} % of reading at {:.4g})", bytes / seconds / 1e9,
                                    100 * bytes / seconds / ceiling, ceiling / 1e9)
                      : "")
            << (s.config.routing.routes_depth() ? fmt::format(", routed layers computed {:.1f} %", 100 * kept)
                                                : "")
            << "\n";
}

void run_prefill(const DecodeFlags& flags, const Globals& globals) {
  const EngineBench s = prepare_engine(flags, globals, new_tokens(flags), 0, 0);
  Engine engine(*s.c, *s.model, s.options);
  std::vector<double> times;
  for (std::int64_t i = 0; i < std::max<std::int64_t>(1, flags.steps / 16) + 1; ++i) {
    for (std::int64_t b = 0; b < flags.batch; ++b) {
      engine.submit({.prompt = random_ids(flags.context, flags.model.vocab, static_cast<unsigned>(10 + b)),
                     .max_tokens = 1});
    }
    const Stopwatch watch;
    while (!engine.idle()) step(engine);
    if (i > 0) times.push_back(watch.seconds());  // the first makes every choice and every block of memory
  }
  const double seconds = median(times), tokens = static_cast<double>(flags.batch * flags.context);
  Config config = s.config;
  config.train.seq_len = flags.context;
  config.train.batch_tokens = flags.context;
  // What was computed: the logits of each prompt's last token only, and what the routers kept.
  const std::vector<double> realised(static_cast<std::size_t>(config.model.depth),
                                     kept_share(engine.stats()));
  FlopTerms terms = config.routing.has_experts() ? forward_flops_per_token(config)
                                                 : causal_flops_per_token(config, realised);
  const double head = terms.head;
  terms.head = 0;
  const double flops = terms.total() * tokens + head * static_cast<double>(flags.batch);
  const double ceiling = gemm_rate(*s.backend, s.c->compute_dtype(), s.options.max_rows, config.model.width,
                                   2 * config.model.ffn_hidden);
  nlohmann::json json = line_of("prefill", flags, s);
  json["chunk"] = s.options.max_rows;
  json["ms"] = 1e3 * seconds;
  json["tok_s"] = tokens / seconds;
  json["routed_fraction"] =
      s.config.routing.routes_depth() ? nlohmann::json(kept_share(engine.stats())) : nullptr;
  json["gflops"] = flops / seconds / 1e9;
  json["ceiling"] = "a product of chunk x width x 2*hidden, same process";
  json["ceiling_gflops"] = ceiling / 1e9;
  json["share_of_ceiling"] = flops / seconds / ceiling;
  if (globals.json) {
    std::cout << json.dump() << "\n";
    return;
  }
  std::cout << fmt::format(
      "{} {}, {} x {} tokens by {}: {:.1f} ms, {:.0f} tok/s, {:.1f} GFLOP/s ({:.0f} % of a product's "
      "{:.1f})\n",
      flags.model.preset, flags.model.variant, flags.batch, flags.context, s.options.max_rows, 1e3 * seconds,
      tokens / seconds, flops / seconds / 1e9, 100 * flops / seconds / ceiling, ceiling / 1e9);
}

void add(CLI::App& bench, Globals& globals, const char* name, const char* what,
         void (*run)(const DecodeFlags&, const Globals&)) {
  auto flags = std::make_shared<DecodeFlags>();
  CLI::App* sub = bench.add_subcommand(name, what);
  add_engine_bench_flags(*sub, *flags, globals);
  sub->add_option("--context", flags->context, "Tokens of each text before")
      ->capture_default_str()
      ->check(number_from_to(1, 1e7));
  sub->add_option("--batch", flags->batch, "Texts at the same time")
      ->capture_default_str()
      ->check(number_from_to(1, 1e5));
  sub->add_option("--steps", flags->steps, "Steps timed (prefill: a sixteenth as many); the median counts")
      ->capture_default_str()
      ->check(number_from_to(1, 1e6));
  if (std::string_view(name) == "decode") {
    sub->add_flag("--random-cache", flags->random_cache,
                  "The context's keys and values are random numbers, not computed");
  }
  sub->footer(fmt::format("Example:\n  fathom bench {} --preset d6 --variant mod --json", name));
  sub->callback([flags, &globals, run] { run(*flags, globals); });
}

}  // namespace

void add_bench_decode(CLI::App& bench, Globals& globals) {
  add(bench, globals, "decode", "The engine's next tokens: tok/s, share of the rate of reading", run_decode);
  add(bench, globals, "prefill", "The engine over prompts: tok/s, share of the GEMM rate", run_prefill);
}

}  // namespace fathom::app
