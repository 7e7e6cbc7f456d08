#include "app/bench_engine.h"

#include <algorithm>
#include <random>

#include <fmt/format.h>

#include "app/device.h"
#include "app/engine_flags.h"
#include "app/trained_model.h"
#include "infer/quant/quantize_model.h"
#include "infer/quant/round_to_nearest.h"
#include "kernels/error.h"
#include "src/config/resolve.h"
#include "src/flops/flops.h"

namespace fathom::app {

namespace {

Config config_of(const EngineBenchFlags& flags, std::int64_t more) {
  Config c = bench_model(flags.model);
  c.invariant = flags.invariant;
  if (flags.kv_heads > 0) {
    if (c.model.heads % flags.kv_heads != 0)
      throw UsageError(fmt::format("--kv-heads {} does not divide the {} heads of {}.", flags.kv_heads,
                                   c.model.heads, flags.model.preset));
    c.model.kv_heads = flags.kv_heads;
  }
  c.model.max_seq_len = flags.context + more;
  c.train.steps = 1;
  return resolve(c);
}

// Random routers keep any number of tokens. The predictors' biases are set so that, of random tokens at the
// positions [first, last) of a text, each layer keeps the capacity: first layer first, since what a layer
// keeps changes what the next one sees. What a random model's stream is like depends on the position.
// What is left `bench decode` does while it decodes. Returns how wide each layer's logits are spread.
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

}  // namespace

void add_engine_bench_flags(CLI::App& sub, EngineBenchFlags& flags, Globals& globals) {
  add_bench_model_flags(sub, flags.model);
  sub.add_option("--kv-heads", flags.kv_heads, "Key/value heads; 0: as many as heads")
      ->capture_default_str()
      ->check(number_from_to(0, 1024));
  add_chunk_flag(sub, flags.chunk);
  sub.add_option("--block", flags.block, "Tokens of a block of the cache, a multiple of 16")
      ->capture_default_str()
      ->check(number_from_to(16, 1024));
  sub.add_option("--precision", flags.precision,
                 "bf16 (on the CPU the weights alone) | fp32; default: bf16 on a GPU, fp32 on the CPU")
      ->check(CLI::IsMember({"bf16", "fp32"}));
  sub.add_option("--weights", flags.weights,
                 "4 | 8 | 16: bits of the weights of products; 16: as --precision has them")
      ->capture_default_str()
      ->check(CLI::IsMember({4, 8, 16}));
  sub.add_option("--group", flags.group,
                 "Columns that share a scale of --weights 4 and 8; 0: one scale a row")
      ->capture_default_str()
      ->check(number_from_to(0, 1e9));
  add_kv_flag(sub, flags.kv, "4 | 8 | 16: bits of keys and values; default: 16, as they are computed");
  sub.add_option(
         "--activations", flags.activations,
         "4 | 8 | 16: bits of the rows that products read, behind Hadamard transforms; with --weights 4 "
         "and 8")
      ->capture_default_str()
      ->check(CLI::IsMember({4, 8, 16}));
  sub.add_option(
         "--whole-rows", flags.whole_rows,
         "Texts that decode in steps of one launch each, on a GPU; more go op by op; default: 12, or as "
         "many as one step has room for")
      ->check(number_from_to(0, 1e6));
  sub.add_flag("!--no-launch-ahead", flags.launches_ahead,
               "Such a step is launched when the one before it has been looked at, not before");
  sub.add_flag("--invariant", flags.invariant, "Row-invariant kernels");
  add_global_flags(sub, globals);
}

EngineBench prepare_engine(const EngineBenchFlags& flags, const Globals& globals, std::int64_t more,
                           std::int64_t fit_from, std::int64_t fit_more) {
  EngineBench s;
  if (flags.activations < 16 && flags.weights == 16)
    throw UsageError(fmt::format("--activations {} goes with --weights 4 or 8.", flags.activations));
  s.config = config_of(flags, more);
  if (s.config.routing.has_experts() && s.config.routing.needs_future())
    throw UsageError(
        fmt::format("--variant {} has no causal rule to decode with here.", flags.model.variant));
  s.backend = open_backend(globals, s.config);
  s.config.train.precision = !flags.precision.empty() ? flags.precision
                             : s.backend->is_cpu()    ? "fp32"
                                                      : "bf16";
  s.c = inference_context(s.backend, s.config.train.precision);
  s.model = std::make_unique<Transformer>(*s.c, s.config.model, s.config.routing, false);
  s.model->initialise(*s.c, 1);
  if (flags.weights < 16 || flags.kv < 16) {
    // As quarot has them; of random weights it does not matter that nothing was rotated.
    const bool are_few = flags.activations < 16;
    Quantization q{.bits = flags.weights,
                   .group = flags.group,
                   .activations = flags.activations,
                   .activation_clip = default_activation_clip(flags.activations),
                   .online = {.down = are_few, .heads = are_few, .queries_keys = flags.kv < 16}};
    if (!q.has_packed_weights()) q.kinds.clear();
    // Nor which scale a row gets: one is not searched for.
    const auto to_nearest = [](const MatrixToQuantize& m) {
      const PackedFormat& f = m.format;
      return round_to_nearest(m.values, m.rows, f.columns,
                              {.bits = f.bits, .group = f.group, .clip = Clip::None});
    };
    s.model = std::move(quantize_model(*s.c, *s.model, q, to_nearest).model);
  }
  s.model->set_kv_bits(flags.kv);
  if (s.config.routing.kind != RoutingKind::None) s.options.rule = causal_rule(s.config.routing);
  if (s.config.routing.has_predictor() && s.config.routing.routes_depth()) {
    constexpr std::int64_t kMost = 8192;
    // Of a longer text the positions before kMost stand for those that it is about.
    const std::int64_t wanted = flags.context + fit_more, last = std::min(kMost, wanted);
    s.spread = fit_capacity(*s.c, *s.model, s.options.rule,
                            std::max<std::int64_t>(0, fit_from - (wanted - last)), last);
  }
  const ModelConfig& m = s.config.model;
  const std::int64_t blocks = (m.max_seq_len + flags.block - 1) / flags.block + 1;
  s.options.cache = {
      .block = flags.block,
      .bytes = flags.batch * KvCache::entry_bytes(*s.c, *s.model) * flags.block * blocks * (m.depth + 1)};
  s.options.whole_rows = flags.whole_rows;
  s.options.launches_ahead = flags.launches_ahead;
  s.options.max_sequences = flags.batch;
  // Prompts go on beside texts that decode.
  s.options.max_rows = std::max(flags.chunk > 0 ? flags.chunk : chunk_for(*s.backend), 2 * flags.batch);
  return s;
}

const Tensor& bias_of(const Transformer& model, std::int64_t layer) {
  return model.parameters().get(fmt::format("model.layers.{}.router_predictor.2.bias", layer));
}

std::vector<std::int32_t> random_ids(std::int64_t n, std::int64_t vocab, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<std::int32_t> any(0, static_cast<std::int32_t>(vocab) - 1);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(n));
  for (std::int32_t& id : ids) id = any(random);
  return ids;
}

