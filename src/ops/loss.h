// The losses, which end the tape: each computes its gradient with its weight already in it (autograd/tape.h).
#pragma once

#include "src/autograd/tape.h"

namespace fathom::ops {

/// How a loss enters the objective: gradient_scale * sum over rows. For a mean over N rows and A
/// micro-batches, gradient_scale = 1 / (N * A).
struct LossOptions {
  double gradient_scale = 1.0;
  std::int64_t chunk_rows = 0;  // rows of logits held at a time; 0: the backend's choice
};

/// Cross-entropy of the LM head, chunk by chunk: N x V logits are never held, and softmax, loss and gradient
/// are one pass over a chunk. x [N, D], w [V, D], targets int32 [N] (below 0: ignored) -> losses [N] in nats,
/// stat dtype.
Tensor linear_cross_entropy(Context& c, const Tensor& x, const Tensor& w, const Tensor& targets,
                            const LossOptions& options);

/// Binary cross-entropy of logits r, of any shape of N elements, against "element i is among indices" (int32,
/// ascending) -> losses [N] in nats.
Tensor membership_bce(Context& c, const Tensor& r, const Tensor& indices, const LossOptions& options);

/// The sum of a vector, as a host number.
double sum(Context& c, const Tensor& x);

}  // namespace fathom::ops
