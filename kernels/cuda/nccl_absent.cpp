// Built in nccl_library.cpp's place where NCCL's header was not found.
#include "kernels/cuda/nccl_query.h"

namespace fathom::cuda {

std::string nccl_version() { return ""; }
std::string why_no_nccl() { return FATHOM_WHY_NO_NCCL; }

}  // namespace fathom::cuda
