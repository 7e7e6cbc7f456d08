// fathom serve MODEL
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <memory>
#include <optional>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include "app/command.h"
#include "app/engine_flags.h"
#include "app/speculation_room.h"
#include "app/trained_model.h"
#include "infer/speculate/speculative_cycles.h"
#include "kernels/error.h"
#include "serve/service.h"
#include "src/core/stopwatch.h"
#include "src/core/units.h"
#include "src/model/model_tokenizer.h"

namespace fathom::app {

namespace {

constexpr const char* kKeyVariable = "FATHOM_API_KEY";

struct ServeFlags {
  std::string model;
  std::string name;
  std::string tokenizer;
  double threshold = -1;
  double min_threshold = 0.001, max_threshold = 0.999;
  bool invariant = false;
  bool no_prefix_cache = false;
  std::string precision = "auto";
  std::string key_file;
  double deadline = 600;
  double drain = 30;
  double max_body_mb = 4;
  serve::ServiceOptions service;
  serve::RequestLimits limits;
  EngineFlags engine;
  SpeculationFlags speculation;
  std::int64_t speculated_texts = 1;
};

// The folder's name: what a client calls the model where nobody says otherwise.
std::string name_of_model(const ServeFlags& flags) {
  if (!flags.name.empty()) return flags.name;
  std::filesystem::path path = std::filesystem::absolute(flags.model).lexically_normal();
  if (path.filename().empty()) path = path.parent_path();
  return path.has_extension() && path.extension() == ".h5" ? path.stem().string() : path.filename().string();
}

serve::ApiKeys keys_of(const ServeFlags& flags) {
  serve::ApiKeys keys;
  if (!flags.key_file.empty()) keys = serve::ApiKeys::from_file(flags.key_file);
  if (const char* key = std::getenv(kKeyVariable); key != nullptr && *key != '\0')
    keys.add(serve::ApiKeys({key}));
  return keys;
}

std::chrono::milliseconds milliseconds(double seconds) {
  return std::chrono::milliseconds(static_cast<std::int64_t>(seconds * 1000));
}

void warn_of_the_open(const ServeFlags& flags) {
  const std::string& host = flags.service.http.host;
  if (!serve::is_loopback(host) && flags.service.api.keys.empty())
    spdlog::warn(
        "Warning: everybody who can reach {} may use this server. --api-key-file or {} asks for a key.", host,
        kKeyVariable);
}

/// The model, its engine, and what speculates.
class ServedEngine {
 public:
  ServedEngine(const ServeFlags& flags, const Globals& globals)
      : model_(open_model(flags.model, {.invariant = flags.invariant}, globals, flags.precision)),
        routing_(model_.loaded.config.routing),
        tokenizer_(tokenizer_of(model_.loaded, flags.tokenizer)) {
    const Transformer& model = *model_.loaded.model;
    if (flags.engine.kv > 0) model_.loaded.model->set_kv_bits(flags.engine.kv);
    if (flags.threshold >= 0) routing_.causal.threshold = flags.threshold;
    options_ = engine_options(flags);
    options_.vocab = tokenizer_->vocab_size();
    options_.prefix_cache = !flags.no_prefix_cache;
    if (routing_.kind != RoutingKind::None) options_.rule = causal_rule(routing_);
    std::optional<SpeculationOptions> speculation;
    if (flags.speculation.asked()) speculation = speculation_of(flags);
    engine_.emplace(*model_.context, model, options_);
    if (!speculation) return;
    cycles_.emplace(engine_->cached_model(), draft_ ? &draft_->cached() : nullptr, *speculation,
                    flags.speculated_texts);
    engine_->go_by(&*cycles_);
  }

  Engine& engine() { return *engine_; }
  const EngineOptions& options() const { return options_; }
  serve::ServedModel served(const ServeFlags& flags, const std::string& name) const;

 private:
  EngineOptions engine_options(const ServeFlags& flags) const {
    return flags.engine.options(*model_.context, *model_.loaded.model,
                                static_cast<std::size_t>(flags.engine.sequences));
  }
  // Before the engine's cache takes what memory there is.
  SpeculationOptions speculation_of(const ServeFlags& flags) {
    SpeculationOptions o = speculation_options(flags.speculation, *model_.loaded.model);
    // No more are written at the same time.
    const std::int64_t texts = std::min<std::int64_t>(flags.speculated_texts, flags.engine.sequences);
    o.plain_first = 0;  // nobody is told how much faster it is
    options_.shared_noise = o.tokens == RowRule::Tokens::SharedNoise;
    if (wants_model(o))
      draft_.emplace(flags.speculation, DraftModel::Setting{.target = model_.loaded,
                                                            .tokenizer = tokenizer_.get(),
                                                            .backend = model_.context->shared_backend(),
                                                            .precision = flags.precision,
                                                            .block = flags.engine.block,
                                                            .chunk = options_.max_rows,
                                                            .texts = texts});
    // Of what the draft has left.
    options_.cache = engine_options(flags).cache;
    if (flags.engine.cache_gb <= 0)
      options_.cache.bytes +=
          bytes_beside(*model_.context, *model_.loaded.model, o, flags.engine.block, texts);
    return o;
  }

