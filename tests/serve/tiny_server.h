// A server of a tiny routed model with random weights, of bytes, on a free port of this machine alone.
#pragma once

#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>

#include <gtest/gtest.h>

#include "infer/engine.h"
#include "infer/speculate/speculative_cycles.h"
#include "serve/service.h"
#include "src/core/stopwatch.h"
#include "tests/devices.h"
#include "tests/serve/client.h"

namespace fathom::serve {

struct TinyModel {
  static constexpr double kThreshold = 0.35;  // some tokens pass, and some do not

  Context c;
  Transformer model;
  Causal rule;
  ByteTokenizer tokenizer;

  static ModelConfig config(std::int64_t context) {
    ModelConfig m;
    m.vocab_size = 272;  // padded, as stores' are
    m.width = 16;
    m.depth = 4;
    m.heads = 4;
    m.kv_heads = 2;
    m.ffn_hidden = 20;
    m.max_seq_len = context;
    return m;
  }
  static RoutingConfig routing() {
    RoutingConfig r;
    r.kind = RoutingKind::Mod;
    r.capacity = 0.25;
    r.every = 2;
    r.causal.method = CausalMethod::Predictor;
    r.causal.predictor_hidden = 5;
    return r;
  }

  explicit TinyModel(std::int64_t context = 512)
      : c(make_cpu_backend({.invariant = true}, 1), DType::F32), model(c, config(context), routing(), false) {
    std::mt19937_64 generator(5);
    std::normal_distribution<double> normal;
    for (const ParameterSpec& spec : model.parameters().specs()) {
      const bool norm = spec.name.find("norm") != std::string::npos;
      std::vector<double> values(static_cast<std::size_t>(spec.shape.size()));
      for (double& x : values) x = norm ? 1 + 0.1 * normal(generator) : 0.25 * normal(generator);
      from_doubles(c.backend(), model.parameters().get(spec.name), values);
    }
    rule = causal_rule(routing());
    rule.threshold = kThreshold;
  }

  ServedModel served() const {
    ServedModel s{.name = "tiny",
                  .created = 1700000000,
                  .tokenizer = &tokenizer,
                  .token_texts = TokenTexts(tokenizer),
                  .stop_tokens = {ByteTokenizer::kEndOfDocument},
                  .routed_layers = model.routed_layers(),
                  .limits = {}};
    s.limits.vocab = tokenizer.vocab_size();
    s.limits.context = model.config().max_seq_len;
    s.limits.min_threshold = 0.1;
    s.limits.max_threshold = 0.9;
    return s;
  }

  Engine engine(std::int64_t sequences, std::int64_t texts_of_cache, bool shared_noise = false) {
    EngineOptions o;
    o.rule = rule;
    o.vocab = tokenizer.vocab_size();
    o.max_sequences = sequences;
    o.prefix_cache = true;
    o.shared_noise = shared_noise;
    o.cache.block = 16;
    const std::int64_t blocks = (model.config().max_seq_len + 15) / 16 + 1;
    o.cache.bytes = KvCache::entry_bytes(c, model) * 16 * blocks * 5 * texts_of_cache;
    return Engine(c, model, o);
  }
};

struct TinyOptions {
  ServiceOptions service = {};
  std::int64_t sequences = 64;
  std::int64_t cache_texts = 64;  // that the cache holds at their longest
  std::int64_t context = 512;
  std::optional<SpeculationOptions> speculation = {};
  std::int64_t speculated_texts = 1;
  bool shared_noise = false;
};

class TinyServer {
 public:
  explicit TinyServer(TinyOptions o = {})
      : model_(o.context), engine_(model_.engine(o.sequences, o.cache_texts, o.shared_noise)) {
    if (o.speculation) {
      cycles_.emplace(engine_.cached_model(), nullptr, *o.speculation, o.speculated_texts);
      engine_.go_by(&*cycles_);
    }
    o.service.http.port = 0;
    o.service.scheduler.sequences = o.sequences;
    served_ = std::make_unique<ServedModel>(model_.served());
    service_ = std::make_unique<Service>(o.service);
    service_->start();
  }
  ~TinyServer() { stop(); }

  void open_unasked() {
    thread_ = std::thread([this] { service_->run(engine_, *served_); });
  }
  void open() {
    open_unasked();
    for (int i = 0; i < 2000 && get(port(), "/health").status != 200; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  void stop() {
    if (!thread_.joinable()) return;
    while (!service_->shut_down()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    thread_.join();
  }
  void join() { thread_.join(); }

  std::uint16_t port() const { return service_->port(); }
  Service& service() { return *service_; }
  /// After stop().
  EngineStats stats() const { return engine_.stats(); }
  TinyModel& model() { return model_; }
  /// A series of /metrics: "fathom_requests_running", labels and all.
  double metric(const std::string& name) const {
    const std::string text = "\n" + get(port(), "/metrics").body;
    const std::size_t at = text.find("\n" + name + " ");
    return at == std::string::npos ? NAN : std::stod(text.substr(at + name.size() + 2));
  }
  /// Waits until a series has a value.
  bool comes_to(const std::string& name, double value) const {
    for (const Stopwatch watch; watch.seconds() < kPatience;) {
      if (metric(name) == value) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return false;
  }
  /// Waits until a series is no more than `value`.
  bool falls_to(const std::string& name, double value) const {
    for (const Stopwatch watch; watch.seconds() < kPatience;) {
      if (metric(name) <= value) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return false;
  }
  /// Waits until nothing runs or waits, and all blocks are free.
  bool all_blocks_free() const {
    return comes_to("fathom_requests_running", 0) && comes_to("fathom_requests_waiting", 0) &&
           comes_to("fathom_kv_cache_free_blocks", metric("fathom_kv_cache_blocks"));
  }

 private:
  static constexpr double kPatience = 120;  // seconds: under a sanitizer, on a busy machine
  TinyModel model_;
  Engine engine_;
  std::optional<SpeculativeCycles> cycles_;
  std::unique_ptr<ServedModel> served_;
  std::unique_ptr<Service> service_;
  std::thread thread_;
};

}  // namespace fathom::serve
