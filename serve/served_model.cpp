#include "serve/served_model.h"

#include <random>

#include <fmt/format.h>

#include "src/io/utf8.h"

namespace fathom::serve {

namespace {

std::vector<std::int32_t> encode(const std::string& text, bool special, const Tokenizer& tokenizer) {
  std::vector<std::int32_t> ids = tokenizer.encode(text);
  if (special && tokenizer.starts_with_bos()) ids.insert(ids.begin(), tokenizer.bos());
  if (!ids.empty()) return ids;
  // A text begins behind the end of the one before, as in training.
  const std::int32_t start = tokenizer.bos() >= 0 ? tokenizer.bos() : tokenizer.end_of_document();
  if (start < 0)
    throw bad_field("prompt", "'prompt' is empty, and this model has no token that begins a text.",
                    "invalid_value");
  return {start};
}

std::uint64_t random_seed() {
  thread_local std::random_device device;
  return (static_cast<std::uint64_t>(device()) << 32) | device();
}

}  // namespace

void check_model(const std::string& wanted, const ServedModel& model) {
  if (wanted.empty() || wanted == model.name) return;
  throw ApiError(
      fmt::format("The model '{}' does not exist. This server has '{}'.", wanted.substr(0, 100), model.name),
      {.status = 404, .param = "model", .code = "model_not_found"});
}

void check_length(const std::string& field, const std::string& text, const ServedModel& model) {
  const std::size_t most = static_cast<std::size_t>(model.limits.context + 1) * model.token_texts.longest();
  if (text.size() <= most) return;
  throw bad_field(
      field,
      fmt::format("This model's context is {} tokens, and the text has more: its {} bytes are more "
                  "than {} tokens can hold.",
                  model.limits.context, text.size(), model.limits.context),
      "context_length_exceeded");
}

std::vector<PreparedPrompt> prepare_prompts(const CompletionRequest& request, const ServedModel& model,
                                            std::int64_t max_tokens) {
  std::vector<PreparedPrompt> prompts;
  for (const PromptInput& input : request.prompts) {
    PreparedPrompt p;
    if (input.is_ids) {
      p.ids = input.ids;
      if (request.echo) p.text = replace_invalid_utf8(model.tokenizer->decode(p.ids));
    } else {
      check_length("prompt", input.text, model);
      p.text = input.text;
      p.ids = encode(input.text, request.add_special_tokens, *model.tokenizer);
    }
    const auto length = static_cast<std::int64_t>(p.ids.size());
    // Nothing follows from the last token of a prompt that is only scored, so it needs no place.
    const std::int64_t scored_only = request.options.max_tokens == 0 ? 1 : 0;
    if (length + max_tokens > model.limits.context + scored_only) {
      throw bad_field(
          "prompt",
          fmt::format("This model's context is {} tokens, and the request needs {}: {} of the prompt and {} "
                      "new ones. Shorten the prompt or lower max_tokens.",
                      model.limits.context, length + max_tokens, length, max_tokens),
          "context_length_exceeded");
    }
    prompts.push_back(std::move(p));
  }
  return prompts;
}

std::vector<TextRequest> texts_of(const std::vector<PreparedPrompt>& prompts, const AnswerOptions& options,
                                  std::int64_t max_tokens, bool echo, const ServedModel& model) {
  const std::uint64_t seed = options.seed ? *options.seed : random_seed();
  std::vector<TextRequest> texts;
  for (const PreparedPrompt& prompt : prompts) {
    for (std::int64_t j = 0; j < options.n; ++j) {
      TextRequest t;
      t.stops = options.stops;
      Request& r = t.request;
      r.prompt = prompt.ids;
      r.max_tokens = max_tokens;
      if (!options.ignore_eos) r.stop_tokens = model.stop_tokens;
      r.sampling = options.sampling;
      r.sampling.seed = seed_of(seed, j);
      r.repeatable = options.seed.has_value();
      r.logprobs = options.logprobs >= 0;
      r.top_logprobs = std::max(0, options.logprobs);
      r.prompt_logprobs = echo && r.logprobs;
      r.threshold = options.threshold;
      r.prefix_cache = options.prefix_cache;
      r.routing = options.routing;
      texts.push_back(std::move(t));
    }
  }
  return texts;
}

}  // namespace fathom::serve
