// Another rank is lost, and so is what was to be computed with it.
#pragma once

#include "kernels/error.h"

namespace fathom {

/// The message names the rank, its host and how far it was.
class RankError : public UserError {
 public:
  using UserError::UserError;
};

}  // namespace fathom
