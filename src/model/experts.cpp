// The MLP of experts (Zhou et al. 2022, arXiv 2202.09368, expert choice), with no-ops among the choices
// (integrated Mixture-of-Depths-and-Experts: Raposo et al. 2024, arXiv 2404.02258, section 3.6).
//
// clang-format off
//   h    = x + a                              the stream after attention                       h  [N, D]
//   p    = softmax(W_r norm(h))               over E experts, then the no-ops                  p  [N, E + no-ops]
//   S_e  = the K rows of each sequence        with the largest p_e: expert e takes them        S  [E, B*K]
//   f_e  = MLP_e(norm(h)_i : i in S_e)        SwiGLU with weights of its own                   f  [E, B*K, D]
//   m_i  = sum over e with i in S_e           of p_ie f_e,i, in the order of the experts       m  [N, D]
// clang-format on
//
// K = max(1, floor(capacity_factor * T / E)). A no-op takes no tokens and adds nothing: what it has of a
// token's affinity is missing from the experts, so that such a token ranks low with them and skips the MLP.
#include "src/model/blocks.h"
#include "src/ops/linear.h"
#include "src/ops/mlp.h"
#include "src/ops/norm.h"

namespace fathom {

// Returns {h, m}. The choice is made once: a second run of the same block, for its backward, finds it in
// `experts`.
std::pair<Tensor, Tensor> Transformer::experts_after(Context& c, const Tensor& x, const Tensor& a,
                                                     const Rows& rows, ExpertLayer& experts) const {
  const std::int64_t layer = experts.layer;
  const auto [h, normed] =
      ops::add_rms_norm(c, x, a, weight(layer, "post_attention_layernorm.weight"), model_.norm_eps);
  Tensor affinity;
  {
    const FlopItem item(c, "router");
    affinity = ops::expert_affinity(c, normed, weight(layer, "mlp.router.weight")).affinity;
  }
  if (!experts.affinity.defined()) {
    experts.affinity = affinity.detach();
    experts.dispatch = ops::expert_choice(c, affinity,
                                          {.batch = rows.batch,
                                           .seq = rows.seq,
                                           .experts = routing_.experts.count,
                                           .keep = expert_tokens(routing_.experts, rows.seq)});
  }
  const FlopItem item(c, "experts");
  const Tensor taken = ops::expert_gather(c, normed, experts.dispatch);
  const Tensor gate_up = ops::linear(c, taken, weight(layer, "mlp.experts.gate_up_proj.weight"));
  const Tensor f = ops::swiglu_linear(c, gate_up, weight(layer, "mlp.experts.down_proj.weight"));
  return {h, ops::expert_combine(c, f, affinity, experts.dispatch)};
}

}  // namespace fathom
