// The model behind the routes, and what they may ask of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "serve/completion_request.h"
#include "serve/job.h"
#include "serve/token_texts.h"

namespace fathom::serve {

struct ServedModel {
  std::string name;
  std::int64_t created = 0;  // seconds since 1970
  const Tokenizer* tokenizer = nullptr;
  TokenTexts token_texts;
  std::vector<std::int32_t> stop_tokens;    // that end a document
  std::vector<std::int64_t> routed_layers;  // empty: dense
  RequestLimits limits;
};

/// A prompt as the engine takes it, and as `echo` gives it back.
struct PreparedPrompt {
  std::string text;
  std::vector<std::int32_t> ids;
};

/// ApiError (404) when the client wants another model than this.
void check_model(const std::string& wanted, const ServedModel& model);

/// ApiError (400), with the name of the field: the text has more bytes than the model's context can hold.
/// That is known before it is made tokens, which takes seconds for millions of bytes.
void check_length(const std::string& field, const std::string& text, const ServedModel& model);

/// ApiError (400): too long for the model's context beside `max_tokens` new tokens.
std::vector<PreparedPrompt> prepare_prompts(const CompletionRequest& request, const ServedModel& model,
                                            std::int64_t max_tokens);

/// The engine's texts: choice j of prompt i at i * n + j. `max_tokens` of 0 scores the prompt alone.
std::vector<TextRequest> texts_of(const std::vector<PreparedPrompt>& prompts, const AnswerOptions& options,
                                  std::int64_t max_tokens, bool echo, const ServedModel& model);

}  // namespace fathom::serve
