// fathom generate RUN -p TEXT
#include <iostream>
#include <limits>
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>

#include "app/command.h"
#include "app/engine_flags.h"
#include "app/prompts.h"
#include "app/speculation.h"
#include "app/trained_model.h"
#include "infer/text_stream.h"
#include "kernels/error.h"
#include "src/core/stopwatch.h"
#include "src/core/units.h"
#include "src/model/model_tokenizer.h"

namespace fathom::app {

namespace {

struct GenerateFlags {
  std::string model;
  std::string prompt;
  bool prompt_given = false;  // an empty one too
  std::string prompts_file;
  std::vector<std::int32_t> prompt_ids;
  std::string tokenizer;
  std::int64_t tokens = 64;
  SamplingOptions sampling;
  std::vector<std::string> biases;
  std::vector<std::string> stops;
  double threshold = -1;
  bool invariant = false;
  std::string precision = "auto";
  bool logprobs = false;
  std::int64_t top_logprobs = 0;
  EngineFlags engine;
  SpeculationFlags speculation;
};

std::vector<Prompt> prompts_of(const GenerateFlags& flags) {
  const int given = (flags.prompt_given ? 1 : 0) + (flags.prompt_ids.empty() ? 0 : 1) +
                    (flags.prompts_file.empty() ? 0 : 1);
  if (given != 1) {
    throw UsageError(fmt::format(
        "{} prompts were given: expected exactly one of -p TEXT, --prompt-ids and --prompts FILE.", given));
  }
  if (flags.prompt_given) return {{.text = flags.prompt}};
  if (!flags.prompt_ids.empty()) return {{.text = "", .ids = flags.prompt_ids}};
  return read_prompts(flags.prompts_file);
}

// Ids can do without a tokenizer, but only it knows which ids are tokens and which one ends a document.
std::unique_ptr<Tokenizer> open_tokenizer(const LoadedModel& model, const GenerateFlags& flags) {
  if (flags.prompt_ids.empty() || !flags.tokenizer.empty()) return tokenizer_of(model, flags.tokenizer);
  try {
    return tokenizer_of(model);
  } catch (const UserError& e) {
    if (!flags.stops.empty()) {
      throw UsageError(fmt::format("--stop is text, and there is no tokenizer to read it with: {}", e.what()),
                       "Give --tokenizer.");
    }
    spdlog::warn(
        "Warning: what follows are ids of the model's vocabulary, and goes on past the end of a document: {}",
        e.what());
    return nullptr;
  }
}

std::vector<std::int32_t> start_of(const std::string& text, const Tokenizer& tokenizer) {
  std::vector<std::int32_t> ids = tokenizer.encode(text);
  if (tokenizer.starts_with_bos()) ids.insert(ids.begin(), tokenizer.bos());
  return ids;
}

void read_biases(const std::vector<std::string>& given, SamplingOptions& sampling) {
  for (const std::string& text : given) {
    const std::size_t colon = text.find(':');
    char* end = nullptr;
    const long long id = std::strtoll(text.c_str(), &end, 10);
    const bool id_read = colon != std::string::npos && colon > 0 && end == text.c_str() + colon && id >= 0 &&
                         id <= std::numeric_limits<std::int32_t>::max();
    const double bias = id_read ? std::strtod(text.c_str() + colon + 1, &end) : 0;
    if (!id_read || colon + 1 == text.size() || *end != '\0' || !(bias >= -1e9 && bias <= 1e9))
      throw UsageError(fmt::format("--logit-bias '{}' is not ID:NUMBER, such as 72:-5.", text));
    sampling.logit_bias[static_cast<std::int32_t>(id)] = bias;
  }
}

// One prompt on its way through the engine.
struct Answer {
  Prompt prompt;
  std::vector<std::int32_t> prompt_ids;
  std::vector<std::int32_t> ids;
  std::vector<double> logprobs;
  std::vector<std::vector<SampledToken>> alternatives;
  std::unique_ptr<TextStream> stream;
  std::string finish;
  std::string error;
  std::vector<double> routed_fraction;
  double first_seconds = 0, last_seconds = 0;  // of its first and last token, from the beginning on

