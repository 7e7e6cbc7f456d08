// Launching a kernel with as much shared memory as it asks for.
#pragma once

#include <cstddef>

#include <cuda_runtime_api.h>

#include "kernels/cuda/check.h"

namespace fathom::cuda {

struct LaunchSize {
  unsigned blocks = 0;  // 0: nothing is launched
  unsigned threads = 0;
  std::size_t shared_bytes = 0;
  bool many_blocks = false;  // on a multiprocessor at the same time: all of its shared memory is for them
};

template <typename Arguments>
void launch(const char* op, void (*kernel)(Arguments), const LaunchSize& size, cudaStream_t stream,
            const Arguments& arguments) {
  if (size.blocks == 0) return;
  constexpr std::size_t kOwnShared = 1024;  // what a kernel declares itself counts as well
  const bool is_large = size.shared_bytes + kOwnShared > 48 * 1024;
  if (is_large) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(size.shared_bytes)),
          op);
  }
  if (is_large || size.many_blocks)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100), op);
  kernel<<<size.blocks, size.threads, size.shared_bytes, stream>>>(arguments);
  check_launch(op);
}

}  // namespace fathom::cuda
