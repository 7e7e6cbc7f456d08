// What the benches of the engine share: random models whose routers keep the capacity, and the engine's
// options.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "app/bench_model.h"
#include "app/command.h"
#include "infer/engine.h"
#include "src/config/config.h"

namespace fathom::app {

struct EngineBenchFlags {
  BenchModel model;
  std::int64_t context = 1024;
  std::int64_t batch = 1;
  std::int64_t kv_heads = 0;
  std::int64_t chunk = 0;  // 0: chunk_for()
  std::int64_t block = 64;
  std::string precision;
  int weights = 16;  // bits of the products' weights
  std::int64_t group = 0;
  int activations = 16;  // bits of the rows that they read
  int kv = 16;           // bits of keys and values
  std::int64_t whole_rows = EngineOptions{}.whole_rows;
  bool launches_ahead = true;
  bool invariant = false;
};
/// Declares --kv-heads, --chunk, --block, --precision, --weights, --group, --activations, --kv,
/// --whole-rows, --no-launch-ahead, --invariant and the model's flags.
void add_engine_bench_flags(CLI::App& sub, EngineBenchFlags& flags, Globals& globals);

struct EngineBench {
  Config config;
  std::shared_ptr<Backend> backend;
  std::unique_ptr<Context> c;
  std::unique_ptr<Transformer> model;
  EngineOptions options;
  std::vector<double> spread;  // of the predictors' logits, by routed layer
};

/// A random model for texts of at most `context` + `more` tokens, `batch` at the same time, and memory for
/// all of them. Its predictors keep the capacity of random tokens at the positions [fit_from, context +
/// fit_more). UsageError: a variant that has no causal rule, heads that do not divide.
EngineBench prepare_engine(const EngineBenchFlags& flags, const Globals& globals, std::int64_t more,
                           std::int64_t fit_from, std::int64_t fit_more);

/// The bias of a routed layer's predictor.
const Tensor& bias_of(const Transformer& model, std::int64_t layer);
std::vector<std::int32_t> random_ids(std::int64_t n, std::int64_t vocab, unsigned seed);
/// One pass. UserError: a text failed. InternalError: there is none.
void step(Engine& engine);
/// The share of its rows that the routed layers kept, of all passes; 0 without such layers.
double kept_share(const EngineStats& s);
/// What a line of such a bench begins with.
nlohmann::json line_of(const char* bench, const EngineBenchFlags& flags, const EngineBench& s);

}  // namespace fathom::app
