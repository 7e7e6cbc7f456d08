// fathom bench batch: the engine alone over the requests that `fathom bench load` sends to a server of the
// same model: what a server is measured against.
#include <iostream>
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "app/bench_engine.h"
#include "app/bench_kernels.h"
#include "app/engine_flags.h"
#include "app/load_work.h"
#include "app/trained_model.h"
#include "kernels/error.h"
#include "src/core/stopwatch.h"
#include "src/model/model_tokenizer.h"

namespace fathom::app {

namespace {

struct BatchFlags {
  std::string model;
  std::string tokenizer;
  double threshold = -1;
  bool invariant = false;
  std::string precision = "auto";
  std::int64_t warm_up = 1;
  EngineFlags engine;
  LoadFlags load;
};

// One at a time where one has room; `each` gets what each then took, in seconds.
double run_all(Engine& engine, const BatchFlags& flags, const std::vector<LoadRequest>& requests,
               std::vector<double>& each) {
  const Stopwatch watch;
  for (const LoadRequest& r : requests) {
    Request request{.prompt = r.prompt, .max_tokens = r.max_tokens};
    request.sampling.temperature = flags.load.temperature;
    request.sampling.seed = r.seed;
    engine.submit(std::move(request));
    if (flags.engine.sequences > 1) continue;
    const Stopwatch one;
    while (!engine.idle()) step(engine);
    each.push_back(one.seconds());
  }
  while (!engine.idle()) step(engine);
  return watch.seconds();
}

// Of the counts that a line has.
EngineStats since(const EngineStats& before, EngineStats now) {
  now.rows -= before.rows;
  for (std::size_t i = 0; i < now.routed_rows.size(); ++i) now.routed_rows[i] -= before.routed_rows[i];
  now.steps -= before.steps;
  now.prompt_tokens -= before.prompt_tokens;
  now.decoded_tokens -= before.decoded_tokens;
  now.preemptions -= before.preemptions;
  return now;
}

void run(BatchFlags& flags, const Globals& globals) {
  const std::vector<LoadRequest> requests = load_requests(flags.load);
  const TrainedModel model =
      open_model(flags.model, {.invariant = flags.invariant}, globals, flags.precision);
  const LoadedModel& loaded = model.loaded;
  require_same_tokens(TokenStore::open(flags.load.data), loaded);
  const std::int64_t context = loaded.config.model.max_seq_len;
  if (flags.load.prompt_max + flags.load.new_max > context)
    throw UsageError(
        fmt::format("--prompt-max {} and --new-max {} together are more than this model's context of {}.",
                    flags.load.prompt_max, flags.load.new_max, context),
        "Give shorter prompts, or fewer new tokens.");
  if (flags.engine.kv > 0) loaded.model->set_kv_bits(flags.engine.kv);
  RoutingConfig routing = loaded.config.routing;
  if (flags.threshold >= 0) routing.causal.threshold = flags.threshold;
  EngineOptions options =
      flags.engine.options(*model.context, *loaded.model, static_cast<std::size_t>(flags.engine.sequences));
  options.vocab = tokenizer_of(loaded, flags.tokenizer)->vocab_size();
  if (routing.kind != RoutingKind::None) options.rule = causal_rule(routing);
  Engine engine(*model.context, *loaded.model, options);
  std::vector<double> each;
  // The same requests once more are passes of the same numbers of rows: by then every product's algorithm has
  // been chosen, every block of memory been touched and every step been recorded, as in a server that runs.
  for (std::int64_t i = 0; i < flags.warm_up; ++i) run_all(engine, flags, requests, each);
  each.clear();
  const EngineStats before = engine.stats();
  const double cpu = cpu_seconds();
  const double seconds = run_all(engine, flags, requests, each);
  const double cpu_used = cpu_seconds() - cpu;
  const EngineStats s = since(before, engine.stats());
  const nlohmann::json json = {
      {"bench", "batch"},
      {"device", model.context->backend().description()},
      {"requests", flags.load.requests},
      {"sequences", flags.engine.sequences},
      {"warm_up", flags.warm_up},
      {"prompt_tokens", s.prompt_tokens},
      {"new_tokens", s.decoded_tokens},
      {"seconds", seconds},
      {"new_tok_s", static_cast<double>(s.decoded_tokens) / seconds},
      {"request_s", static_cast<double>(flags.load.requests) / seconds},
      {"cpu_seconds", cpu_used},
      {"request", each.empty() ? nlohmann::json() : times_json(each)},
      {"steps", s.steps},
      {"preemptions", s.preemptions},
      {"routed_fraction", s.routed_rows.empty() ? nlohmann::json() : nlohmann::json(kept_share(s))}};
  if (globals.json) {
    std::cout << json.dump() << "\n";
    return;
  }
  std::cout << fmt::format(
      "{} requests, at most {} at the same time: {} tokens of prompts and {} new ones in {:.2f} s, "
      "{:.0f} new tok/s\n",
      flags.load.requests, flags.engine.sequences, s.prompt_tokens, s.decoded_tokens, seconds,
      static_cast<double>(s.decoded_tokens) / seconds);
}

}  // namespace

void add_bench_batch(CLI::App& bench, Globals& globals) {
  auto flags = std::make_shared<BatchFlags>();
  CLI::App* sub =
      bench.add_subcommand("batch", "The engine alone over the requests of bench load: new tok/s");
  sub->add_option("model", flags->model, "Run folder, checkpoint file or exported model")->required();
  add_load_flags(*sub, flags->load);
  sub->add_option("--tokenizer", flags->tokenizer,
                  "Tokenizer, if neither in the run folder nor where the config says");
  sub->add_option("--threshold", flags->threshold, "Causal routing threshold (default: the config's)")
      ->check(number_from_to(0.001, 0.999));
  sub->add_option("--warm-up", flags->warm_up,
                  "Times that all requests are done before the one that is timed")
      ->capture_default_str()
      ->check(number_from_to(0, 1000));
  sub->add_flag("--invariant", flags->invariant, "Row-invariant kernels");
  add_precision_flag(*sub, flags->precision,
                     "fp32 | bf16 (on the CPU the weights alone) | auto: bf16 on a GPU, fp32 on the CPU");
  add_engine_flags(*sub, flags->engine);
  add_global_flags(*sub, globals);
  sub->footer("Example:\n  fathom bench batch runs/mod --data books.valid.h5 --json");
  sub->callback([flags, &globals] { run(*flags, globals); });
}

}  // namespace fathom::app