  bool ended() const { return !finish.empty(); }
};

class Generation {
 public:
  Generation(const GenerateFlags& flags, const Globals& globals, Engine& engine, const LoadedModel& loaded,
             const Tokenizer* tokenizer)
      : flags_(flags),
        globals_(globals),
        engine_(engine),
        model_(*loaded.model),
        tokenizer_(tokenizer),
        stop_tokens_(loaded.ends.stops) {
    if (tokenizer != nullptr && tokenizer->end_of_document() >= 0)
      stop_tokens_.push_back(tokenizer->end_of_document());
  }

  /// How many prompts could not be answered. One alone is refused as an error.
  std::int64_t run(std::vector<Prompt> prompts) {
    answers_.resize(prompts.size());
    for (std::size_t i = 0; i < prompts.size(); ++i) submit(std::move(prompts[i]), answers_[i]);
    while (!engine_.idle()) {
      for (const Event& event : engine_.step()) take(event);
      print_those_that_ended();
    }
    print_those_that_ended();
    if (answers_.size() > 1) summarise();
    std::int64_t failed = 0;
    for (const Answer& a : answers_) failed += a.error.empty() ? 0 : 1;
    return failed;
  }

 private:
  bool alone() const { return answers_.size() == 1; }

  void submit(Prompt prompt, Answer& a) {
    a.prompt = std::move(prompt);
    if (tokenizer_ != nullptr) a.stream = std::make_unique<TextStream>(*tokenizer_, flags_.stops);
    if (!a.prompt.error.empty()) {
      a.finish = "error";
      a.error = a.prompt.error;
      return;
    }
    try {
      a.prompt_ids = a.prompt.ids.empty() ? start_of(a.prompt.text, *tokenizer_) : a.prompt.ids;
      Request r;
      r.prompt = a.prompt_ids;
      r.max_tokens = flags_.tokens;
      r.sampling = flags_.sampling;
      r.logprobs = flags_.logprobs;
      r.top_logprobs = flags_.top_logprobs;
      r.stop_tokens = stop_tokens_;
      by_id_[engine_.submit(std::move(r))] = &a;
    } catch (const UserError& e) {
      if (alone()) throw;
      a.finish = "error";
      a.error = e.what();
      return;
    }
    if (alone() && !globals_.json) std::cout << a.prompt.text << std::flush;
  }

  void take(const Event& event) {
    Answer& a = *by_id_.at(event.request);
    if (event.has_token) {
      a.last_seconds = watch_.seconds();
      if (a.ids.empty()) a.first_seconds = a.last_seconds;
      a.ids.push_back(event.token.id);
      a.logprobs.push_back(event.token.logprob);
      a.alternatives.push_back(event.alternatives);
      if (a.stream) {
        const std::string news = a.stream->add(event.token.id);
        if (alone() && !globals_.json) std::cout << news << std::flush;
        if (a.stream->stopped()) {
          a.finish = name_of(Finish::Stop);
          // The token that completes the stop text may have been the last one anyhow.
          a.routed_fraction = event.finish == Finish::None ? engine_.stop(event.request).routed_fraction
                                                           : event.routed_fraction;
          return;
        }
      }
    }
    if (event.finish == Finish::None) return;
    a.finish = name_of(event.finish);
    a.error = event.error;
    a.routed_fraction = event.routed_fraction;
    if (alone() && !a.error.empty()) throw UserError(a.error);
    if (alone() && !globals_.json && a.stream) std::cout << a.stream->rest();
  }

