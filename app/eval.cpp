// fathom eval RUN [--data STORE]
#include <algorithm>
#include <cmath>
#include <iostream>
#include <memory>
#include <optional>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "app/command.h"
#include "app/engine_flags.h"
#include "app/eval_engine.h"
#include "app/trained_model.h"
#include "infer/generate.h"
#include "kernels/error.h"
#include "src/flops/flops.h"
#include "src/io/hdf5_file.h"
#include "src/io/output_file.h"
#include "src/model/checkpoint.h"
#include "train/evaluate.h"

namespace fathom::app {

namespace {

struct EvalFlags {
  std::string model;
  std::string data;
  std::string dump_logits;
  std::vector<std::int32_t> prompt_ids;
  std::int64_t tokens = 0;
  std::int64_t batch = 8;
  std::int64_t seq_len = 0;
  std::optional<double> threshold;
  bool invariant = false;
  bool by_engine = false;
  EngineFlags engine;
  std::string precision = "fp32";
};

// Tokens of a sequence of a model that others trained, which says how long texts may be, not how long they
// were.
constexpr std::int64_t kForeignSeqLen = 4096;

Config with_flags(Config config, const EvalFlags& flags) {
  if (flags.threshold) config.routing.causal.threshold = *flags.threshold;
  return config;
}

void print_text(const EvalResult& e, const Config& config, const std::string& checkpoint) {
  std::cout << fmt::format("{}: {} tokens\n", checkpoint, e.tokens);
  if (!e.sees_future) {
    std::cout << fmt::format("  loss        {:.4f} nats/token\n", e.loss);
  } else {
    std::cout << fmt::format("  val_topk    {:.4f} nats/token (routed as in training; sees the future)\n",
                             e.loss);
    if (e.causal) {
      std::cout << fmt::format(
          "  val_causal  {:.4f} nats/token (each token routed by itself: what can be served)\n", *e.causal);
      std::cout << fmt::format("  difference  {:+.4f}\n", *e.causal - e.loss);
    }
  }
  std::cout << fmt::format("  perplexity  {:.2f}\n", std::exp(e.judged()));
  if (e.bytes > 0) std::cout << fmt::format("  bits/byte   {:.4f}\n", e.bits_per_byte());
  if (e.causal_flops_per_token > 0) {
    std::cout << fmt::format("  FLOPs       {:.4g} a token, forward{}\n", e.causal_flops_per_token,
                             e.causal ? ", from the realised capacity" : "");
  }
  for (std::size_t i = 0; i < e.realised_capacity.size(); ++i) {
    std::cout << fmt::format(
        "  layer {:<3}   realised capacity {:.4f} (C = {:.4f}), recall {:.3f}, precision {:.3f}\n",
        e.layers[i], e.realised_capacity[i], config.routing.capacity, e.recall[i], e.precision[i]);
  }
  for (std::size_t i = 0; i < e.expert_capacity.size(); ++i) {
    std::cout << fmt::format("  layer {:<3}   its experts took {:.3f} of its tokens", e.expert_layers[i],
                             fmt::join(e.expert_capacity[i], ", "));
    if (i < e.expert_recall.size()) {
      std::cout << fmt::format("; recall {:.3f}, precision {:.3f}", e.expert_recall[i],
                               e.expert_precision[i]);
    }
    std::cout << "\n";
  }
}

void print_json(const EvalResult& e, const std::string& checkpoint) {
  nlohmann::json json = {{"checkpoint", checkpoint},
                         {"loss", e.judged()},
                         {"perplexity", std::exp(e.judged())},
                         {"bits_per_byte", e.bytes > 0 ? nlohmann::json(e.bits_per_byte()) : nullptr},
                         {"tokens", e.tokens},
                         {"bytes", e.bytes}};
  if (e.sees_future) {
    json["val_topk"] = e.loss;
    json["val_causal"] = e.causal ? nlohmann::json(*e.causal) : nullptr;
    json["routed_layers"] = e.layers;
    json["realised_capacity"] = e.realised_capacity;
    json["router_recall"] = e.recall;
    json["router_precision"] = e.precision;
  }
  if (!e.expert_capacity.empty()) {
    json["expert_layers"] = e.expert_layers;
    json["expert_capacity"] = e.expert_capacity;
  }
  if (!e.expert_recall.empty()) {
    json["expert_recall"] = e.expert_recall;
    json["expert_precision"] = e.expert_precision;
  }
  if (e.causal_flops_per_token > 0) json["causal_flops_per_token"] = e.causal_flops_per_token;
  std::cout << json.dump() << "\n";
}

void dump_logits(Context& c, const Transformer& model, const Config& config, const EvalFlags& flags,
                 const Globals& globals) {
  const Causal rule = config.routing.kind == RoutingKind::None ? Causal{} : causal_rule(config.routing);
  const std::vector<float> logits = causal_logits(c, model, flags.prompt_ids, rule);
  H5Writer file(flags.dump_logits, kLogitsKind);
  const auto rows = static_cast<std::int64_t>(flags.prompt_ids.size());
  file.write<float>("logits", logits, {rows, static_cast<std::int64_t>(logits.size()) / rows});
  file.write<std::int32_t>("prompt_ids", flags.prompt_ids);
  file.commit();
  const std::int64_t vocab = static_cast<std::int64_t>(logits.size()) / rows;
  if (globals.json && flags.data.empty()) {
    std::cout << nlohmann::json{{"dump_logits", flags.dump_logits},
                                {"positions", rows},
                                {"vocab_size", vocab}}
                     .dump()
              << "\n";
  } else {
    std::cerr << fmt::format("wrote the logits of {} positions to {}\n", rows, flags.dump_logits);
  }
}

TokenStore open_store(const EvalFlags& flags, const Config& config) {
  if (!flags.data.empty()) return TokenStore::open(flags.data);
  const std::string& path = config.data.valid;
  if (path.empty()) {
    throw UsageError("Nothing to evaluate: the model's config names no validation text (data.valid).",
                     "Give --data STORE, or --dump-logits FILE with --prompt-ids.");
  }
  try {
    return TokenStore::open(path);
  } catch (const UserError& e) {
    throw UserError(fmt::format("{} (data.valid of its training) cannot be evaluated: {}", path, e.what()),
                    "Give --data STORE.");
  }
}

void evaluate_by_engine(const TrainedModel& model, const Config& config,
                        const std::shared_ptr<const TokenStore>& store, std::int64_t seq_len,
                        const EvalFlags& flags, const Globals& globals) {
  if (config.data.document_mask) {
    throw UsageError(
        "--engine goes over whole sequences, and this model was trained with data.document_mask.",
        "Evaluate it without --engine.");
  }
  EngineOptions options = flags.engine.options(*model.context, *model.loaded.model, 1U << 20);
  if (config.routing.kind != RoutingKind::None) options.rule = causal_rule(config.routing);
  const EngineLoss e = engine_loss(*model.context, *model.loaded.model, options,
                                   DataLoader(store, seq_len, false), flags.tokens);
  const double bytes = static_cast<double>(store->text_bytes()) * static_cast<double>(e.tokens) /
                       static_cast<double>(store->num_tokens());
  const double bits = bytes > 0 ? e.loss / std::log(2.0) * static_cast<double>(e.tokens) / bytes : 0;
  if (globals.json) {
    nlohmann::json json = {{"checkpoint", model.loaded.checkpoint.string()},
                           {"engine", true},
                           {"loss", e.loss},
                           {"perplexity", std::exp(e.loss)},
                           {"bits_per_byte", bytes > 0 ? nlohmann::json(bits) : nullptr},
                           {"tokens", e.tokens},
                           {"bytes", bytes},
                           {"cache_bytes", e.stats.most_bytes}};
    if (!e.routed_fraction.empty()) {
      json["val_causal"] = e.loss;
      json["routed_layers"] = model.loaded.model->routed_layers();
      json["realised_capacity"] = e.routed_fraction;
    }
    std::cout << json.dump() << "\n";
    return;
  }
  std::cout << fmt::format(
      "{}: {} tokens, by the inference engine\n  loss        {:.4f} nats/token\n  perplexity  {:.2f}\n",
      model.loaded.checkpoint.string(), e.tokens, e.loss, std::exp(e.loss));
  if (bytes > 0) std::cout << fmt::format("  bits/byte   {:.4f}\n", bits);
  const std::vector<std::int64_t> layers = model.loaded.model->routed_layers();
  for (std::size_t i = 0; i < layers.size(); ++i)
    std::cout << fmt::format("  layer {:<3}   realised capacity {:.4f} (C = {:.4f})\n", layers[i],
                             e.routed_fraction[i], config.routing.capacity);
}

void run(const EvalFlags& flags, Globals& globals) {
  if (flags.dump_logits.empty() != flags.prompt_ids.empty()) {
    throw UsageError(
        fmt::format("{} was given without {}.", flags.dump_logits.empty() ? "--prompt-ids" : "--dump-logits",
                    flags.dump_logits.empty() ? "--dump-logits" : "--prompt-ids"),
        "Logits are written for given ids: --dump-logits FILE --prompt-ids 1,2,3.");
  }
  if (!flags.dump_logits.empty()) {
    require_no_input("--dump-logits", flags.dump_logits,
                     std::vector{flags.model, find_checkpoint(flags.model).string(), flags.data});
  }
  const TrainedModel model =
      open_model(flags.model, {.invariant = flags.invariant}, globals, flags.precision);
  Context& context = *model.context;
  const LoadedModel& loaded = model.loaded;
  if (flags.engine.kv > 0) loaded.model->set_kv_bits(flags.engine.kv);
  const Config config = with_flags(loaded.config, flags);
  if (!flags.dump_logits.empty()) dump_logits(context, *loaded.model, config, flags, globals);
  if (flags.data.empty() && !flags.dump_logits.empty()) return;

  const auto store = std::make_shared<const TokenStore>(open_store(flags, config));
  require_same_tokens(*store, loaded);
  std::int64_t seq_len = flags.seq_len > 0 ? flags.seq_len : config.train.seq_len;
  const bool was_trained_here = !loaded.meta.store_hash.empty();
  if (flags.seq_len == 0 && !was_trained_here) seq_len = std::min(seq_len, kForeignSeqLen);
  if (seq_len > config.model.max_seq_len) {
    throw UsageError(fmt::format("--seq-len {} is longer than the model's max_seq_len {}.", seq_len,
                                 config.model.max_seq_len));
  }
  if (flags.by_engine) {
    evaluate_by_engine(model, config, store, seq_len, flags, globals);
    return;
  }
  const DataLoader data(store, seq_len, config.data.document_mask);
  const auto result = evaluate(context, *loaded.model, config, data,
                               {.tokens = flags.tokens, .batch = flags.batch, .stop = {}});
  if (globals.json) {
    print_json(*result, loaded.checkpoint.string());
  } else {
    print_text(*result, config, loaded.checkpoint.string());
  }
}

}  // namespace

void add_eval(CLI::App& app, Globals& globals) {
  auto flags = std::make_shared<EvalFlags>();
  CLI::App* sub =
      app.add_subcommand("eval", "Loss, perplexity and bits per byte; routed models: top-k and causal");
  sub->add_option("model", flags->model, "Run folder, checkpoint file or exported model")->required();
  sub->add_option("--data", flags->data, "Token store; default: the data.valid of its training");
  sub->add_option("--tokens", flags->tokens, "Evaluate this many tokens; 0: all")
      ->capture_default_str()
      ->check(number_from_to(0, 1e15));
  sub->add_option("--batch", flags->batch, "Sequences at a time")
      ->capture_default_str()
      ->check(number_from_to(1, 1e9));
  sub->add_option(
         "--seq-len", flags->seq_len,
         "Tokens of a sequence; 0: as in training, or at most 4096 of a model that was not trained here")
      ->capture_default_str()
      ->check(number_from_to(0, 1e15));
  sub->add_option(
         "--threshold", flags->threshold,
         "Causal routing threshold on sigma(logit): lower computes more tokens (default: the config's)")
      ->check(number_from_to(0.001, 0.999));
  sub->add_flag(
      "--invariant", flags->invariant,
      "Row-invariant kernels, as with invariant: true in the model's config: a token's result depends "
      "on nothing after it, to the bit");
  add_precision_flag(*sub, flags->precision,
                     "fp32 | bf16 (on the CPU the weights alone) | auto: bf16 on a GPU, fp32 on the CPU");
  sub->add_option("--dump-logits", flags->dump_logits,
                  "Write the causal fp32 logits of --prompt-ids to this HDF5 file");
  sub->add_option("--prompt-ids", flags->prompt_ids, "Token ids, comma-separated")->delimiter(',');
  sub->add_flag("--engine", flags->by_engine, "Through the inference engine, token by token as it serves");
  add_engine_flags(*sub, flags->engine);
  add_global_flags(*sub, globals);
  sub->footer(
      "Examples:\n"
      "  fathom eval runs/mod\n"
      "  fathom eval runs/mod --data books.valid.h5 --threshold 0.3 --json\n"
      "  fathom eval runs/mod --dump-logits logits.h5 --prompt-ids 72,101,108");
  sub->callback([flags, &globals] { run(*flags, globals); });
}

}  // namespace fathom::app
