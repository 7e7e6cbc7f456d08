// The JSON of /v1/chat/completions.
#include <cmath>

#include <nlohmann/json.hpp>

#include "serve/answer_format.h"

namespace fathom::serve {

namespace {

using nlohmann::json;

class ChatFormat final : public AnswerFormat {
 public:
  using AnswerFormat::AnswerFormat;

  const char* name(bool is_chunk) const override {
    return is_chunk ? "chat.completion.chunk" : "chat.completion";
  }

  json choice(const ChoicePart& part, bool is_chunk) const override {
    const json finish = part.finish == Finish::None ? json() : json(name_of(part.finish));
    json out = {{"index", part.index},
                {"logprobs", logprobs_ ? logprobs_of(part.tokens) : json()},
                {"finish_reason", finish}};
    if (!is_chunk) {
      out["message"] = {{"role", "assistant"}, {"content", part.text}, {"refusal", nullptr}};
      return out;
    }
    json delta = json::object();
    if (part.is_first) delta["role"] = "assistant";
    if (part.is_first || !part.text.empty()) delta["content"] = part.text;
    out["delta"] = std::move(delta);
    return out;
  }

 private:
  json token(const SampledToken& t) const {
    const std::string bytes = texts_.bytes(t.id);
    json numbers = json::array();
    for (const char c : bytes) numbers.push_back(static_cast<unsigned char>(c));
    // A token that cannot come has a log-probability of minus infinity, which JSON has not; OpenAI's is this.
    return {{"token", texts_.shown(t.id)},
            {"logprob", std::isfinite(t.logprob) ? t.logprob : -9999.0},
            {"bytes", std::move(numbers)}};
  }

  json logprobs_of(const std::vector<ShownToken>& tokens) const {
    json content = json::array();
    for (const ShownToken& t : tokens) {
      if (t.ends_document) continue;  // a message's tokens are those of its content
      json one = token(t.token);
      json& top = one["top_logprobs"] = json::array();
      for (const SampledToken& a : t.alternatives) top.push_back(token(a));
      content.push_back(std::move(one));
    }
    return {{"content", std::move(content)}, {"refusal", nullptr}};
  }
};

}  // namespace

std::unique_ptr<AnswerFormat> chat_format(bool logprobs, const TokenTexts& texts) {
  return std::make_unique<ChatFormat>(logprobs, texts);
}

}  // namespace fathom::serve
