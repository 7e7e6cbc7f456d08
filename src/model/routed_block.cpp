// The Mixture-of-Depths block (Raposo et al. 2024, arXiv 2404.02258, section 3 and equation 1).
//
// clang-format off
//   r_i  = w . x_i                            router, on the raw residual stream               r  [N]
//   S    = the rows chosen by the rule        top-k of each sequence, or a causal threshold    S  [B*K]
//   X~   = (x_i : i in S), in the order of i  only these rows are computed                     X~ [B*K, D]
//   a    = attention(norm(X~))                at their original positions, among themselves    a  [B*K, D]
//   m    = mlp(norm(X~ + a))                  reads the unscaled sum; or experts (staged MoDE) m  [B*K, D]
//   x'_i = x_i + g(r_i) * (a + m)_i           for i in S                                       (eq. 1)
//   x'_i = x_i                                for all others: a skipped token is no key for anyone
// clang-format on
#include "src/model/blocks.h"
#include "src/ops/linear.h"
#include "src/ops/routing.h"

namespace fathom {

namespace {

// One rule, one way to choose: S.
struct Select {
  Context& c;
  const RoutingConfig& routing;
  const RoutedLayer& routed;
  std::int64_t batch;
  std::int64_t seq;

  Tensor operator()(const TopK&) const {
    return ops::top_k_rows(c, routed.scores, batch, seq, kept_tokens(routing.capacity, seq));
  }
  Tensor operator()(const Causal& rule) const {
    const bool by_predictor = rule.logit == Causal::Logit::Predictor;
    return ops::rows_above(c, by_predictor ? routed.predicted : routed.scores, logit(rule.threshold), batch,
                           seq);
  }
  Tensor operator()(const Stochastic& rule) const {
    const Tensor noise = c.empty_stat({batch * seq});
    const auto layer = static_cast<std::uint64_t>(routed.layer);
    const std::uint64_t stream = rule.streams_there ? layer : first_stream(rule.step) + layer;
    c.backend().fill_normal_from(noise, 1.0, {rule.seed, stream, rule.streams_there, rule.first * seq});
    return ops::top_k_rows(c, noise, batch, seq, kept_tokens(routing.capacity, seq));
  }
};

// Of rows with thresholds of their own.
Tensor select_shifted(Context& c, const Causal& rule, const RoutedLayer& routed, std::int64_t rows) {
  const Tensor& logits = rule.logit == Causal::Logit::Predictor ? routed.predicted : routed.scores;
  return ops::rows_above(c, ops::add(c, logits.detach(), rule.shifts), 0, 1, rows);
}

}  // namespace

// p_i = w2 . silu(W1 x_i + b1) + b2, on the stream without its gradient: it learns to foretell S and shapes
// nothing else.
Tensor Transformer::predict(Context& c, std::int64_t layer, const Tensor& x) const {
  const FlopItem item(c, "predictor");
  const Tensor hidden =
      ops::bias_silu(c, ops::linear(c, x.detach(), weight(layer, "router_predictor.0.weight")),
                     weight(layer, "router_predictor.0.bias"));
  return ops::row_score(c, hidden, weight(layer, "router_predictor.2.weight"),
                        weight(layer, "router_predictor.2.bias"));
}

Transformer::Stream Transformer::routed_block(Context& c, std::int64_t layer, const Stream& stream,
                                              const Rows& rows, const SelectionRule& rule,
                                              ForwardResult& result) const {
  const Tensor x = stream.delta.defined() ? ops::add(c, stream.x, stream.delta) : stream.x;
  const auto* causal = std::get_if<Causal>(&rule);
  if (causal != nullptr && causal->blocks == Causal::Blocks::Skipped) return {x, {}};

  RoutedLayer routed{layer, {}, {}, {}};
  {
    const FlopItem item(c, "router");
    routed.scores = ops::row_score(c, x, weight(layer, "router.weight"));
  }
  if (routing_.has_predictor()) routed.predicted = predict(c, layer, x);
  routed.indices = causal != nullptr && causal->shifts.defined()
                       ? select_shifted(c, *causal, routed, x.dim(0))
                       : std::visit(Select{c, routing_, routed, rows.batch, rows.seq}, rule);
  result.routing.push_back(routed);
  if (routed.indices.size() == 0) return {x, {}};
  if (rows.cache != nullptr) rows.cache->expect(c, layer, routed.indices);

  // Kept rows are sequences of K tokens; under a threshold their lengths differ, so they are one packed
  // sequence in which nobody sees beyond its own.
  Rows kept{rows.batch, routed.indices.size() / rows.batch, {}, {}, rows.document_mask, {}, {}};
  kept.positions = ops::gather_int32(c, rows.positions, routed.indices);
  kept.cache = rows.cache;
  kept.kept = routed.indices;
  const bool ragged = std::holds_alternative<Causal>(rule);
  if (ragged) kept.batch = 1, kept.seq = routed.indices.size();
  if ((ragged || rows.document_mask) && rows.cache == nullptr) {
    kept.documents = ops::gather_int32(c, rows.documents, routed.indices);
    kept.first_key = c.empty({routed.indices.size()}, DType::I32);
    c.backend().first_keys(kept.first_key, kept.documents, kept.batch, kept.seq);
  }
  kept.experts = begin_experts(layer);
  kept.observe = rows.observe;
  kept.observe_keys = rows.observe_keys;
  if (kept.observe != nullptr) kept.gates = gates_of(c, routed, routing_.gate);
  kept.causal = rows.causal;

  const auto f = [this, layer, kept](Context& ctx, const std::vector<Tensor>& in) -> std::vector<Tensor> {
    const Tensor a = attention_of(ctx, layer, in[0], kept, {});
    if (kept.experts) {
      std::vector<Tensor> out =
          experts_after(ctx, in[0], a, kept, *kept.experts);  // the sum X~ + a, and m, ...
      out[1] = ops::add(ctx, a, out[1]);
      return {out.begin() + 1, out.end()};
    }
    return {add_mlp_after(ctx, layer, in[0], a, kept)};
  };
  const std::vector<Tensor> out = body(c, f, {ops::gather_rows(c, x, routed.indices)});
  const Tensor& delta = out[0];
  keep_experts(kept.experts.get(), out, 1, result);
  return {ops::gated_scatter(c, x, delta, routed.scores, routed.indices, gate_kind(routing_.gate)), {}};
}

}  // namespace fathom
