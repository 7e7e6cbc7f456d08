// NCCL, by which several GPUs train together (train/comm): whether this build and this machine have it.
// Builds without its header have nccl_absent.cpp in nccl_library.cpp's place.
#pragma once

#include <string>

namespace fathom::cuda {

/// "2.28.9", of the library that is found; empty: it cannot be used.
std::string nccl_version();
/// Why it cannot, or empty.
std::string why_no_nccl();

}  // namespace fathom::cuda
