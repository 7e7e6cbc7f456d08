#include "serve/answer_format.h"

#include <cmath>
#include <numeric>

#include <nlohmann/json.hpp>

namespace fathom::serve {

namespace {

using nlohmann::json;

std::string dump(const json& value) { return value.dump(-1, ' ', false, json::error_handler_t::replace); }

json number_or_null(double x) { return std::isfinite(x) ? json(x) : json(); }

class CompletionFormat final : public AnswerFormat {
 public:
  CompletionFormat(int logprobs, const TokenTexts& texts)
      : AnswerFormat(logprobs >= 0, texts), top_(logprobs > 0) {}

  const char* name(bool /*is_chunk*/) const override { return "text_completion"; }

  json choice(const ChoicePart& part, bool /*is_chunk*/) const override {
    const json finish = part.finish == Finish::None ? json() : json(name_of(part.finish));
    return {{"index", part.index},
            {"text", part.text},
            {"logprobs", logprobs_ ? logprobs_of(part.tokens) : json()},
            {"finish_reason", finish}};
  }

 private:
  json logprobs_of(const std::vector<ShownToken>& tokens) const {
    json names = json::array(), values = json::array(), tops = json::array(), offsets = json::array();
    for (const ShownToken& t : tokens) {
      const std::string own = texts_.shown(t.token.id);
      names.push_back(own);
      values.push_back(number_or_null(t.token.logprob));
      offsets.push_back(t.position);
      json top = json::object();
      for (const SampledToken& a : t.alternatives) {
        // Of several tokens that read the same, the likeliest.
        const std::string text = texts_.shown(a.id);
        if (!top.contains(text)) top[text] = number_or_null(a.logprob);
      }
      // The token itself, if it is not among the likeliest.
      if (!t.alternatives.empty() && !top.contains(own)) top[own] = number_or_null(t.token.logprob);
      tops.push_back(t.alternatives.empty() ? json() : top);
    }
    return {{"tokens", names},
            {"token_logprobs", values},
            {"top_logprobs", top_ ? tops : json()},
            {"text_offset", offsets}};
  }

  bool top_;
};

json with_head(const AnswerHead& head, const char* object, json choices) {
  return {{"id", head.id},
          {"object", object},
          {"created", head.created},
          {"model", head.model},
          {"choices", std::move(choices)}};
}

}  // namespace

json usage_json(const Usage& usage) {
  json out = {{"prompt_tokens", usage.prompt_tokens},
              {"completion_tokens", usage.completion_tokens},
              {"total_tokens", usage.prompt_tokens + usage.completion_tokens},
              {"prompt_tokens_details", {{"cached_tokens", usage.cached_tokens}}}};
  if (!usage.routed_fraction.empty()) {
    const double sum = std::accumulate(usage.routed_fraction.begin(), usage.routed_fraction.end(), 0.0);
    out["routed_fraction"] = sum / static_cast<double>(usage.routed_fraction.size());
    out["routed_layers"] = usage.routed_layers;
    out["routed_fraction_by_layer"] = usage.routed_fraction;
  }
  return out;
}

json AnswerFormat::whole_choice(const ChoicePart& part, bool is_chunk) const {
  json out = choice(part, is_chunk);
  if (part.routing)
    out["routing"] = {
        {"layers", part.routing->layers}, {"first", part.routing->first}, {"kept", part.routing->kept}};
  return out;
}

std::string AnswerFormat::whole(const AnswerHead& head, const std::vector<ChoicePart>& choices,
                                const Usage& usage) const {
  json list = json::array();
  for (const ChoicePart& part : choices) list.push_back(whole_choice(part, false));
  json out = with_head(head, name(false), std::move(list));
  out["usage"] = usage_json(usage);
  return dump(out);
}

std::string AnswerFormat::chunk(const AnswerHead& head, const ChoicePart& part, bool with_usage) const {
  json out = with_head(head, name(true), json::array({whole_choice(part, true)}));
  if (with_usage) out["usage"] = nullptr;
  return dump(out);
}

std::string AnswerFormat::usage_chunk(const AnswerHead& head, const Usage& usage) const {
  json out = with_head(head, name(true), json::array());
  out["usage"] = usage_json(usage);
  return dump(out);
}

std::unique_ptr<AnswerFormat> completion_format(int logprobs, const TokenTexts& texts) {
  return std::make_unique<CompletionFormat>(logprobs, texts);
}

}  // namespace fathom::serve
