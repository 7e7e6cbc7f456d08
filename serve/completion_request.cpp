#include "serve/completion_request.h"

#include <charconv>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "serve/api_error.h"
#include "serve/json_fields.h"
#include "src/core/splitmix64.h"

namespace fathom::serve {

namespace {

using nlohmann::json;

constexpr std::size_t kMostStops = 4;

std::vector<std::string> read_stops(JsonFields& fields) {
  const json* value = fields.find("stop");
  if (value == nullptr) return {};
  std::vector<std::string> stops;
  const auto add = [&](const json& one) {
    if (!one.is_string())
      throw bad_field(
          "stop",
          fmt::format("'stop' holds {}: expected a string, or up to {} of them.", described(one), kMostStops),
          "invalid_type");
    // An empty one is in every text; OpenAI takes it and it stops nothing.
    if (!one.get_ref<const std::string&>().empty()) stops.push_back(one.get<std::string>());
  };
  if (value->is_array()) {
    if (value->size() > kMostStops)
      throw bad_field("stop",
                      fmt::format("'stop' has {} strings: expected at most {}.", value->size(), kMostStops),
                      "invalid_value");
    for (const json& one : *value) add(one);
  } else {
    add(*value);
  }
  return stops;
}

void read_logit_bias(JsonFields& fields, const RequestLimits& limits, SamplingOptions& sampling) {
  const json* value = fields.find("logit_bias");
  if (value == nullptr) return;
  if (!value->is_object())
    throw bad_field(
        "logit_bias",
        fmt::format("'logit_bias' is {}: expected an object such as {{\"50\": -100}}.", described(*value)),
        "invalid_type");
  for (const auto& [key, bias] : value->items()) {
    std::int64_t id = -1;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
    if (error != std::errc() || end != key.data() + key.size() || id < 0 || id >= limits.vocab)
      throw bad_field("logit_bias",
                      fmt::format("'logit_bias' names the token '{}': expected an id below {}.",
                                  key.substr(0, 32), limits.vocab),
                      "invalid_value");
    const double x = bias.is_number() ? bias.get<double>() : 1e9;
    if (!(x >= -100 && x <= 100))
      throw bad_field("logit_bias",
                      fmt::format("'logit_bias' of token {} is {}: expected a number from -100 to 100.", id,
                                  bias.dump().substr(0, 32)),
                      "invalid_value");
    // OpenAI's -100 is a ban and its 100 the only choice; here no logit gets past them.
    sampling.logit_bias[static_cast<std::int32_t>(id)] = x <= -100 ? -1e9 : x >= 100 ? 1e9 : x;
  }
}

[[noreturn]] void bad_prompt(const std::string& what) {
  throw bad_field("prompt",
                  fmt::format("'prompt' {}: expected a string, an array of strings, an array of token ids, "
                              "or an array of those.",
                              what),
                  "invalid_type");
}

std::vector<std::int32_t> read_ids(const json& array, const RequestLimits& limits) {
  if (array.empty()) throw bad_field("prompt", "'prompt' holds an empty list of token ids.", "invalid_value");
  std::vector<std::int32_t> ids;
  ids.reserve(array.size());
  for (const json& id : array) {
    if (!id.is_number_integer()) bad_prompt("mixes token ids with something else");
    const bool huge = id.is_number_unsigned() && id.get<std::uint64_t>() > INT32_MAX;
    if (huge || id.get<std::int64_t>() < 0 || id.get<std::int64_t>() >= limits.vocab)
      throw bad_field(
          "prompt",
          fmt::format("'prompt' holds the token {}, outside the vocabulary of {}.", id.dump(), limits.vocab),
          "invalid_value");
    ids.push_back(id.get<std::int32_t>());
  }
  return ids;
}

std::vector<PromptInput> read_prompts(JsonFields& fields, const RequestLimits& limits) {
  const json* value = fields.find("prompt");
  // OpenAI: without a prompt a new document begins.
  if (value == nullptr) return {PromptInput{}};
  if (value->is_string()) return {PromptInput{.text = value->get<std::string>()}};
  if (!value->is_array()) bad_prompt(fmt::format("is {}", described(*value)));
  if (value->empty()) bad_prompt("is an empty array");
  if (value->front().is_number()) return {PromptInput{.ids = read_ids(*value, limits), .is_ids = true}};
  check_texts(static_cast<std::int64_t>(value->size()), 1, limits);
  std::vector<PromptInput> prompts;
  for (const json& one : *value) {
    if (one.type() != value->front().type()) bad_prompt("mixes strings with something else");
    if (one.is_string()) {
      prompts.push_back({.text = one.get<std::string>()});
    } else if (one.is_array()) {
      prompts.push_back({.ids = read_ids(one, limits), .is_ids = true});
    } else {
      bad_prompt(fmt::format("holds {}", described(one)));
    }
  }
  return prompts;
}

// The dial for depth, what came of it, and what is shared.
void read_routing(JsonFields& fields, const RequestLimits& limits, AnswerOptions& o) {
  if (limits.max_threshold > 0) {
    o.threshold = fields.number("routing_threshold", limits.min_threshold, limits.max_threshold);
  } else {
    fields.refuse("routing_threshold", "this model computes all of every token.");
  }
  o.routing = fields.flag("return_routing", false);
  o.prefix_cache = fields.flag("cache_prompt", true);
}

void read_sampling(JsonFields& fields, const RequestLimits& limits, AnswerOptions& o) {
  SamplingOptions& s = o.sampling;
  s.temperature = fields.number("temperature", 0, 100).value_or(1);
  s.top_p = fields.number("top_p", 0, 1).value_or(1);
  s.presence_penalty = fields.number("presence_penalty", -2, 2).value_or(0);
  s.frequency_penalty = fields.number("frequency_penalty", -2, 2).value_or(0);
  read_logit_bias(fields, limits, s);
  if (const auto seed = fields.integer("seed", INT64_MIN, INT64_MAX))
    o.seed = static_cast<std::uint64_t>(*seed);
  // Ours, as other servers of open models have them. -1 is their "all".
  s.top_k = std::max<std::int64_t>(0, fields.integer("top_k", -1, 1'000'000'000).value_or(0));
  s.min_p = fields.number("min_p", 0, 1).value_or(0);
  s.repetition_penalty = fields.number("repetition_penalty", 0.01, 100).value_or(1);
  o.ignore_eos = fields.flag("ignore_eos", false);
}

}  // namespace

void check_texts(std::int64_t prompts, std::int64_t n, const RequestLimits& limits) {
  if (prompts * n <= limits.texts) return;
  throw bad_field(n > 1 ? "n" : "prompt",
                  fmt::format("The request asks for {} texts ({} prompts, n {}): at most {} at once here.",
                              prompts * n, prompts, n, limits.texts),
                  "invalid_value");
}

AnswerOptions read_answer_options(JsonFields& fields, const RequestLimits& limits) {
  AnswerOptions o;
  o.model = fields.text("model").value_or("");
  o.n = fields.integer("n", 1, limits.texts).value_or(1);
  o.stops = read_stops(fields);
  o.stream = fields.flag("stream", false);
  if (const json* options = fields.find("stream_options")) {
    if (!o.stream)
      throw bad_field("stream_options", "'stream_options' is only allowed with 'stream'.", "invalid_value");
    JsonFields of_stream(*options, "stream_options");
    o.include_usage = of_stream.flag("include_usage", false);
    of_stream.ignore("include_obfuscation");
    of_stream.refuse_others();
  }
  read_sampling(fields, limits, o);
  read_routing(fields, limits, o);
  fields.ignore("user");
  return o;
}

CompletionRequest parse_completion(std::string_view body, const RequestLimits& limits) {
  JsonFields fields(body);
  CompletionRequest r;
  r.options = read_answer_options(fields, limits);
  r.options.max_tokens = fields.integer("max_tokens", 0, INT32_MAX);
  r.options.logprobs = static_cast<int>(fields.integer("logprobs", 0, limits.logprobs).value_or(-1));
  r.prompts = read_prompts(fields, limits);
  r.echo = fields.flag("echo", false);
  r.add_special_tokens = fields.flag("add_special_tokens", true);
  if (const auto best_of = fields.integer("best_of", 0, INT32_MAX);
      best_of.value_or(r.options.n) != r.options.n)
    throw bad_field("best_of", "'best_of' is not supported here, other than as the same number as 'n'.",
                    "unsupported_parameter");
  fields.refuse("suffix", "no model here fills in the middle.");
  fields.refuse_others();
  check_texts(static_cast<std::int64_t>(r.prompts.size()), r.options.n, limits);
  return r;
}

std::uint64_t seed_of(std::uint64_t seed, std::int64_t choice) {
  return choice == 0 ? seed : mix64(seed + static_cast<std::uint64_t>(choice) * kGoldenGamma);
}

}  // namespace fathom::serve
