// The ops of a routed block: choose tokens, gather them, and add the block's output back.
#pragma once

#include <vector>

#include "src/autograd/tape.h"

namespace fathom::ops {

/// The K tokens of largest score in each sequence: row numbers b*T + t, ascending; ties go to the lower
/// index. scores [B*T] -> int32 [B*K]. Not differentiable.
Tensor top_k_rows(Context& c, const Tensor& scores, std::int64_t batch, std::int64_t seq, std::int64_t keep);

/// Rows whose score is above the threshold, ascending, int32 [any]. Each token decides alone. Not
/// differentiable.
Tensor rows_above(Context& c, const Tensor& scores, double threshold, std::int64_t batch, std::int64_t seq);

/// The greatest fp32 number that is not above x: scores that are fp32 are above the one where they are above
/// the other.
float fp32_below(double x);

/// x[indices]. x [N, D], indices int32 [M], unique and ascending -> [M, D].
Tensor gather_rows(Context& c, const Tensor& x, const Tensor& indices);
/// The same for int32 vectors (positions, documents).
Tensor gather_int32(Context& c, const Tensor& x, const Tensor& indices);

/// And for stat vectors that nothing is learned of.
Tensor gather_stat(Context& c, const Tensor& x, const Tensor& indices);

/// y = x, with y[i] += g(r[i]) * f for the kept rows i (Raposo et al. 2024, eq. 1). x [N, D], f [M, D], r
/// [N].
Tensor gated_scatter(Context& c, const Tensor& x, const Tensor& f, const Tensor& r, const Tensor& indices,
                     GateKind gate);

}  // namespace fathom::ops
