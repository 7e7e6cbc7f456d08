// Causal attention by cuDNN's flash kernels, over the packed rows of backend.h. cuDNN is opened at run time;
// a machine without it, or a build without cudnn-frontend's headers, has CudnnAttention::open() return null.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "kernels/backend.h"
#include "kernels/cuda/check.h"

namespace fathom::cuda {

class CudnnAttention {
 public:
  /// For the device that is current and for `stream`, which lives longer than this. `deterministic`: the
  /// backward is bit-equal from run to run, at some cost (the forward always is). Null when cuDNN
  /// (libcudnn.so.9) cannot be used; why_not() says why. Looked for where FATHOM_CUDNN says (the library's
  /// path or its folder, such as site-packages/nvidia/cudnn/lib), else where the dynamic linker finds it,
  /// else in /usr/local/cuda/lib64.
  static std::unique_ptr<CudnnAttention> open(cudaStream_t stream, bool deterministic);
  ~CudnnAttention();

  /// Whether forward and backward take this shape. head_dim: multiples of 8 up to 128; seq: from 2 on.
  bool supports(const AttentionShape& s) const;

  /// out [B*T, H*d] and lse [B, H, T] of qkv [B*T, (H+2G)*d], all 16-byte aligned. `workspace` has
  /// forward_workspace(s) bytes, 256-byte aligned; it may be shared with other work of the stream.
  void forward(bf16* out, float* lse, const bf16* qkv, const AttentionShape& s, void* workspace);
  /// dqkv [B*T, (H+2G)*d], all of it overwritten. `workspace` has backward_workspace(s) bytes.
  void backward(bf16* dqkv, const bf16* dout, const bf16* out, const float* lse, const bf16* qkv,
                const AttentionShape& s, void* workspace);

  /// Bytes. The first call for a shape builds its plan (up to a second of host work), which is kept; make
  /// that call, or one forward and backward, before the work is captured in a CUDA graph.
  std::size_t forward_workspace(const AttentionShape& s);
  std::size_t backward_workspace(const AttentionShape& s);

  std::string version() const;   // "9.14.0"
  static std::string why_not();  // why the last open() returned null

 private:
  struct Impl;
  explicit CudnnAttention(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace fathom::cuda
