// The MLP of experts (Zhou et al. 2022, arXiv 2202.09368, expert choice; Fedus et al. 2021, arXiv 2101.03961,
// token choice), with no-ops among the choices (integrated Mixture-of-Depths-and-Experts: Raposo et al. 2024,
// arXiv 2404.02258, section 3.6).
//
// clang-format off
//   h    = x + a                              the stream after attention                       h  [N, D]
//   p    = softmax(W_r norm(h))               over E experts, then the no-ops                  p  [N, E + no-ops]
//   S_e  = the K rows of each sequence        with the largest p_e: expert e takes them; or    S  [E, B*K]
//          the first K of each sequence       whose largest p_e (top 1, or of top k) it is
//   under the causal rule: all rows           with l_e above the threshold, l being the        S  [E, any]
//                                             logits of p or the predictor's; or all whose
//                                             largest p_e it is
//   w_ie = p_ie                               or, of top k, over the sum of the k chosen       w  [N, E + no-ops]
//   f_e  = MLP_e(norm(h)_i : i in S_e)        SwiGLU with weights of its own                   f  [E, B*K, D]
//   m_i  = sum over e with i in S_e           of w_ie f_e,i, in the order of the experts       m  [N, D]
// clang-format on
//
// K is expert_tokens (src/config). A no-op takes no tokens and adds nothing: under expert choice, what it has
// of a token's affinity is missing from the experts, so that such a token ranks low with them and skips the
// MLP; under token choice, a token that chooses it has one expert less.
//
// What S_e is to be learned from one row alone is "is i in S_e" of the K rows, for every choice (a no-op's K
// rows are those that it would take): the auxiliary loss teaches it to l, the other loss to the predictor. w
// stays the router's affinity.
#include "src/model/blocks.h"
#include "src/ops/linear.h"
#include "src/ops/loss.h"
#include "src/ops/mlp.h"
#include "src/ops/norm.h"
#include "src/ops/routing.h"
#include "src/ops/token_choice.h"