  // In the order of the prompts.
  void print_those_that_ended() {
    for (; printed_ < answers_.size() && answers_[printed_].ended(); ++printed_) {
      const Answer& a = answers_[printed_];
      if (globals_.json) {
        print_json(a);
      } else if (!tokenizer_) {
        std::cout << fmt::format("{}\n", fmt::join(a.ids, ","));
      } else if (alone()) {
        std::cout << "\n";
      } else if (!a.error.empty()) {
        spdlog::error("prompt {}: {}", printed_ + 1, a.error);
      } else {
        std::cout << a.prompt.text << a.stream->text() << "\n";
      }
      std::cout << std::flush;
    }
  }

  void print_json(const Answer& a) const {
    nlohmann::json json = {
        {"tokens", a.ids}, {"finish_reason", a.finish}, {"prompt_tokens", a.prompt_ids.size()}};
    // Of a text alone: together with others, its time is theirs too.
    const bool timed = alone() && !a.ids.empty();
    const auto decoded = static_cast<double>(a.ids.size()) - 1;
    json["prefill_tokens_per_s"] =
        timed ? nlohmann::json(static_cast<double>(a.prompt_ids.size()) / a.first_seconds) : nullptr;
    json["decode_tokens_per_s"] =
        timed && decoded > 0 ? nlohmann::json(decoded / (a.last_seconds - a.first_seconds)) : nullptr;
    // Bytes may end within a character: what is not UTF-8 becomes U+FFFD, as JSON wants.
    json["text"] = a.stream ? nlohmann::json(a.stream->text()) : nullptr;
    if (!a.prompt.text.empty()) json["prompt"] = a.prompt.text;
    if (!a.error.empty()) json["error"] = a.error;
    if (flags_.logprobs) json["logprobs"] = a.logprobs;
    if (flags_.top_logprobs > 0) {
      nlohmann::json& list = json["top_logprobs"] = nlohmann::json::array();
      for (const auto& alternatives : a.alternatives) {
        nlohmann::json of_token = nlohmann::json::array();
        for (const SampledToken& t : alternatives) of_token.push_back({{"id", t.id}, {"logprob", t.logprob}});
        list.push_back(std::move(of_token));
      }
    }
    if (const auto layers = model_.routed_layers(); !layers.empty()) {
      json["routed_layers"] = layers;
      json["routed_fraction"] = a.routed_fraction;
    }
    if (alone()) add_experts(json);
    std::cout << json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
  }

  void add_experts(nlohmann::json& json) const {
    const ExpertCounts experts = engine_.stats().experts;
    if (!experts.rows.empty()) json["expert_fraction"] = experts.shares();
  }

  void summarise() const {
    const EngineStats s = engine_.stats();
    std::int64_t tokens = 0;
    for (const Answer& a : answers_) tokens += static_cast<std::int64_t>(a.ids.size());
    const double seconds = watch_.seconds();
    std::string line = fmt::format(
        "{} prompts, {} tokens of prompts and {} new ones in {}: {:.0f} new tokens/s; at most {} of {} of "
        "cache",
        answers_.size(), s.prompt_tokens, tokens, format_duration(seconds),
        static_cast<double>(tokens) / seconds, format_bytes(static_cast<double>(s.most_bytes)),
        format_bytes(static_cast<double>(s.blocks * s.block_bytes)));
    if (s.preemptions > 0) line += fmt::format(", {} texts begun again for want of it", s.preemptions);
    if (!s.routed_rows.empty()) {
      double kept = 0;
      for (const std::int64_t rows : s.routed_rows) kept += static_cast<double>(rows);
      line += fmt::format(
          "; routed layers computed {:.1f} % of the tokens",
          100 * kept / static_cast<double>(s.rows * static_cast<std::int64_t>(s.routed_rows.size())));
    }
    spdlog::info("{}", line);
  }

