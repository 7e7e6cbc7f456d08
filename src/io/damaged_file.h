// The error for a file whose bytes are not those that were written.
#pragma once

#include "kernels/error.h"

namespace fathom {

/// Truncated, lengthened or changed: no longer the file that Fathom wrote. Everything else that keeps a file
/// from being used (no permission, a newer format, another model) is another UserError: the file may be good.
class DamagedFile : public UserError {
 public:
  using UserError::UserError;
};

}  // namespace fathom
