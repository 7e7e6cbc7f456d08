// fathom bench decode and prefill: the engine's speed, against what reading the weights and the cache takes.
#include <algorithm>
#include <cmath>
#include <iostream>
#include <memory>
#include <random>
#include <string_view>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "app/bench_kernels.h"
#include "app/bench_model.h"
#include "app/device.h"
#include "app/gemm_rate.h"
#include "infer/engine.h"
#include "kernels/error.h"
#include "src/config/resolve.h"
#include "src/core/stopwatch.h"
#include "src/flops/flops.h"

namespace fathom::app {

namespace {

struct DecodeFlags {
  BenchModel model;
  std::int64_t context = 1024;
  std::int64_t batch = 1;
  std::int64_t kv_heads = 0;
  std::int64_t steps = 64;
  std::int64_t chunk = 512;
  std::int64_t block = 64;
  std::string precision;
  bool invariant = false;
  bool random_cache = false;
};

constexpr std::int64_t kSettling = 400;  // steps in which the routers come to the capacity

// Tokens of each text: the first ones come while the last texts' prompts still go in.
std::int64_t new_tokens(const DecodeFlags& flags) {
  const std::int64_t rows = std::max<std::int64_t>(1, flags.chunk - flags.batch);
  return std::max(flags.steps, kSettling) + flags.batch * flags.context / rows + 2 * flags.batch + 16;
}

// One pass; a text that fails ends the bench.
void step(Engine& engine) {
  if (engine.idle()) throw InternalError("[bench] every text has ended before its time");
  for (const Event& e : engine.step()) {
    if (e.finish == Finish::Error) throw UserError(e.error);
  }
}

Config config_of(const DecodeFlags& flags) {
  Config c = bench_model(flags.model);
  c.invariant = flags.invariant;
  if (flags.kv_heads > 0) {
    if (c.model.heads % flags.kv_heads != 0)
      throw UsageError(fmt::format("--kv-heads {} does not divide the {} heads of {}.", flags.kv_heads,
                                   c.model.heads, flags.model.preset));
    c.model.kv_heads = flags.kv_heads;
  }
  c.model.max_seq_len = flags.context + new_tokens(flags);
  c.train.steps = 1;
  return resolve(c);
}

std::vector<std::int32_t> random_ids(std::int64_t n, std::int64_t vocab, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<std::int32_t> any(0, static_cast<std::int32_t>(vocab) - 1);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(n));
  for (std::int32_t& id : ids) id = any(random);
  return ids;
}

const Tensor& bias_of(const Transformer& model, std::int64_t layer) {
  return model.parameters().get(fmt::format("model.layers.{}.router_predictor.2.bias", layer));
}

// Random routers keep any number of tokens. The predictors' biases are set so that, of random tokens at the
// positions [first, last) of a text, each layer keeps the capacity: first layer first, since what a layer
// keeps changes what the next one sees. What a random model's stream is like depends on the position.
// What is left is done by settle(). Returns how wide each layer's logits are spread.
std::vector<double> fit_capacity(Context& c, Transformer& model, const Causal& rule, std::int64_t first,
                                 std::int64_t last) {
  std::vector<double> spread;
  const NoGrad no_grad(c);
  const Batch batch = make_batch(c, 1, last, random_ids(last, model.config().vocab_size, 3), {});
  const std::vector<std::int64_t> layers = model.routed_layers();
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const ForwardResult pass = model.forward(c, batch, rule);
    std::vector<double> logits = to_doubles(c.backend(), pass.routing[i].predicted);
    logits.erase(logits.begin(), logits.begin() + first);
    std::sort(logits.begin(), logits.end());
    const auto quantile = [&](double share) {
      return logits[static_cast<std::size_t>(share * static_cast<double>(logits.size() - 1))];
    };
    spread.push_back(quantile(0.84) - quantile(0.16));
    const Tensor& bias = bias_of(model, layers[i]);
    from_doubles(c.backend(), bias, {item(c.backend(), bias) - quantile(1 - model.routing().capacity)});
  }
  return spread;
}