  TrainedModel model_;
  RoutingConfig routing_;
  std::unique_ptr<Tokenizer> tokenizer_;
  EngineOptions options_;
  std::optional<DraftModel> draft_;
  std::optional<Engine> engine_;
  std::optional<SpeculativeCycles> cycles_;  // what it has of the engine's cache goes before that
};

serve::ServedModel ServedEngine::served(const ServeFlags& flags, const std::string& name) const {
  const LoadedModel& loaded = model_.loaded;
  serve::ServedModel served{.name = name,
                            .created = std::time(nullptr),
                            .tokenizer = tokenizer_.get(),
                            .token_texts = serve::TokenTexts(*tokenizer_),
                            .stop_tokens = loaded.ends.stops,
                            .routed_layers = loaded.model->routed_layers(),
                            .limits = flags.limits};
  if (tokenizer_->end_of_document() >= 0) served.stop_tokens.push_back(tokenizer_->end_of_document());
  served.limits.vocab = std::min(tokenizer_->vocab_size(), loaded.config.model.vocab_size);
  served.limits.context = engine_->context();
  if (routing_.looks_ahead()) {
    served.limits.min_threshold = flags.min_threshold;
    served.limits.max_threshold = flags.max_threshold;
  }
  served.limits.texts =
      std::min(flags.limits.texts, flags.service.scheduler.sequences + flags.service.scheduler.queue);
  return served;
}

void run(ServeFlags& flags, const Globals& globals) {
  const Stopwatch watch;
  if (flags.min_threshold > flags.max_threshold)
    throw UsageError(fmt::format("--min-threshold {} is above --max-threshold {}.", flags.min_threshold,
                                 flags.max_threshold),
                     "Requests choose between the two.");
  // Threads of the server log too.
  auto log = spdlog::stderr_color_mt("fathom serve");
  log->set_pattern("%^%v%$");
  log->set_level(spdlog::get_level());
  spdlog::set_default_logger(log);
  flags.service.api.keys = keys_of(flags);
  flags.service.api.deadline = milliseconds(flags.deadline);
  flags.service.drain = milliseconds(flags.drain);
  flags.service.http.body_bytes = static_cast<std::size_t>(flags.max_body_mb * 1e6);
  flags.service.scheduler.sequences = flags.engine.sequences;
  const std::string name = name_of_model(flags);
  // Before the model: a port that is taken is known at once.
  serve::Service service(flags.service);
  // There is nothing to lose but the answers that a second signal gives up; destructors would wait for them.
  service.shut_down_on_signals([](int number) { std::_Exit(number > 1 ? 1 : 0); });
  service.start();
  spdlog::info("Listening on {}; loading {}", service.url(), flags.model);
  warn_of_the_open(flags);
  ServedEngine loaded(flags, globals);
  Engine& engine = loaded.engine();
  const serve::ServedModel served = loaded.served(flags, name);

  const EngineStats stats = engine.stats();
  spdlog::info("Serving {} on {} after {}: context {}, {} texts at the same time, {} of cache", name,
               service.url(), format_duration(watch.seconds()), engine.context(),
               loaded.options().max_sequences,
               format_bytes(static_cast<double>(stats.blocks * stats.block_bytes)));
  if (globals.json) {
    nlohmann::json line = {{"url", service.url()},
                           {"host", flags.service.http.host},
                           {"port", service.port()},
                           {"model", name},
                           {"context", engine.context()},
                           {"sequences", loaded.options().max_sequences},
                           {"cache_bytes", stats.blocks * stats.block_bytes}};
    if (flags.speculation.asked()) {
      line["speculate"] = flags.speculation.method;
      line["speculate_max_requests"] = flags.speculated_texts;
    }
    std::cout << line.dump() << std::endl;
  }
  service.run(engine, served);
  spdlog::info("Stopped.");
}

void add_http_flags(CLI::App& sub, ServeFlags& flags) {
  serve::HttpOptions& http = flags.service.http;
  sub.add_option("--host", http.host,
                 "Address to listen on; 0.0.0.0 (or [::], as ::) for everybody who can reach it")
      ->capture_default_str();
  sub.add_option("--port", http.port, "0: any free one, which is printed")
      ->capture_default_str()
      ->check(number_from_to(0, 65535));
  sub.add_option("--name", flags.name, "What clients call the model; default: the folder's name");
  sub.add_option("--api-key-file", flags.key_file,
                 std::string("Keys, one a line; one more may be in the environment's ") + kKeyVariable);
  sub.add_option("--tls-cert", http.tls_certificate,
                 "PEM file of the server's certificate and those that signed it: https, with --tls-key");
  sub.add_option("--tls-key", http.tls_key, "PEM file of the certificate's key");
  sub.add_option("--cors-origin", flags.service.api.origins.cors,
                 "Pages of this origin may ask too; *: of any; default: of none");
  sub.add_option(
      "--allow-host", flags.service.api.origins.hosts,
      "Without keys and for this machine alone: names, beside localhost, that requests may call it by");
  sub.add_option("--queue", flags.service.scheduler.queue,
                 "Texts that may wait beside those that are computed; more are refused (429)")
      ->capture_default_str()
      ->check(number_from_to(0, 1e6));
  sub.add_option("--max-texts", flags.limits.texts, "Of one request: its prompts times n")
      ->capture_default_str()
      ->check(number_from_to(1, 1e5));
  sub.add_option("--deadline", flags.deadline, "Seconds that a request may take; 0: any")
      ->capture_default_str()
      ->check(number_from_to(0, 1e6));
  sub.add_option("--drain", flags.drain, "Seconds for what runs to be done, after SIGTERM")
      ->capture_default_str()
      ->check(number_from_to(0, 1e6));
  sub.add_option("--max-body-mb", flags.max_body_mb, "Of a request, in 1e6 bytes; more are refused (413)")
      ->capture_default_str()
      ->check(number_from_to(0.001, 1000));
  sub.add_option("--max-connections", http.connections,
                 "Above it those are closed that have been idle for longest")
      ->capture_default_str()
      ->check(number_from_to(1, 1e6));
  sub.add_option("--access-log", flags.service.access_log,
                 "File that gets a line of JSON for each request; -: standard error");
}

}  // namespace

void add_serve(CLI::App& app, Globals& globals) {
  auto flags = std::make_shared<ServeFlags>();
  CLI::App* sub = app.add_subcommand("serve", "Answer HTTP requests, as OpenAI's clients make them");
  sub->add_option("model", flags->model, "Run folder, checkpoint file or exported model")->required();
  add_http_flags(*sub, *flags);
  sub->add_option("--tokenizer", flags->tokenizer,
                  "Tokenizer, if neither in the run folder nor where the config says");
  sub->add_option("--threshold", flags->threshold, "Causal routing threshold (default: the config's)")
      ->check(number_from_to(0.001, 0.999));
  sub->add_option("--min-threshold", flags->min_threshold, "The lowest that a request may choose")
      ->capture_default_str()
      ->check(number_from_to(0.001, 0.999));
  sub->add_option("--max-threshold", flags->max_threshold, "And the highest")
      ->capture_default_str()
      ->check(number_from_to(0.001, 0.999));
  sub->add_flag("--invariant", flags->invariant,
                "Row-invariant kernels: a text is the same whoever else is served");
  sub->add_flag("--no-prefix-cache", flags->no_prefix_cache,
                "Texts that begin alike are computed each on its own");
  add_precision_flag(*sub, flags->precision,
                     "fp32 | bf16 (on the CPU the weights alone) | auto: bf16 on a GPU, fp32 on the CPU");
  add_engine_flags(*sub, flags->engine);
  add_speculation_flags(*sub, flags->speculation);
  sub->add_option("--speculate-max-requests", flags->speculated_texts,
                  "Texts up to which each goes by speculation; more share a pass of the model instead")
      ->capture_default_str()
      ->check(number_from_to(1, 1e4));
  add_global_flags(*sub, globals);
  sub->footer(
      "Examples:\n"
      "  fathom serve runs/mod\n"
      "  fathom serve llama --host 0.0.0.0 --port 8080 --api-key-file keys.txt --kv 4\n"
      "  fathom serve runs/big --speculate triforce --draft runs/small\n"
      "  curl http://127.0.0.1:8000/v1/completions -d '{\"prompt\": \"The sea\"}'");
  sub->callback([flags, sub, &globals] {
    check_speculation_flags(*sub, flags->speculation);
    if (!flags->speculation.asked() && sub->count("--speculate-max-requests") > 0)
      throw UsageError("--speculate-max-requests goes with --speculate.",
                       "Say how: --speculate ngram, for one.");
    run(*flags, globals);
  });
}

}  // namespace fathom::app
