// Token choice (Shazeer et al. 2017; Fedus et al. 2021): each token chooses its experts, and what keeps their
// loads even.
#pragma once

#include <cstdint>

#include "src/ops/experts.h"
#include "src/ops/loss.h"

namespace fathom::ops {

/// What each row gives its experts: its `top_k` largest affinities, as they are when top_k is 1, else over
/// their sum; 0 for all other choices. Ties go to the lower choice. affinity [choices, N] -> weights stat
/// [choices, N].
Tensor token_choice(Context& c, const Tensor& affinity, std::int64_t top_k);

/// The slots of chosen experts: of each sequence an expert takes the first `keep` tokens that chose it, in
/// the order of the tokens; the others are dropped. weights [choices >= E, B*T]. Not differentiable.
Dispatch fill_slots(Context& c, const Tensor& weights, const ExpertSequences& s);

/// The load-balancing loss (Fedus et al. 2021, equations 4 to 6) of each sequence alone: choices * sum_e f_e
/// P_e, with f_e the share of a sequence's choices that are e and P_e the mean affinity of e. affinity,
/// weights [choices, B*T]
/// -> losses [B].
Tensor balance_loss(Context& c, const Tensor& affinity, const Tensor& weights, std::int64_t seq,
                    const LossOptions& options);

/// The z-loss (Zoph et al. 2022, equation 5): lse^2. lse [N] -> losses [N].
Tensor z_loss(Context& c, const Tensor& lse, const LossOptions& options);

}  // namespace fathom::ops