// One pass; a text that fails ends the bench.
void step(Engine& engine) {
  if (engine.idle()) throw InternalError("[bench] every text has ended before its time");
  for (const Event& e : engine.step()) {
    if (e.finish == Finish::Error) throw UserError(e.error);
  }
}

double kept_share(const EngineStats& s) {
  double kept = 0;
  for (const std::int64_t rows : s.routed_rows) kept += static_cast<double>(rows);
  return s.routed_rows.empty()
             ? 0
             : kept / static_cast<double>(s.rows * static_cast<std::int64_t>(s.routed_rows.size()));
}

nlohmann::json line_of(const char* bench, const EngineBenchFlags& flags, const EngineBench& s) {
  return {{"bench", bench},
          {"device", s.backend->description()},
          {"preset", flags.model.preset},
          {"variant", flags.model.variant},
          {"context", flags.context},
          {"batch", flags.batch},
          {"kv_heads", s.config.model.kv_heads},
          {"vocab", flags.model.vocab},
          {"precision", s.config.train.precision},
          {"weights", flags.weights},
          {"group", flags.group},
          {"activations", flags.activations},
          {"kv", flags.kv},
          {"invariant", flags.invariant},
          {"params_m", static_cast<double>(count_parameters(s.config).total) / 1e6}};
}

}  // namespace fathom::app
