// Built in cudnn_attention.cpp's place with -DFATHOM_CUDNN_ATTENTION=OFF. There never is a CudnnAttention
// then, so all but open() and why_not() exist for the linker.
#include "kernels/cuda/cudnn_attention.h"

namespace fathom::cuda {
namespace {

[[noreturn]] void absent() { throw InternalError("[attention] this build is without cuDNN"); }

}  // namespace

struct CudnnAttention::Impl {};

std::unique_ptr<CudnnAttention> CudnnAttention::open(cudaStream_t, bool) { return nullptr; }
std::string CudnnAttention::why_not() { return "this build is without it (FATHOM_CUDNN_ATTENTION is off)"; }

CudnnAttention::~CudnnAttention() = default;
bool CudnnAttention::supports(const AttentionShape&) const { return false; }
void CudnnAttention::forward(bf16*, float*, const bf16*, const AttentionShape&, void*) { absent(); }
void CudnnAttention::backward(bf16*, const bf16*, const bf16*, const float*, const bf16*,
                              const AttentionShape&, void*) {
  absent();
}
std::size_t CudnnAttention::forward_workspace(const AttentionShape&) { absent(); }
std::size_t CudnnAttention::backward_workspace(const AttentionShape&) { absent(); }
std::string CudnnAttention::version() const { absent(); }

}  // namespace fathom::cuda
