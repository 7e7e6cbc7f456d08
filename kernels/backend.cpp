#include "kernels/backend.h"

namespace fathom {

Backend::Backend() = default;
Backend::~Backend() = default;

}  // namespace fathom
