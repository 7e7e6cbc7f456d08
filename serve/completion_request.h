// What a client asks of /v1/completions, as read from its JSON and checked; no socket and no model in sight.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "infer/sampling.h"

namespace fathom::serve {

class JsonFields;

/// What the server's model and its owner allow.
struct RequestLimits {
  std::int64_t vocab = 0;    // ids of prompts and of logit_bias are below
  std::int64_t context = 0;  // tokens of a prompt and its answer
  std::int64_t texts = 128;  // of a request: prompts times n
  std::int64_t logprobs = 20;
  /// Of routing, between which a request may choose its own; 0 and 0: the model asks for none.
  double min_threshold = 0, max_threshold = 0;
};

/// Text, or ids as they are.
struct PromptInput {
  std::string text = {};
  std::vector<std::int32_t> ids = {};
  bool is_ids = false;
};

/// How the answers are chosen: the fields that completions and chats share.
struct AnswerOptions {
  std::string model;  // as the client named it; empty: not at all
  std::int64_t n = 1;
  std::optional<std::int64_t> max_tokens;  // none: what the route has by default
  std::vector<std::string> stops;
  SamplingOptions sampling;
  std::optional<std::uint64_t> seed;  // none: another one each time
  bool ignore_eos = false;            // go on behind the end of a document
  std::optional<double> threshold;    // of routing; none: the server's
  bool prefix_cache = true;           // what texts that begin alike share
  bool routing = false;               // says which routed layers computed which token
  bool stream = false;
  bool include_usage = false;
  int logprobs = -1;  // with each token, so many of the most likely ones; -1: none at all
};

struct CompletionRequest {
  AnswerOptions options;
  std::vector<PromptInput> prompts;
  bool echo = false;
  bool add_special_tokens = true;  // what the tokenizer puts before a text
};

/// ApiError, with the field that is wrong.
CompletionRequest parse_completion(std::string_view body, const RequestLimits& limits);

/// Reads the fields that completions and chats share, all but max_tokens and logprobs.
AnswerOptions read_answer_options(JsonFields& fields, const RequestLimits& limits);
/// ApiError (400) when prompts times n are more texts than a request may have.
void check_texts(std::int64_t prompts, std::int64_t n, const RequestLimits& limits);

/// The seed of choice number `choice` of a request: the first one has the request's own, so that it is what
/// `fathom generate --seed` gives, and what it is with any other n.
std::uint64_t seed_of(std::uint64_t seed, std::int64_t choice);

}  // namespace fathom::serve
