// Which of NVIDIA's libraries this machine and this build have, as the CUDA backend finds them. Only in
// builds with FATHOM_CUDA.
#pragma once

#include <string>
#include <vector>

namespace fathom::cuda {

struct Library {
  std::string name;     // "cuBLASLt"
  std::string version;  // "13.0.2"; empty: it cannot be used
  std::string why_not;  // empty, or why
  std::string without;  // what its lack costs
};

/// cuBLASLt, cuDNN and NCCL, opened as they are to be used, and CUTLASS, which is part of the program or not.
/// cuDNN is looked for only with `gpu`: it does not start without one.
std::vector<Library> query_libraries(bool gpu);

}  // namespace fathom::cuda
