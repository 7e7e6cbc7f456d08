// fathom generate RUN -p TEXT
#include "infer/generate.h"

#include <fstream>
#include <iostream>
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>

#include "app/command.h"
#include "app/trained_model.h"
#include "kernels/error.h"
#include "src/model/model_tokenizer.h"

namespace fathom::app {

namespace {

struct GenerateFlags {
  std::string model;
  std::string prompt;
  std::string prompts_file;
  std::vector<std::int32_t> prompt_ids;
  std::string tokenizer;
  std::int64_t tokens = 64;
  SamplingOptions sampling;
  double threshold = -1;
  bool invariant = false;
  bool logprobs = false;
};

struct Prompt {
  std::string text;
  std::vector<std::int32_t> ids;  // when given as ids
};

std::vector<Prompt> prompts_of(const GenerateFlags& flags) {
  const int given = (flags.prompt.empty() ? 0 : 1) + (flags.prompt_ids.empty() ? 0 : 1) +
                    (flags.prompts_file.empty() ? 0 : 1);
  if (given != 1) {
    throw UsageError(fmt::format(
        "{} prompts were given: expected exactly one of -p TEXT, --prompt-ids and --prompts FILE.", given));
  }
  if (!flags.prompt.empty()) return {{flags.prompt, {}}};
  if (!flags.prompt_ids.empty()) return {{"", flags.prompt_ids}};
  std::ifstream file(flags.prompts_file);
  if (!file) throw UserError(fmt::format("{} cannot be read.", flags.prompts_file));
  std::vector<Prompt> prompts;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    if (line.empty()) continue;
    const nlohmann::json json = nlohmann::json::parse(line, nullptr, false);
    const char* key = json.contains("prompt") ? "prompt" : "text";
    if (!json.contains(key) || !json[key].is_string()) {
      throw UserError(fmt::format("{}:{}: expected a JSON object with a string under \"prompt\".",
                                  flags.prompts_file, number));
    }
    prompts.push_back({json[key].get<std::string>(), {}});
  }
  if (prompts.empty()) throw UserError(fmt::format("{} holds no prompt.", flags.prompts_file));
  return prompts;
}

// Ids can do without a tokenizer, but only it knows which ids are tokens and which one ends a document.
std::unique_ptr<Tokenizer> open_tokenizer(const LoadedModel& model, const GenerateFlags& flags) {
  if (flags.prompt_ids.empty() || !flags.tokenizer.empty()) return tokenizer_of(model, flags.tokenizer);
  try {
    return tokenizer_of(model);
  } catch (const UserError& e) {
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

void print_json(const Generated& g, const GenerateFlags& flags, const std::vector<std::int32_t>& prompt,
                const std::string& prompt_text, const Tokenizer* tokenizer,
                const std::vector<std::int64_t>& layers) {
  nlohmann::json json = {{"tokens", g.ids},
                         {"finish_reason", g.finish_reason},
                         {"prompt_tokens", prompt.size()},
                         {"prefill_tokens_per_s", static_cast<double>(prompt.size()) / g.prefill_seconds}};
  const auto decoded = static_cast<double>(g.ids.size()) - 1;
  json["decode_tokens_per_s"] = decoded > 0 ? nlohmann::json(decoded / g.decode_seconds) : nullptr;
  // Bytes may end within a character: what is not UTF-8 becomes U+FFFD, as JSON wants.
  json["text"] = tokenizer ? nlohmann::json(tokenizer->decode(g.ids)) : nullptr;
  if (!prompt_text.empty()) json["prompt"] = prompt_text;
  if (flags.logprobs) json["logprobs"] = g.logprobs;
  if (!layers.empty()) {
    json["routed_layers"] = layers;
    json["routed_fraction"] = g.routed_fraction;
  }
  if (!g.expert_fraction.empty()) json["expert_fraction"] = g.expert_fraction;
  std::cout << json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
}

void run(const GenerateFlags& flags, Globals& globals) {
  const std::vector<Prompt> prompts = prompts_of(flags);
  const TrainedModel model = open_model(flags.model, flags.invariant, globals);
  Context& context = *model.context;
  const LoadedModel& loaded = model.loaded;
  RoutingConfig routing = loaded.config.routing;
  if (flags.threshold >= 0) routing.causal.threshold = flags.threshold;

  const std::unique_ptr<Tokenizer> tokenizer = open_tokenizer(loaded, flags);
  GenerateOptions options;
  options.tokens = flags.tokens;
  options.sampling = flags.sampling;
  options.stop_tokens = loaded.ends.stops;
  if (tokenizer) {
    if (tokenizer->end_of_document() >= 0) options.stop_tokens.push_back(tokenizer->end_of_document());
    options.vocab = tokenizer->vocab_size();
  }
  const std::vector<std::int64_t> layers = loaded.model->routed_layers();
  if (routing.kind != RoutingKind::None) options.rule = causal_rule(routing);

  for (const Prompt& prompt : prompts) {
    const std::vector<std::int32_t> ids = prompt.ids.empty() ? start_of(prompt.text, *tokenizer) : prompt.ids;
    if (!globals.json) std::cout << prompt.text << std::flush;
    std::vector<std::int32_t> so_far;
    std::string shown;
    const auto show = [&](std::int32_t id) {
      if (globals.json || !tokenizer) return true;
      so_far.push_back(id);
      const std::string text = tokenizer->decode(so_far);
      if (text.size() > shown.size()) std::cout << text.substr(shown.size()) << std::flush;
      shown = text;
      return true;
    };
    const Generated g = generate(context, *loaded.model, ids, options, show);
    if (globals.json) {
      print_json(g, flags, ids, prompt.text, tokenizer.get(), layers);
    } else if (!tokenizer) {
      std::cout << fmt::format("{}\n", fmt::join(g.ids, ","));
    } else {
      std::cout << "\n";
    }
  }
}

}  // namespace

void add_generate(CLI::App& app, Globals& globals) {
  auto flags = std::make_shared<GenerateFlags>();
  CLI::App* sub = app.add_subcommand("generate", "Go on with a text, each token routed by itself alone");
  sub->add_option("model", flags->model, "Run folder, checkpoint file or exported model")->required();
  sub->add_option("-p,--prompt", flags->prompt, "Text to go on from");
  sub->add_option("--prompt-ids", flags->prompt_ids, "Token ids to go on from, comma-separated")
      ->delimiter(',');
  sub->add_option("--prompts", flags->prompts_file, "JSONL file, one {\"prompt\": TEXT} a line");
  sub->add_option("--tokenizer", flags->tokenizer,
                  "Tokenizer, if neither in the run folder nor where the config says");
  sub->add_option("-n,--tokens", flags->tokens, "New tokens at most")
      ->capture_default_str()
      ->check(number_from_to(1, 1e9));
  sub->add_option("--temperature", flags->sampling.temperature, "0: always the most likely token")
      ->capture_default_str()
      ->check(number_from_to(0.0, 100.0));
  sub->add_option("--top-p", flags->sampling.top_p,
                  "Sample from the smallest set of tokens with this probability")
      ->capture_default_str()
      ->check(number_from_to(0.0, 1.0));
  sub->add_option("--seed", flags->sampling.seed, "Of the sampling")->capture_default_str();
  sub->add_option("--threshold", flags->threshold, "Causal routing threshold (default: the config's)")
      ->check(number_from_to(0.001, 0.999));
  sub->add_flag("--invariant", flags->invariant,
                "Row-invariant kernels, as with invariant: true in the model's config");
  sub->add_flag("--logprobs", flags->logprobs, "With --json: log-probability of each new token");
  add_global_flags(*sub, globals);
  sub->footer(
      "Examples:\n"
      "  fathom generate runs/mod -p \"The sea\" -n 100\n"
      "  fathom generate runs/mod -p \"The sea\" --temperature 0 --json");
  sub->callback([flags, &globals] { run(*flags, globals); });
}

}  // namespace fathom::app
