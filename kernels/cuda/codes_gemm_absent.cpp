// Built in codes_gemm.cu's place where CUTLASS's headers are not there, or no code for Hopper is asked for.
#include "kernels/cuda/codes_gemm.h"
#include "kernels/error.h"

namespace fathom::cuda {

const char* codes_gemm_version() { return ""; }
const char* why_no_codes_gemm() { return FATHOM_WHY_NO_CUTLASS; }
bool takes_codes_gemm(const CodesGemm&) { return false; }
void codes_gemm(const CodesGemm&, int, cudaStream_t) {
  throw InternalError("[linear_codes_forward] this build is without CUTLASS");
}

}  // namespace fathom::cuda
