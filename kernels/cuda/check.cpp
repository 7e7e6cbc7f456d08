#include "kernels/cuda/check.h"

#include <string>

#include <fmt/format.h>

namespace fathom::cuda {

namespace {

// Of these driver_types.h says that the process must end, or the client that lost its device connect anew,
// before CUDA is used again.
bool ends_the_context(cudaError_t code) {
  switch (code) {
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorIllegalInstruction:
    case cudaErrorHardwareStackError:
    case cudaErrorAssert:
    case cudaErrorLaunchTimeout:
    case cudaErrorLaunchFailure:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorContained:
    case cudaErrorTensorMemoryLeak:
    case cudaErrorMpsClientTerminated:
    case cudaErrorExternalDevice:
      return true;
    default:
      return false;
  }
}

}  // namespace

void check(cudaError_t code, const char* op) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // it is reported here; the next check is not to find it, unless it is sticky
  if (code == cudaErrorMemoryAllocation) fail_memory(op);
  const std::string message = fmt::format(
      "[{}] CUDA: {} ({}). If a kernel faulted, it is this op's or one before it; "
      "CUDA_LAUNCH_BLOCKING=1 tells which.",
      op, cudaGetErrorString(code), cudaGetErrorName(code));
  if (ends_the_context(code)) throw DeviceError(message);
  throw InternalError(message);
}

void fail_library(const std::string& message) {
  const cudaError_t code = cudaGetLastError();
  if (!ends_the_context(code)) throw InternalError(message);
  throw DeviceError(fmt::format("{} The GPU had failed: {} ({}).", message, cudaGetErrorString(code),
                                cudaGetErrorName(code)));
}

std::int64_t most_shared_bytes() {
  int device = 0, most = 0;
  check(cudaGetDevice(&device), "cuda");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cuda");
  return most;
}

void fail(const char* op, const char* what, std::int64_t given, std::int64_t expected) {
  throw InternalError(fmt::format("[{}] {} is {}, expected {}", op, what, given, expected));
}

void fail_type(const char* op, const char* what, DType given, DType expected) {
  throw InternalError(
      fmt::format("[{}] {} is of {}, expected {}", op, what, name_of(given), name_of(expected)));
}

void fail_dtype(const char* op, DType given) {
  throw InternalError(fmt::format("[{}] the CUDA backend does not compute in {}", op, name_of(given)));
}

void fail_memory(const char* what) {
  throw MemoryError(
      fmt::format("Out of memory: the GPU has no more for {}.", what),
      "Lower train.micro_batch (the batch stays the same), set train.recompute=block, or free the "
      "GPU of other programs (nvidia-smi lists them).");
}

void fail_null(const char* op, const char* what) {
  throw InternalError(fmt::format("[{}] {} has no data", op, what));
}

}  // namespace fathom::cuda
