#include "src/flops/flops.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom {
namespace {

double d(std::int64_t x) { return static_cast<double>(x); }

void require_resolved(const Config& c) {
  const ModelConfig& m = c.model;
  if (m.vocab_size <= 0 || m.kv_heads <= 0 || m.ffn_hidden <= 0 || c.routing.causal.predictor_hidden <= 0) {
    throw InternalError(
        fmt::format("[flops] the config is not resolved: vocab_size {}, kv_heads {}, ffn_hidden {}",
                    m.vocab_size, m.kv_heads, m.ffn_hidden));
  }
}

// Of one MLP of experts over sequences of `tokens` tokens: rows that the experts compute, for each of these
// tokens.
double rows_of_experts(const RoutingConfig& r, double tokens) {
  const auto whole = static_cast<std::int64_t>(std::llround(tokens));
  return d(r.experts.count) * d(expert_tokens(r.experts, whole)) / tokens;
}

// FLOPs of one block's attention and MLP for `tokens` of a sequence's T, spread over the T. `expert_rows`:
// that its experts compute for each of these tokens.
FlopTerms block_flops(const Config& c, double tokens, double expert_rows, double seq_len) {
  const ModelConfig& m = c.model;
  const double width = d(m.width), head_dim = d(m.head_dim()), heads = d(m.heads), kv_heads = d(m.kv_heads);
  const double share = tokens / seq_len;
  FlopTerms f;
  f.attention_proj = share * (2 * width * (heads + 2 * kv_heads) * head_dim + 2 * heads * head_dim * width);
  f.attention_scores = share * (2 * tokens * heads * head_dim);  // 2 products * 2 FLOPs * tokens / 2
  const double mlp = 3 * 2 * width * d(m.ffn_hidden);
  if (c.routing.has_experts()) {
    const double choices = d(c.routing.experts.count + c.routing.experts.noop);
    f.experts = share * expert_rows * mlp;
    f.router = share * 2 * width * choices;
    if (c.routing.experts_choose() && c.routing.has_predictor()) {
      f.predictor = share * 2 * d(c.routing.causal.predictor_hidden) * (width + choices);
    }
  } else {
    f.mlp = share * mlp;
  }
  return f;
}

// The whole forward pass; `tokens_of(l)` is how many of T tokens routed block l computes, and
// expert_rows_of(l, tokens) how many rows the experts of block l compute for each of its tokens.
template <typename TokensOf, typename ExpertRowsOf>
FlopTerms forward(const Config& c, TokensOf tokens_of, ExpertRowsOf expert_rows_of) {
  require_resolved(c);
  const ModelConfig& m = c.model;
  const double seq_len = d(c.train.seq_len), width = d(m.width),
               hidden = d(c.routing.causal.predictor_hidden);
  FlopTerms sum;
  for (std::int64_t l = 0; l < m.depth; ++l) {
    const bool routed = c.routing.routes(l);
    const double tokens = routed ? tokens_of(l) : seq_len;
    const double expert_rows = c.routing.has_experts() ? expert_rows_of(l, tokens) : 0;
    const FlopTerms f = block_flops(c, tokens, expert_rows, seq_len);
    sum.attention_proj += f.attention_proj;
    sum.attention_scores += f.attention_scores;
    sum.mlp += f.mlp;
    sum.experts += f.experts;
    sum.router += f.router;
    sum.predictor += f.predictor;
    if (routed) sum.router += 2 * width;
    if (routed && c.routing.has_predictor()) sum.predictor += 2 * (width * hidden + hidden);
  }
  sum.head = 2 * width * d(m.vocab_size);
  return sum;
}

}  // namespace

FlopTerms forward_flops_per_token(const Config& c) {
  return forward(
      c, [&](std::int64_t) { return d(kept_tokens(c.routing.capacity, c.train.seq_len)); },
      [&](std::int64_t, double tokens) { return rows_of_experts(c.routing, tokens); });
}

FlopTerms train_flops_per_token(const Config& c) {
  FlopTerms f = forward_flops_per_token(c);
  // The gradient of the predictors' input, which nothing asks for.
  double not_computed = 0;
  if (f.predictor > 0) {
    const double one = 2 * d(c.model.width) * d(c.routing.causal.predictor_hidden);
    const double kept_share = d(kept_tokens(c.routing.capacity, c.train.seq_len)) / d(c.train.seq_len);
    for (std::int64_t l = 0; l < c.model.depth; ++l) {
      const bool routed = c.routing.routes(l);
      if (routed) not_computed += one;
      if (c.routing.experts_choose()) not_computed += (routed ? kept_share : 1.0) * one;
    }
  }
  f.attention_proj *= 3;
  f.attention_scores *= 3;
  f.mlp *= 3;
  f.experts *= 3;
  f.router *= 3;
  f.predictor = 3 * f.predictor - not_computed;
  f.head *= 3;
  return f;
}