// Bytes that a step of `rows` texts has to read: each weight of what it computes once, and each text's
// entries. A routed block's weights are read when any of the texts goes through it.
double least_bytes(const Config& config, std::size_t element, std::int64_t rows, double kept,
                   double context) {
  const ModelConfig& m = config.model;
  double weights = static_cast<double>(m.vocab_size * m.width), entries = 0;  // the head; a row of the table
  const auto block_weights =
      static_cast<double>((m.heads + 2 * m.kv_heads) * m.head_dim() * m.width +
                          m.heads * m.head_dim() * m.width + 3 * m.ffn_hidden * m.width);
  const auto entry = static_cast<double>(2 * m.kv_heads * m.head_dim());
  for (std::int64_t layer = 0; layer < m.depth; ++layer) {
    const bool routed = config.routing.routes(layer);
    const double computed = routed ? 1 - std::pow(1 - kept, static_cast<double>(rows)) : 1.0;
    weights += computed * block_weights;
    entries += static_cast<double>(rows) * (routed ? kept * kept : 1.0) * context * entry;
    if (routed) weights += static_cast<double>(m.width * (1 + config.routing.causal.predictor_hidden));
  }
  return (weights + entries) * static_cast<double>(element);
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

struct Setup {
  Config config;
  std::shared_ptr<Backend> backend;
  std::unique_ptr<Context> c;
  std::unique_ptr<Transformer> model;
  EngineOptions options;
  std::vector<double> spread;  // of the predictors' logits, by routed layer
};

Setup prepare(const DecodeFlags& flags, const Globals& globals, bool whole_prompt) {
  Setup s;
  s.config = config_of(flags);
  if (s.config.routing.has_experts() && s.config.routing.needs_future())
    throw UsageError(
        fmt::format("--variant {} has no causal rule to decode with here.", flags.model.variant));
  s.backend = open_backend(globals, s.config);
  s.config.train.precision = !flags.precision.empty() ? flags.precision
                             : s.backend->is_cpu()    ? "fp32"
                                                      : "bf16";
  require_precision(*s.backend, {"--precision", s.config.train.precision, "--precision fp32"}, globals,
                    s.config);
  s.c = std::make_unique<Context>(s.backend, compute_dtype(*s.backend, s.config));
  s.model = std::make_unique<Transformer>(*s.c, s.config.model, s.config.routing, false);
  s.model->initialise(*s.c, 1);
  if (s.config.routing.kind != RoutingKind::None) s.options.rule = causal_rule(s.config.routing);
  if (s.config.routing.has_predictor() && s.config.routing.routes_depth()) {
    constexpr std::int64_t kMost = 8192, kEnough = 1024;
    const std::int64_t last = std::min(kMost, whole_prompt ? flags.context : flags.context + flags.steps);
    s.spread = fit_capacity(*s.c, *s.model, s.options.rule,
                            whole_prompt ? 0 : std::max<std::int64_t>(0, last - kEnough), last);
  }
  const ModelConfig& m = s.config.model;
  const auto element = static_cast<std::int64_t>(size_of(s.c->compute_dtype()));
  const std::int64_t blocks = (m.max_seq_len + flags.block - 1) / flags.block + 1;
  s.options.cache = {
      .block = flags.block,
      .bytes = flags.batch * 2 * m.kv_heads * m.head_dim() * flags.block * blocks * element * (m.depth + 1)};
  s.options.max_sequences = flags.batch;
  s.options.max_rows = std::max(flags.chunk, flags.batch);
  return s;
}

nlohmann::json line_of(const char* bench, const DecodeFlags& flags, const Setup& s) {
  return {{"bench", bench},
          {"device", s.backend->description()},
          {"preset", flags.model.preset},
          {"variant", flags.model.variant},
          {"context", flags.context},
          {"batch", flags.batch},
          {"kv_heads", s.config.model.kv_heads},
          {"vocab", flags.model.vocab},
          {"precision", s.config.train.precision},
          {"invariant", flags.invariant},
          {"params_m", static_cast<double>(count_parameters(s.config).total) / 1e6}};
}

double kept_share(const EngineStats& s) {
  double kept = 0;
  for (const std::int64_t rows : s.routed_rows) kept += static_cast<double>(rows);
  return s.routed_rows.empty()
             ? 0
             : kept / static_cast<double>(s.rows * static_cast<std::int64_t>(s.routed_rows.size()));
}

// Texts that have their context, and write.
std::vector<RequestId> begin_texts(Engine& engine, const Setup& s, const DecodeFlags& flags) {
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
void settle(Engine& engine, const Setup& s, const DecodeFlags& flags) {
  const std::vector<std::int64_t> layers = s.model->routed_layers();
  std::vector<double> bias;
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

void run_decode(const DecodeFlags& flags, const Globals& globals) {
  const Setup s = prepare(flags, globals, false);
  const double ceiling = read_rate(*s.backend);
  Engine engine(*s.c, *s.model, s.options);
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
  EngineStats during = engine.stats();
  during.rows -= before.rows;
  for (std::size_t i = 0; i < during.routed_rows.size(); ++i) during.routed_rows[i] -= before.routed_rows[i];
  const double kept = kept_share(during), seconds = median(times);
  const double bytes = least_bytes(s.config, size_of(s.c->compute_dtype()), flags.batch, kept,
                                   static_cast<double>(flags.context));
  nlohmann::json json = line_of("decode", flags, s);
  json["ms"] = 1e3 * seconds;
  json["tok_s"] = static_cast<double>(flags.batch) / seconds;
  json["routed_fraction"] = s.config.routing.routes_depth() ? nlohmann::json(kept) : nullptr;
  json["random_cache"] = flags.random_cache;
  json["whole_steps"] = during.whole_steps > before.whole_steps;
  // Which experts' weights are read depends on the tokens; what is not known is not said.
  const bool known = !s.config.routing.has_experts();
  json["least_bytes"] = known ? nlohmann::json(bytes) : nullptr;
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
  const Setup s = prepare(flags, globals, true);
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
  add_bench_model_flags(*sub, flags->model);
  sub->add_option("--context", flags->context, "Tokens of each text before")
      ->capture_default_str()
      ->check(number_from_to(1, 1e7));
  sub->add_option("--batch", flags->batch, "Texts at the same time")
      ->capture_default_str()
      ->check(number_from_to(1, 1e5));
  sub->add_option("--kv-heads", flags->kv_heads, "Key/value heads; 0: as many as heads")
      ->capture_default_str()
      ->check(number_from_to(0, 1024));
  sub->add_option("--steps", flags->steps, "Steps timed (prefill: a sixteenth as many); the median counts")
      ->capture_default_str()
      ->check(number_from_to(1, 1e6));
  sub->add_option("--chunk", flags->chunk, "Tokens of a pass")
      ->capture_default_str()
      ->check(number_from_to(1, 1e6));
  sub->add_option("--block", flags->block, "Tokens of a block of the cache, a multiple of 16")
      ->capture_default_str()
      ->check(number_from_to(16, 1024));
  sub->add_option("--precision", flags->precision, "bf16 | fp32; default: bf16 on a GPU, fp32 on the CPU")
      ->check(CLI::IsMember({"bf16", "fp32"}));
  sub->add_flag("--invariant", flags->invariant, "Row-invariant kernels");
  if (std::string_view(name) == "decode") {
    sub->add_flag("--random-cache", flags->random_cache,
                  "The context's keys and values are random numbers, not computed");
  }
  add_global_flags(*sub, globals);
  sub->footer(fmt::format("Example:\n  fathom bench {} --preset d6 --variant mod --json", name));
  sub->callback([flags, &globals, run] { run(*flags, globals); });
}

}  // namespace

void add_bench_decode(CLI::App& bench, Globals& globals) {
  add(bench, globals, "decode", "The engine's next tokens: tok/s, share of the rate of reading", run_decode);
  add(bench, globals, "prefill", "The engine over prompts: tok/s, share of the GEMM rate", run_prefill);
}

}  // namespace fathom::app
