// Why a GPU cannot be used, in words: what CUDA's codes mean for somebody who wants to train. Host code.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/device_query.h"
#include "kernels/error.h"

namespace fathom::cuda {

/// Asking for the list of GPUs ended in `code`. The versions are those of DeviceReport.
UserError cannot_list(cudaError_t code, int driver_version, int runtime_version);

/// Using a GPU that is listed ended in `code`, when it was to `what` ("run a kernel on"). `architectures`:
/// what this build has code for, "90a-real".
UserError cannot_use(cudaError_t code, const Device& device, const char* what, const char* architectures);

}  // namespace fathom::cuda
