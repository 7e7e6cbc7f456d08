#include "kernels/cuda/cublaslt_library.h"

#include <string>

#include <dlfcn.h>
#include <fmt/format.h>

#include "kernels/cuda/shared_library.h"
#include "kernels/error.h"

namespace fathom::cuda {
namespace {

constexpr const char* kVariable = "FATHOM_CUBLASLT";

template <typename Function>
void find(Function*& function, void* library, const char* symbol) {
  function = reinterpret_cast<Function*>(dlsym(library, symbol));
  if (function == nullptr) {
    throw UserError(fmt::format("The cuBLASLt library that was found has no function {}.", symbol),
                    fmt::format("Install the cuBLAS of CUDA {}, or name its libcublasLt.so.{} in {}.",
                                CUBLAS_VER_MAJOR, CUBLAS_VER_MAJOR, kVariable));
  }
}

CublasLt load() {
  const std::string name = fmt::format("libcublasLt.so.{}", CUBLAS_VER_MAJOR);
  const OpenedLibrary opened = open_library(
      {.name = name,
       .variable = kVariable,
       .folders = {"/usr/local/cuda/lib64", fmt::format("/usr/local/cuda-{}/lib64", CUBLAS_VER_MAJOR)}});
  if (opened.handle == nullptr) {
    throw UserError(
        fmt::format("cuBLASLt, which multiplies matrices on the GPU, cannot be loaded: {}.", opened.why_not),
        fmt::format(
            "Install the cuBLAS of CUDA {} (it is in the CUDA Toolkit and in the Python package "
            "nvidia-cublas), "
            "and name {} or its folder in the environment variable {} where the system does not find it by "
            "itself. --device cpu goes without.",
            CUBLAS_VER_MAJOR, name, kVariable));
  }
  CublasLt out{};
  void* const library = opened.handle;
  find(out.create, library, "cublasLtCreate");
  find(out.destroy, library, "cublasLtDestroy");
  find(out.matmul, library, "cublasLtMatmul");
  find(out.matmul_desc_create, library, "cublasLtMatmulDescCreate");
  find(out.matmul_desc_destroy, library, "cublasLtMatmulDescDestroy");
  find(out.matmul_desc_set_attribute, library, "cublasLtMatmulDescSetAttribute");
  find(out.matrix_layout_create, library, "cublasLtMatrixLayoutCreate");
  find(out.matrix_layout_destroy, library, "cublasLtMatrixLayoutDestroy");
  find(out.matrix_layout_set_attribute, library, "cublasLtMatrixLayoutSetAttribute");
  find(out.matmul_preference_create, library, "cublasLtMatmulPreferenceCreate");
  find(out.matmul_preference_destroy, library, "cublasLtMatmulPreferenceDestroy");
  find(out.matmul_preference_set_attribute, library, "cublasLtMatmulPreferenceSetAttribute");
  find(out.matmul_algo_get_heuristic, library, "cublasLtMatmulAlgoGetHeuristic");
  find(out.matmul_algo_check, library, "cublasLtMatmulAlgoCheck");
  find(out.get_status_string, library, "cublasLtGetStatusString");
  find(out.get_version, library, "cublasLtGetVersion");
  const std::size_t major = out.get_version() / 10000;  // CUBLAS_VERSION's digits
  if (major != CUBLAS_VER_MAJOR) {
    throw UserError(
        fmt::format("The cuBLASLt library that was found is of CUDA {}, and this build needs CUDA {}.", major,
                    CUBLAS_VER_MAJOR),
        fmt::format("Let {} name a {}.", kVariable, name));
  }
  return out;
}

}  // namespace

const CublasLt& cublaslt() {
  static const CublasLt loaded = load();  // one that fails is tried again by the next call
  return loaded;
}

}  // namespace fathom::cuda
