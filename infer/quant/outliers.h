// How far single elements stand out of a model's residual stream: what a rotation is to take away.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "src/model/transformer.h"

namespace fathom {

/// By the number of blocks behind the stream, 0 (the embedding) to depth: an element's greatest size over the
/// root mean square of its token's stream, the mean over `tokens`, which are sequences of `seq` (and what is
/// left over is not looked at). Evenly spread elements have about 3, one element alone sqrt(D).
std::vector<double> stream_outliers(Context& c, const Transformer& model, const SelectionRule& rule,
                                    std::span<const std::int32_t> tokens, std::int64_t seq);

}  // namespace fathom