  const GenerateFlags& flags_;
  const Globals& globals_;
  Engine& engine_;
  const Transformer& model_;
  const Tokenizer* tokenizer_;
  std::vector<std::int32_t> stop_tokens_;
  std::vector<Answer> answers_;
  std::map<RequestId, Answer*> by_id_;
  std::size_t printed_ = 0;
  Stopwatch watch_;
};

// One prompt, by speculative decoding.
void speculate(const GenerateFlags& flags, const Globals& globals, const TrainedModel& model,
               const Tokenizer* tokenizer, const Causal& rule, const Prompt& prompt) {
  if (!prompt.error.empty()) throw UserError(prompt.error);
  SpeculativeText text{.model = model,
                       .rule = rule,
                       .tokenizer = tokenizer,
                       .prompt = prompt.text,
                       .stops = flags.stops,
                       .request = {},
                       .engine = flags.engine,
                       .precision = flags.precision};
  text.request.prompt = prompt.ids.empty() ? start_of(prompt.text, *tokenizer) : prompt.ids;
  text.request.max_tokens = flags.tokens;
  text.request.sampling = flags.sampling;
  text.request.stop_tokens = model.loaded.ends.stops;
  if (tokenizer != nullptr && tokenizer->end_of_document() >= 0)
    text.request.stop_tokens.push_back(tokenizer->end_of_document());
  generate_by_speculation(flags.speculation, text, globals);
}

void check_speculation(const GenerateFlags& flags, std::size_t prompts) {
  if (!flags.speculation.asked()) return;
  if (prompts != 1) {
    throw UsageError(fmt::format("--speculate goes with one prompt at a time, and {} were given.", prompts),
                     "Leave --speculate out: many texts at once share the model's weights anyhow.");
  }
  if (flags.logprobs || flags.top_logprobs > 0)
    throw UsageError("--speculate chooses tokens, and gives no log-probabilities.",
                     "Leave --logprobs and --top-logprobs out, or --speculate.");
}

void run(GenerateFlags flags, Globals& globals) {
  std::vector<Prompt> prompts = prompts_of(flags);
  read_biases(flags.biases, flags.sampling);
  for (const std::string& stop : flags.stops) {
    if (stop.empty()) throw UsageError("--stop is empty, which every text begins with.");
  }
  check_speculation(flags, prompts.size());
  const TrainedModel model =
      open_model(flags.model, {.invariant = flags.invariant}, globals, flags.precision);
  const LoadedModel& loaded = model.loaded;
  if (flags.engine.kv > 0) loaded.model->set_kv_bits(flags.engine.kv);
  RoutingConfig routing = loaded.config.routing;
  if (flags.threshold >= 0) routing.causal.threshold = flags.threshold;
  const std::unique_ptr<Tokenizer> tokenizer = open_tokenizer(loaded, flags);
  if (flags.speculation.asked()) {
    speculate(flags, globals, model, tokenizer.get(),
              routing.kind != RoutingKind::None ? causal_rule(routing) : Causal{}, prompts.front());
    return;
  }
  EngineOptions options = flags.engine.options(*model.context, *loaded.model, readable(prompts));
  if (tokenizer) options.vocab = tokenizer->vocab_size();
  if (routing.kind != RoutingKind::None) options.rule = causal_rule(routing);
  Engine engine(*model.context, *loaded.model, options);
  const std::size_t count = prompts.size();
  const std::int64_t failed =
      Generation(flags, globals, engine, loaded, tokenizer.get()).run(std::move(prompts));
  if (failed > 0)
    throw UserError(fmt::format("{} of {} prompts could not be answered; the others were.", failed, count));
}

void add_sampling_flags(CLI::App& sub, GenerateFlags& flags) {
  SamplingOptions& s = flags.sampling;
  sub.add_option("--temperature", s.temperature, "0: always the most likely token")
      ->capture_default_str()
      ->check(number_from_to(0.0, 100.0));
  sub.add_option("--top-k", s.top_k, "Sample from so many of the most likely tokens; 0: all")
      ->capture_default_str()
      ->check(number_from_to(0, 1e9));
  sub.add_option("--top-p", s.top_p, "Sample from the smallest set of tokens with this probability")
      ->capture_default_str()
      ->check(number_from_to(0.0, 1.0));
  sub.add_option("--min-p", s.min_p, "Only tokens at least so likely, as a share of the most likely one's")
      ->capture_default_str()
      ->check(number_from_to(0.0, 1.0));
  sub.add_option("--repetition-penalty", s.repetition_penalty,
                 "Makes ids of the prompt and the text less likely: above 1")
      ->capture_default_str()
      ->check(number_from_to(0.01, 100.0));
  sub.add_option("--presence-penalty", s.presence_penalty, "Subtracted from the logits of ids of the text")
      ->capture_default_str()
      ->check(number_from_to(-100.0, 100.0));
  sub.add_option("--frequency-penalty", s.frequency_penalty, "The same, once for each time that they came")
      ->capture_default_str()
      ->check(number_from_to(-100.0, 100.0));
  sub.add_option("--logit-bias", flags.biases, "ID:NUMBER, added to that token's logit; may be repeated")
      ->type_name("ID:NUMBER")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false);
  sub.add_option("--stop", flags.stops, "The text ends before this one; may be repeated")
      ->type_name("TEXT")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false);
  sub.add_option("--seed", s.seed, "Of the sampling")->capture_default_str();
}

}  // namespace

