// The MLP of experts (Zhou et al. 2022, arXiv 2202.09368, expert choice; Fedus et al. 2021, arXiv 2101.03961,
// token choice), with no-ops among the choices (integrated Mixture-of-Depths-and-Experts: Raposo et al. 2024,
// arXiv 2404.02258, section 3.6).
//
// clang-format off
//   h    = x + a                              the stream after attention                       h  [N, D]
//   p    = softmax(W_r norm(h))               over E experts, then the no-ops                  p  [N, E + no-ops]
//   S_e  = the K rows of each sequence        with the largest p_e: expert e takes them; or    S  [E, B*K]
//          the first K of each sequence       whose largest p_e (top 1, or of top k) it is
//   w_ie = p_ie                               or, of top k, over the sum of the k chosen       w  [N, E + no-ops]
//   f_e  = MLP_e(norm(h)_i : i in S_e)        SwiGLU with weights of its own                   f  [E, B*K, D]
//   m_i  = sum over e with i in S_e           of w_ie f_e,i, in the order of the experts       m  [N, D]
// clang-format on
//
// K is expert_tokens (src/config). A no-op takes no tokens and adds nothing: under expert choice, what it has
// of a token's affinity is missing from the experts, so that such a token ranks low with them and skips the
// MLP; under token choice, a token that chooses it has one expert less.
#include "src/model/blocks.h"
#include "src/ops/linear.h"
#include "src/ops/mlp.h"
#include "src/ops/norm.h"
#include "src/ops/token_choice.h"

namespace fathom {

// Returns {h, m} and, where the router has losses, {affinity, lse}. The choice is made once: a second run of
// the same block, for its backward, finds it in `experts`.
std::vector<Tensor> Transformer::experts_after(Context& c, const Tensor& x, const Tensor& a, const Rows& rows,
                                               ExpertLayer& experts) const {
  const std::int64_t layer = experts.layer;
  const bool tokens_choose = routing_.tokens_choose();
  const auto [h, normed] =
      ops::add_rms_norm(c, x, a, weight(layer, "post_attention_layernorm.weight"), model_.norm_eps);
  ops::Affinity router;
  {
    const FlopItem item(c, "router");
    router = ops::expert_affinity(c, normed, weight(layer, "mlp.router.weight"));
  }
  const Tensor weights =
      tokens_choose ? ops::token_choice(c, router.affinity, routing_.experts.top_k) : router.affinity;
  if (!experts.dispatch.rows.defined()) {
    const ops::ExpertSequences s{
        .batch = rows.batch,
        .seq = rows.seq,
        .experts = routing_.experts.count,
        .keep = rows.without_limit ? rows.seq : expert_tokens(routing_.experts, rows.seq)};
    experts.dispatch = tokens_choose ? ops::fill_slots(c, weights, s) : ops::expert_choice(c, weights, s);
    experts.seq = rows.seq;
    experts.affinity = router.affinity.detach();
    experts.lse = router.lse.detach();
    if (tokens_choose) experts.weights = weights.detach();
  }
  Tensor m;
  {
    const FlopItem item(c, "experts");
    const Tensor taken = ops::expert_gather(c, normed, experts.dispatch);
    const Tensor gate_up = ops::linear(c, taken, weight(layer, "mlp.experts.gate_up_proj.weight"));
    const Tensor f = ops::swiglu_linear(c, gate_up, weight(layer, "mlp.experts.down_proj.weight"));
    m = ops::expert_combine(c, f, weights, experts.dispatch);
  }
  if (!tokens_choose) return {h, m};
  return {h, m, router.affinity, router.lse};
}

// Each layer's losses are means over its own sequences and rows, and the sums say them as if over the batch's
// rows.
void Transformer::record_expert_losses(Context& c, const ForwardResult& result, double weight,
                                       const Tensor& sums, std::int64_t rows) const {
  if (!routing_.tokens_choose()) return;
  const std::int64_t layers = loss_layers().experts;
  const double share = weight / static_cast<double>(layers);
  const auto put = [&](std::int64_t slot, const Tensor& losses) {
    const Tensor sum = sums.rows(slot, slot + 1);
    c.backend().sum(sum, losses);
    c.backend().scale(sum, static_cast<double>(rows) / static_cast<double>(losses.size()));
  };
  std::int64_t slot = 1 + 2 * loss_layers().routed;
  for (const ExpertLayer& e : result.experts) {
    const auto own = static_cast<double>(e.lse.size()), sequences = own / static_cast<double>(e.seq);
    put(slot, ops::balance_loss(c, e.affinity, e.weights, e.seq,
                                {.gradient_scale = share * routing_.experts.balance_weight / sequences}));
    put(slot + layers, ops::z_loss(c, e.lse, {.gradient_scale = share * routing_.experts.z_weight / own}));
    ++slot;
  }
}

}  // namespace fathom