double train_flops_per_step(const Config& c) {
  return train_flops_per_token(c).total() * d(c.train.batch_tokens);
}

FlopTerms causal_flops_per_token(const Config& c, std::span<const double> realised_capacity,
                                 std::span<const double> expert_rows) {
  const auto blocks = static_cast<std::size_t>(c.model.depth);
  if (realised_capacity.size() != blocks || (c.routing.has_experts() && expert_rows.size() != blocks)) {
    throw InternalError(fmt::format("[causal_flops_per_token] {} capacities and {} expert rows for {} blocks",
                                    realised_capacity.size(), expert_rows.size(), blocks));
  }
  return forward(
      c, [&](std::int64_t l) { return realised_capacity[static_cast<std::size_t>(l)] * d(c.train.seq_len); },
      [&](std::int64_t l, double) { return expert_rows[static_cast<std::size_t>(l)]; });
}

ParameterCount count_parameters(const Config& c) {
  require_resolved(c);
  const ModelConfig& m = c.model;
  const RoutingConfig& r = c.routing;
  const std::int64_t head_dim = m.head_dim(), mlp = 3 * m.width * m.ffn_hidden;
  const std::int64_t without_mlp = m.width * (m.heads + 2 * m.kv_heads) * head_dim +
                                   m.heads * head_dim * m.width + 2 * m.width +
                                   (m.qk_norm ? 2 * head_dim : 0);
  const std::int64_t choices = r.experts.count + r.experts.noop, predicting = r.causal.predictor_hidden;
  std::int64_t expert_router = r.has_experts() ? choices * m.width : 0;
  if (r.experts_choose() && r.has_predictor()) {
    expert_router += m.width * predicting + predicting + predicting * choices + choices;
  }
  const std::int64_t block = without_mlp + expert_router + (r.has_experts() ? r.experts.count : 1) * mlp;
  const std::int64_t around =
      m.width + (r.has_predictor() ? m.width * predicting + predicting + predicting + 1 : 0);

  ParameterCount n;
  const std::int64_t table = m.vocab_size * m.width;
  n.embedding = m.tie_embeddings ? 0 : table;
  n.total = n.embedding + table + m.width;  // table: the head; width: the last norm
  double active = d(n.total);
  for (std::int64_t l = 0; l < m.depth; ++l) {
    const double tokens = d(r.routes(l) ? kept_tokens(r.capacity, c.train.seq_len) : c.train.seq_len);
    const double mlps = r.has_experts() ? rows_of_experts(r, tokens) : 1;
    active += tokens / d(c.train.seq_len) * (d(without_mlp + expert_router) + mlps * d(mlp));
    n.total += block;
    if (!r.routes(l)) continue;
    n.total += around;
    active += d(around);
  }
  n.active = std::llround(active);
  return n;
}

double six_n_flops_per_token(const Config& c) {
  const ParameterCount n = count_parameters(c);
  return 6 * d(n.active - n.embedding);
}

Horizon plan_horizon(const Config& c) {
  const TrainConfig& t = c.train;
  const double per_step = train_flops_per_step(c);
  double steps = 1;
  if (t.target_flops) steps = *t.target_flops / per_step;
  if (t.tokens) steps = d(*t.tokens) / d(t.batch_tokens);
  if (t.steps) steps = d(*t.steps);
  if (steps > 1e12 || steps * d(t.batch_tokens) > 1e18) {
    throw UsageError(
        fmt::format("the horizon asks for {:.3g} steps of {} tokens and {:.3g} FLOPs each, more than 1e12 "
                    "steps or 1e18 tokens.",
                    steps, t.batch_tokens, per_step),
        "Lower train.target_flops, train.tokens or train.steps.");
  }
  Horizon h;
  h.steps = std::max<std::int64_t>(1, std::llround(steps));
  h.tokens = h.steps * t.batch_tokens;
  h.flops = d(h.steps) * per_step;
  return h;
}

}  // namespace fathom