namespace fathom {

// l_i = W2 silu(W1 norm(h)_i + b1) + b2, on rows without their gradient, as a routed block's predictor.
Tensor Transformer::predict_experts(Context& c, std::int64_t layer, const Tensor& x) const {
  const FlopItem item(c, "predictor");
  const Tensor hidden =
      ops::bias_silu(c, ops::linear(c, x.detach(), weight(layer, "mlp.router_predictor.0.weight")),
                     weight(layer, "mlp.router_predictor.0.bias"));
  return ops::choice_scores(c, ops::choice_logits(c, hidden, weight(layer, "mlp.router_predictor.2.weight")),
                            weight(layer, "mlp.router_predictor.2.bias"));
}

ExpertLayer Transformer::route_to_experts(Context& c, const Tensor& x, std::int64_t layer,
                                          const Causal* rule) const {
  ExpertLayer routed;
  {
    const FlopItem item(c, "router");
    const Tensor logits = ops::choice_logits(c, x, weight(layer, "mlp.router.weight"));
    const ops::Affinity p = ops::expert_affinity(c, logits);
    routed.affinity = p.affinity;
    routed.lse = p.lse;
    if (!routing_.experts_choose()) return routed;
    const bool router_decides = rule != nullptr && rule->logit == Causal::Logit::Router;
    if (routing_.has_aux_loss() || router_decides) routed.scores = ops::choice_scores(c, logits);
  }
  if (routing_.has_predictor()) routed.predicted = predict_experts(c, layer, x);
  return routed;
}

ops::Dispatch Transformer::dispatch(Context& c, const ExpertLayer& routed, const Tensor& weights,
                                    const Rows& rows) const {
  const ExpertsConfig& e = routing_.experts;
  const bool tokens_choose = routing_.tokens_choose();
  if (rows.causal) {
    if (tokens_choose) return ops::experts_above(c, weights, 0, e.count);
    const bool by_predictor = rows.causal->logit == Causal::Logit::Predictor;
    const Tensor& logits = by_predictor ? routed.predicted : routed.scores;
    if (!rows.causal->shifts.defined())
      return ops::experts_above(c, logits, logit(rows.causal->threshold), e.count);
    const Tensor& of_pass = rows.causal->shifts;
    const Tensor shifts = rows.kept.defined() ? ops::gather_stat(c, of_pass, rows.kept) : of_pass;
    const Tensor shifted = c.empty(logits.shape(), logits.dtype());
    for (std::int64_t i = 0; i < logits.dim(0); ++i) {
      c.backend().copy(shifted.rows(i, i + 1), shifts);
      c.backend().accumulate(shifted.rows(i, i + 1), logits.rows(i, i + 1));
    }
    return ops::experts_above(c, shifted, 0, e.count);
  }
  const ops::ExpertSequences s{
      .batch = rows.batch, .seq = rows.seq, .experts = e.count, .keep = expert_tokens(e, rows.seq)};
  return tokens_choose ? ops::fill_slots(c, weights, s) : ops::expert_choice(c, weights, s);
}

// In the order in which a block returns them.
std::vector<Tensor ExpertLayer::*> Transformer::read_by_losses() const {
  if (routing_.tokens_choose()) return {&ExpertLayer::affinity, &ExpertLayer::lse};
  std::vector<Tensor ExpertLayer::*> read;
  if (routing_.has_aux_loss()) read.push_back(&ExpertLayer::scores);
  if (routing_.has_predictor()) read.push_back(&ExpertLayer::predicted);
  return read;
}

// Returns {h, m} and what the losses of the router read. The choice is made once: a second run of the same
// block, for its backward, finds it in `experts`.
std::vector<Tensor> Transformer::experts_after(Context& c, const Tensor& x, const Tensor& a, const Rows& rows,
                                               ExpertLayer& experts) const {
  const std::int64_t layer = experts.layer;
  const auto [h, normed] =
      ops::add_rms_norm(c, x, a, weight(layer, "post_attention_layernorm.weight"), model_.norm_eps);
  const ExpertLayer routed = route_to_experts(c, normed, layer, rows.causal ? &*rows.causal : nullptr);
  const Tensor weights = routing_.tokens_choose()
                             ? ops::token_choice(c, routed.affinity, routing_.experts.top_k)
                             : routed.affinity;
  if (!experts.dispatch.rows.defined()) {
    experts.dispatch = dispatch(c, routed, weights, rows);
    experts.seq = rows.seq;
    for (Tensor ExpertLayer::*member :
         {&ExpertLayer::affinity, &ExpertLayer::lse, &ExpertLayer::scores, &ExpertLayer::predicted}) {
      if ((routed.*member).defined()) experts.*member = (routed.*member).detach();
    }
    if (routing_.tokens_choose()) experts.weights = weights.detach();
  }
  Tensor m;
  {
    const FlopItem item(c, "experts");
    const Tensor taken = ops::expert_gather(c, normed, experts.dispatch);
    const Slots slots{weights, experts.dispatch};
    Tensor gate_up =
        ops::linear(c, taken, product(c, layer, "mlp.experts.gate_up_proj.weight", rows, &slots));
    const Tensor f = ops::swiglu_linear(c, std::move(gate_up),
                                        product(c, layer, "mlp.experts.down_proj.weight", rows, &slots));
    m = ops::expert_combine(c, f, weights, experts.dispatch);
  }
  std::vector<Tensor> out = {h, m};
  for (Tensor ExpertLayer::*member : read_by_losses()) out.push_back(routed.*member);
  return out;
}

std::shared_ptr<ExpertLayer> Transformer::begin_experts(std::int64_t layer) const {
  if (!routing_.has_experts()) return nullptr;
  auto experts = std::make_shared<ExpertLayer>();
  experts->layer = layer;
  return experts;
}

// What the losses of an expert router read are the outputs of the block from `first` on.
void Transformer::keep_experts(ExpertLayer* experts, const std::vector<Tensor>& outputs, std::size_t first,
                               ForwardResult& result) const {
  if (experts == nullptr) return;
  for (Tensor ExpertLayer::*member : read_by_losses()) experts->*member = outputs.at(first++);
  result.experts.push_back(*experts);
}

// Each layer's losses are means over its own sequences, rows and choices, and the sums say them as if over
// the batch's rows.
void Transformer::record_expert_losses(Context& c, const ForwardResult& result, double weight,
                                       const Tensor& sums, std::int64_t rows) const {
  if (result.experts.empty()) return;
  const std::int64_t layers = loss_layers().experts;
  const double share = weight / static_cast<double>(layers);
  const auto put = [&](std::int64_t slot, const Tensor& losses) {
    const Tensor sum = sums.rows(slot, slot + 1);
    c.backend().sum(sum, losses);
    c.backend().scale(sum, static_cast<double>(rows) / static_cast<double>(losses.size()));
  };
  const auto foretell = [&](std::int64_t slot, const Tensor& logits, const Tensor& chosen,
                            double loss_weight) {
    const double scale = share * loss_weight / static_cast<double>(logits.size());
    put(slot, ops::membership_bce(c, logits, chosen, {.gradient_scale = scale}));
  };
  std::int64_t slot = 1 + 2 * loss_layers().routed;
  for (const ExpertLayer& e : result.experts) {
    if (routing_.tokens_choose()) {
      const auto own = static_cast<double>(e.lse.size()), sequences = own / static_cast<double>(e.seq);
      put(slot, ops::balance_loss(c, e.affinity, e.weights, e.seq,
                                  {.gradient_scale = share * routing_.experts.balance_weight / sequences}));
      put(slot + layers, ops::z_loss(c, e.lse, {.gradient_scale = share * routing_.experts.z_weight / own}));
    } else {
      if (routing_.has_aux_loss()) foretell(slot, e.scores, e.dispatch.chosen, routing_.causal.aux_weight);
      if (routing_.has_predictor()) foretell(slot + layers, e.predicted, e.dispatch.chosen, 1.0);
    }
    ++slot;
  }
}

}  // namespace fathom
