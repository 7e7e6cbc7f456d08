// Attention by cuDNN's flash kernels, for bf16 without document masks.
#pragma once

#include <cstddef>
#include <memory>

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace fathom::cuda {

using bf16 = __nv_bfloat16;

class CudnnAttention {
 public:
  static std::unique_ptr<CudnnAttention> open(cudaStream_t stream,
                                              bool deterministic);  // null when cuDNN cannot be loaded
  ~CudnnAttention();
  bool supports(const AttentionShape& s) const;
  void forward(bf16* out, float* lse, const bf16* qkv, const AttentionShape& s, void* workspace);
  void backward(bf16* dqkv, const bf16* dout, const bf16* out, const float* lse, const bf16* qkv,
                const AttentionShape& s, void* workspace);
  std::size_t forward_workspace(const AttentionShape& s);  // bytes; builds and caches the plan
  std::size_t backward_workspace(const AttentionShape& s);
};

}  // namespace fathom::cuda
