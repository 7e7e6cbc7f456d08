// Activation recomputation: run a function without recording it, and run it again when its backward is due.
#pragma once

#include <functional>
#include <vector>

#include "src/autograd/tape.h"

namespace fathom {

using BlockFunction = std::function<std::vector<Tensor>(Context&, const std::vector<Tensor>&)>;

/// outputs = f(inputs), keeping the inputs only. The function must be deterministic: choices that it depends
/// on (the kept tokens of a routed block) are made outside and captured. Losses and gradients are bit-equal
/// to f recorded directly. Without a tape it is f itself.
std::vector<Tensor> recompute(Context& c, const BlockFunction& f, const std::vector<Tensor>& inputs);

}  // namespace fathom
