// Rotations of a model that leave what it computes as it is (QuaRot: Ashkboos et al. 2024, arXiv 2404.00456,
// section 4, stage 1): what is written to the residual stream is rotated, and what reads it reads it rotated.
// A token's few large elements are then spread over the whole width, which is what makes weights and
// activations of few bits possible.
//
//   1. Norms give their scales to every matrix that reads them, and are then the same before and behind a
//      rotation. Tied embeddings are untied: the head gets the final norm's.
//   2. x' = R S x of the stream, S a diagonal of random signs and R a Hadamard transform over sqrt(D). An
//      embedding becomes R S e; what is added, W of o and down, R S W; a reader's row w, R S w.
//   3. Values: v' = R_d v of each key/value head, and o's rows of each query head likewise.
//   4. While the model runs (src/model/quantization.h): what o reads is turned across heads by R_H (x) 1, and
//      what down reads by R_F, with the inverses in o's and down's rows; queries and keys are turned behind
//      RoPE by R_d, which changes none of their products.
//
// Routers and predictors of routed blocks read the stream without a norm: rows R S w, no scale. A decision's
// logit is the same number up to rounding, a skipped token is the identity in both bases, and a gate is a
// number. Experts' routers and predictors read the normed stream.
#pragma once

#include <cstdint>
#include <memory>

#include "src/model/transformer.h"

namespace fathom {

struct RotateOptions {
  std::uint64_t seed = 1;  // of the signs
  OnlineHadamards online = {};
};

/// What such a model is: no weights of few bits, and the transforms.
Quantization rotated_only(const RotateOptions& options);

/// The rotated model, for inference, of one that has its masters: computed in double, on the host, and held
/// as `c` holds parameters. Its embeddings are not tied. Where it transforms as it runs, it has a
/// quantization() of method "rotate-only".
std::unique_ptr<Transformer> rotate_model(Context& c, const Transformer& model,
                                          const RotateOptions& options = {});

/// The greatest element of a model's matrices over its matrix's root mean square: how far outliers stand out.
double greatest_outlier(Context& c, const Transformer& model);

}  // namespace fathom
