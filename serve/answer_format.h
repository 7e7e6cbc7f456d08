// The JSON of answers: pure functions of what was written. One format a route.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "infer/engine.h"
#include "serve/answer_text.h"
#include "serve/token_texts.h"

namespace fathom::serve {

struct Usage {
  std::int64_t prompt_tokens = 0, completion_tokens = 0;
  std::int64_t cached_tokens = 0;  // of the prompts
  std::vector<std::int64_t> routed_layers = {};
  /// By routed layer, of all texts' tokens (weighted by their number); empty: dense, or nothing was computed.
  std::vector<double> routed_fraction = {};
};
nlohmann::json usage_json(const Usage& usage);

/// Which of a text's tokens the routed layers computed, from token number `first` on, the prompt's counted.
struct ShownRouting {
  std::int64_t first = 0;
  std::vector<std::int64_t> layers;
  std::vector<std::string> kept;  // of each token a character a layer: 1 where it was computed, else 0
};

/// One choice, or a piece of one.
struct ChoicePart {
  std::int64_t index = 0;
  std::string text = {};
  std::vector<ShownToken> tokens = {};
  Finish finish = Finish::None;  // None: more follows
  bool is_first = true;          // of a stream: this choice's first piece
  std::optional<ShownRouting> routing = {};
};

/// What an answer has at its top.
struct AnswerHead {
  std::string id;  // "cmpl-..."
  std::int64_t created = 0;
  std::string model;
};

class AnswerFormat {
 public:
  explicit AnswerFormat(bool logprobs, const TokenTexts& texts) : logprobs_(logprobs), texts_(texts) {}
  virtual ~AnswerFormat() = default;

  /// The object's "object".
  virtual const char* name(bool is_chunk) const = 0;
  virtual nlohmann::json choice(const ChoicePart& part, bool is_chunk) const = 0;
  /// With what is no route's own.
  nlohmann::json whole_choice(const ChoicePart& part, bool is_chunk) const;

  std::string whole(const AnswerHead& head, const std::vector<ChoicePart>& choices, const Usage& usage) const;
  /// A piece of a stream; `with_usage`: the client has asked for it, so pieces before the last have null.
  std::string chunk(const AnswerHead& head, const ChoicePart& part, bool with_usage) const;
  std::string usage_chunk(const AnswerHead& head, const Usage& usage) const;

 protected:
  bool logprobs_;
  const TokenTexts& texts_;
};

/// /v1/completions: log-probabilities as parallel lists of tokens, token_logprobs, top_logprobs, text_offset.
std::unique_ptr<AnswerFormat> completion_format(int logprobs, const TokenTexts& texts);
/// /v1/chat/completions: messages and deltas; log-probabilities as a list of tokens with their bytes.
std::unique_ptr<AnswerFormat> chat_format(bool logprobs, const TokenTexts& texts);

}  // namespace fathom::serve
