// Ranks that were started to train together: with the same config, text and program, or not at all.
#pragma once

#include <string>

#include "train/inputs.h"
#include "train/ranks.h"

namespace fathom {

/// UserError, on every rank, when one of them has something else than rank 0: it names the rank and what
/// differs. `build` says which program this is.
void require_same_start(Ranks& ranks, const TrainingInputs& inputs, const std::string& build);

}  // namespace fathom