void add_generate(CLI::App& app, Globals& globals) {
  auto flags = std::make_shared<GenerateFlags>();
  CLI::App* sub = app.add_subcommand("generate", "Go on with texts, each token routed by itself alone");
  sub->add_option("model", flags->model, "Run folder, checkpoint file or exported model")->required();
  sub->add_option("-p,--prompt", flags->prompt, "Text to go on from");
  sub->add_option("--prompt-ids", flags->prompt_ids, "Token ids to go on from, comma-separated")
      ->delimiter(',');
  sub->add_option("--prompts", flags->prompts_file,
                  "JSONL file, one {\"prompt\": TEXT} a line; they are computed together");
  sub->add_option("--tokenizer", flags->tokenizer,
                  "Tokenizer, if neither in the run folder nor where the config says");
  sub->add_option("-n,--tokens", flags->tokens, "New tokens at most")
      ->capture_default_str()
      ->check(number_from_to(1, 1e9));
  add_sampling_flags(*sub, *flags);
  sub->add_option("--threshold", flags->threshold, "Causal routing threshold (default: the config's)")
      ->check(number_from_to(0.001, 0.999));
  sub->add_flag("--invariant", flags->invariant,
                "Row-invariant kernels, as with invariant: true in the model's config");
  add_precision_flag(*sub, flags->precision,
                     "fp32 | bf16 (on the CPU the weights alone) | auto: bf16 on a GPU, fp32 on the CPU");
  sub->add_flag("--logprobs", flags->logprobs, "With --json: log-probability of each new token");
  sub->add_option("--top-logprobs", flags->top_logprobs,
                  "With --json: so many of the most likely tokens beside each new one")
      ->check(number_from_to(0, 1000));
  add_engine_flags(*sub, flags->engine);
  add_speculation_flags(*sub, flags->speculation);
  add_global_flags(*sub, globals);
  sub->footer(
      "Examples:\n"
      "  fathom generate runs/mod -p \"The sea\" -n 100\n"
      "  fathom generate runs/mod -p \"The sea\" --temperature 0 --json\n"
      "  fathom generate runs/mod --prompts prompts.jsonl --json > texts.jsonl\n"
      "  fathom generate runs/mod -p \"The sea\" -n 400 --speculate triforce --draft runs/small");
  sub->callback([flags, sub, &globals] {
    flags->prompt_given = sub->count("--prompt") > 0;
    check_speculation_flags(*sub, flags->speculation);
    run(*flags, globals);
  });
}

}  // namespace fathom::app
