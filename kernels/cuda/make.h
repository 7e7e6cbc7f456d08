// The way into the CUDA backend, without CUDA's headers. Only in builds with FATHOM_CUDA.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace fathom {

/// The backend of GPU `device` (CUDA's numbering). UserError: there is no driver, no such device, or this
/// build has no code for it.
std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options, int device = 0);

}  // namespace fathom
