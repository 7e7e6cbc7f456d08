#include "kernels/cuda/libraries.h"

#include <fmt/format.h>

#include "kernels/cuda/codes_gemm.h"
#include "kernels/cuda/cublaslt_library.h"
#include "kernels/cuda/cudnn_attention.h"
#include "kernels/cuda/nccl_query.h"
#include "kernels/error.h"

namespace fathom::cuda {

namespace {

Library query_cublaslt() {
  Library found{"cuBLASLt", "", "", "Matrix products need it: nothing can be computed on the GPU."};
  try {
    const std::size_t v = cublaslt().get_version();  // 10000 * major + 100 * minor + patch
    found.version = fmt::format("{}.{}.{}", v / 10000, v / 100 % 100, v % 100);
  } catch (const UserError& e) {
    found.why_not = e.what();
  }
  return found;
}

Library query_cudnn(bool gpu) {
  Library found{"cuDNN", "", "",
                "Attention runs on Fathom's own kernels, about half as fast at long sequences."};
  if (!gpu) {
    found.why_not = "not looked for, as there is no GPU";
    return found;
  }
  if (const auto cudnn = CudnnAttention::open(nullptr, false)) {
    found.version = cudnn->version();
  } else {
    found.why_not = CudnnAttention::why_not();
  }
  return found;
}

Library query_cutlass() {
  return {
      "CUTLASS", codes_gemm_version(), why_no_codes_gemm(),
      "On Hopper, products of many rows of codes (--activations) run on Fathom's own kernels, several times "
      "slower."};
}

Library query_nccl() {
  return {"NCCL", nccl_version(), why_no_nccl(), "Several GPUs cannot train together."};
}

}  // namespace

std::vector<Library> query_libraries(bool gpu) {
  return {query_cublaslt(), query_cudnn(gpu), query_cutlass(), query_nccl()};
}

}  // namespace fathom::cuda
