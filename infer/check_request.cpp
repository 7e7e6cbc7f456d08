// What a request may ask for.
#include <cmath>

#include <fmt/format.h>

#include "infer/engine.h"
#include "kernels/error.h"

namespace fathom {

namespace {

void require(bool holds, const char* what, const char* range) {
  if (!holds) throw UserError(fmt::format("{} is out of range.", what), fmt::format("It is {}.", range));
}

void check_sampling(const SamplingOptions& s, std::int64_t vocab) {
  require(s.temperature >= 0 && std::isfinite(s.temperature), "temperature", "0 or more");
  require(s.top_k >= 0, "top_k", "0 (all) or more");
  require(s.top_p >= 0 && s.top_p <= 1, "top_p", "from 0 to 1");
  require(s.min_p >= 0 && s.min_p <= 1, "min_p", "from 0 to 1");
  require(s.repetition_penalty >= 1e-3 && s.repetition_penalty <= 1e3, "repetition_penalty",
          "from 0.001 to 1000");
  require(std::isfinite(s.presence_penalty) && std::isfinite(s.frequency_penalty),
          "a presence or frequency penalty", "a number");
  for (const auto& [id, bias] : s.logit_bias) {
    require(bias < INFINITY, "a logit_bias", "a number, or minus infinity");
    if (id >= 0 && id < vocab) continue;
    throw UserError(fmt::format("logit_bias names the token {}, outside the vocabulary of {}.", id, vocab));
  }
}

}  // namespace

void check_request(const Request& r, std::int64_t vocab, std::int64_t context, const KvCache& cache) {
  if (r.prompt.empty())
    throw UserError("The prompt is empty: there is nothing to go on from.", "Give at least one token.");
  for (std::size_t i = 0; i < r.prompt.size(); ++i) {
    if (r.prompt[i] >= 0 && r.prompt[i] < vocab) continue;
    throw UserError(
        fmt::format("Token {} of the prompt is {}, outside the vocabulary of {}.", i, r.prompt[i], vocab),
        "Use the tokenizer that the model was trained with.");
  }
  const auto length = static_cast<std::int64_t>(r.prompt.size());
  if (length - (r.max_tokens == 0 ? 1 : 0) > context) {
    throw UserError(fmt::format("The prompt has {} tokens, and the model's context is {}.", length, context),
                    "Shorten the prompt.");
  }
  if (!cache.could_hold(length - (r.max_tokens == 0 ? 1 : 0))) {
    throw UserError(
        fmt::format("The prompt has {} tokens, more than the whole cache holds ({} blocks of {}).", length,
                    cache.pool().blocks(), cache.block()),
        "Give the cache more memory.");
  }
  require(r.max_tokens >= 0, "max_tokens", "0 or more");
  require(r.top_logprobs >= 0, "top_logprobs", "0 or more");
  require(!r.threshold || (*r.threshold > 0 && *r.threshold < 1), "a routing threshold", "between 0 and 1");
  check_sampling(r.sampling, vocab);
}

}  // namespace fathom
