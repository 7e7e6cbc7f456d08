// What every way of choosing experts begins with.
#pragma once

#include "src/ops/experts.h"

namespace fathom::ops {

/// A dispatch of `slots` slots for each of the first `experts` choices, its rows and slots still to be
/// written. InternalError unless `choices` [choices >= experts, rows] says of each row what its choices are.
Dispatch empty_dispatch(Context& c, const char* op, const Tensor& choices, std::int64_t experts,
                        std::int64_t rows, std::int64_t slots);

}  // namespace fathom::ops
