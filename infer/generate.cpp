#include "infer/generate.h"

#include <algorithm>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/core/stopwatch.h"

namespace fathom {

namespace {

void check_prompt(const Transformer& model, const std::vector<std::int32_t>& prompt) {
  if (prompt.empty()) {
    throw UserError("The prompt is empty: there is nothing to go on from.",
                    "Give -p a text, or --prompt-ids.");
  }
  const std::int64_t vocab = model.config().vocab_size;
  for (std::size_t i = 0; i < prompt.size(); ++i) {
    if (prompt[i] >= 0 && prompt[i] < vocab) continue;
    throw UserError(fmt::format("Token {} of the prompt is {}, outside the model's vocabulary of {}.", i,
                                prompt[i], vocab),
                    "Use the tokenizer that the model was trained with.");
  }
}

SelectionRule rule_for(const Transformer& model, const Causal& rule) {
  if (model.routing().kind == RoutingKind::None) return TopK{};  // nothing chooses
  return rule;
}

// By expert, the share of the block's tokens that it took.
std::vector<double> shares_of(const ExpertLayer& experts) {
  std::vector<double> shares;
  for (const std::int64_t taken : experts.dispatch.taken) {
    shares.push_back(static_cast<double>(taken) / static_cast<double>(experts.dispatch.shape.rows));
  }
  return shares;
}

ForwardResult run(Context& c, const Transformer& model, const std::vector<std::int32_t>& ids,
                  const Causal& rule) {
  const Batch batch = make_batch(c, 1, static_cast<std::int64_t>(ids.size()), ids, {});
  return model.forward(c, batch, rule_for(model, rule));
}

}  // namespace

std::vector<float> causal_logits(Context& c, const Transformer& model, const std::vector<std::int32_t>& ids,
                                 const Causal& rule) {
  check_prompt(model, ids);
  const NoGrad no_grad(c);
  const std::vector<double> logits =
      to_doubles(c.backend(), model.logits(c, run(c, model, ids, rule).hidden));
  return {logits.begin(), logits.end()};
}

Generated generate(Context& c, const Transformer& model, const std::vector<std::int32_t>& prompt,
                   const GenerateOptions& options, const OnToken& on_token) {
  check_prompt(model, prompt);
  const std::int64_t room = model.config().max_seq_len;
  const NoGrad no_grad(c);
  Generated out;
  out.finish_reason = "length";
  std::vector<std::int32_t> ids = prompt;
  for (std::int64_t n = 0; n < options.tokens; ++n) {
    const Stopwatch watch;
    const auto length = std::min(static_cast<std::int64_t>(ids.size()), room);
    const std::vector<std::int32_t> window(ids.end() - length, ids.end());
    const ForwardResult pass = run(c, model, window, options.rule);
    const Tensor last = model.logits(c, pass.hidden.rows(length - 1, length));
    std::vector<float> logits = to_host<float>(c.backend(), last);
    // The model's vocabulary is the store's, padded: the rest means nothing.
    if (options.vocab > 0 && options.vocab < model.config().vocab_size) {
      logits.resize(static_cast<std::size_t>(options.vocab));
    }
    const SampledToken next = sample(logits, options.sampling, static_cast<std::uint64_t>(ids.size()));
    out.routed_fraction.clear();
    for (const RoutedLayer& routed : pass.routing) {
      out.routed_fraction.push_back(static_cast<double>(routed.indices.size()) / static_cast<double>(length));
    }
    const std::vector<double> none(static_cast<std::size_t>(model.routing().experts.count));
    out.expert_fraction.assign(model.expert_layers().size(), none);  // of a block that kept no token
    for (const ExpertLayer& e : pass.experts) {
      out.expert_fraction[static_cast<std::size_t>(e.layer)] = shares_of(e);
    }
    (n == 0 ? out.prefill_seconds : out.decode_seconds) += watch.seconds();
    const std::vector<std::int32_t>& stops = options.stop_tokens;
    if (std::find(stops.begin(), stops.end(), next.id) != stops.end()) {
      out.finish_reason = "stop";
      break;
    }
    ids.push_back(next.id);
    out.ids.push_back(next.id);
    out.logprobs.push_back(next.logprob);
    if (on_token && !on_token(next.id)) {
      out.finish_reason = "stop";
      break;
    }
  }
  return out;
}

}  // namespace fathom
