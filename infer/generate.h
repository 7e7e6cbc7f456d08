// Generation by running the whole prefix again for each token, routed causally: the reference that a cached
// decoder has to equal.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "infer/sampling.h"
#include "src/model/transformer.h"

namespace fathom {

struct GenerateOptions {
  std::int64_t tokens = 64;               // at most this many new ones
  std::vector<std::int32_t> stop_tokens;  // each ends the text
  std::int64_t vocab =
      0;  // only ids below this are chosen: the tokenizer's; 0: all of the model's, padding too
  SamplingOptions sampling;
  Causal rule;  // for routed models
};

struct Generated {
  std::vector<std::int32_t> ids;  // the new tokens, the stop token excluded
  std::vector<double> logprobs;   // of each, natural log
  std::string finish_reason;      // "length" or "stop"
  double prefill_seconds = 0;     // the first pass, over the prompt
  double decode_seconds = 0;      // all later passes
  std::vector<double>
      routed_fraction;  // by routed layer: the share of the last pass's tokens that went through it
  /// By layer with experts, by expert: the share of the block's tokens of the last pass that it took.
  std::vector<std::vector<double>> expert_fraction;
};

/// Called after each new token; false ends the generation.
using OnToken = std::function<bool(std::int32_t)>;

/// UserError: an empty prompt, or ids outside the vocabulary. A text longer than max_seq_len goes on from its
/// last max_seq_len tokens.
Generated generate(Context& c, const Transformer& model, const std::vector<std::int32_t>& prompt,
                   const GenerateOptions& options, const OnToken& on_token = {});

/// Logits of every position of `ids`, fp32 [ids, V], routed causally.
std::vector<float> causal_logits(Context& c, const Transformer& model, const std::vector<std::int32_t>& ids,
                                 const Causal& rule);

}  // namespace fathom
