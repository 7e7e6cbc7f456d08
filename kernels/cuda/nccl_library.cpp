#include "kernels/cuda/nccl_library.h"

#include <cstdlib>

#include <dlfcn.h>
#include <fmt/format.h>

#include "kernels/cuda/nccl_query.h"
#include "kernels/cuda/shared_library.h"
#include "kernels/error.h"

namespace fathom::cuda {
namespace {

constexpr const char* kName = "libnccl.so.2";
constexpr const char* kVariable = "FATHOM_NCCL";
constexpr int kOldestVersion = 21900;  // earlier ones cannot say what went wrong

template <typename Function>
void find(Function*& function, void* library, const char* symbol) {
  function = reinterpret_cast<Function*>(dlsym(library, symbol));
  if (function == nullptr) {
    throw UserError(fmt::format("The NCCL library that was found has no function {}.", symbol),
                    fmt::format("Install NCCL {} or later, or name its {} in {}.",
                                nccl_version_text(kOldestVersion), kName, kVariable));
  }
}

Nccl load() {
  // The memory that multicast takes is not to be had everywhere, and NCCL then fails where it could have
  // gone without.
  ::setenv("NCCL_NVLS_ENABLE", "0", 0);
  // All connections are made where the ranks meet, with a time limit and a message, and not by the first
  // collective of each kind.
  ::setenv("NCCL_RUNTIME_CONNECT", "0", 0);
  const OpenedLibrary opened = open_library(
      {.name = kName, .variable = kVariable, .folders = {"/usr/local/cuda/lib64", "/usr/local/cuda/lib"}});
  if (opened.handle == nullptr) {
    throw UserError(
        fmt::format("NCCL, by which several GPUs train together, cannot be loaded: {}.", opened.why_not),
        fmt::format(
            "Install libnccl2 of NVIDIA's repository or the Python package nvidia-nccl-cu{}, and name "
            "{} or its folder in the environment variable {} where the system does not find it by "
            "itself. One GPU goes without, and so do ranks on the CPU (--device cpu).",
            CUDART_VERSION / 1000, kName, kVariable));
  }
  Nccl out{};
  void* const library = opened.handle;
  find(out.get_version, library, "ncclGetVersion");
  find(out.get_unique_id, library, "ncclGetUniqueId");
  find(out.comm_init_rank, library, "ncclCommInitRank");
  find(out.comm_destroy, library, "ncclCommDestroy");
  find(out.comm_abort, library, "ncclCommAbort");
  find(out.comm_get_async_error, library, "ncclCommGetAsyncError");
  find(out.get_error_string, library, "ncclGetErrorString");
  find(out.get_last_error, library, "ncclGetLastError");
  find(out.group_start, library, "ncclGroupStart");
  find(out.group_end, library, "ncclGroupEnd");
  find(out.all_reduce, library, "ncclAllReduce");
  find(out.reduce, library, "ncclReduce");
  find(out.reduce_scatter, library, "ncclReduceScatter");
  find(out.all_gather, library, "ncclAllGather");
  find(out.broadcast, library, "ncclBroadcast");
  int version = 0;
  if (out.get_version(&version) != ncclSuccess || version < kOldestVersion) {
    throw UserError(fmt::format("The NCCL library that was found is {}, and {} is the oldest that will do.",
                                nccl_version_text(version), nccl_version_text(kOldestVersion)),
                    fmt::format("Let {} name a newer {}.", kVariable, kName));
  }
  return out;
}

}  // namespace

const Nccl& nccl() {
  static const Nccl loaded = load();  // one that fails is tried again by the next call
  return loaded;
}

std::string nccl_version_text(int version) {
  constexpr int kMajor = 10000, kMinor = 100;
  return fmt::format("{}.{}.{}", version / kMajor, version / kMinor % kMinor, version % kMinor);
}

std::string nccl_version() {
  try {
    int version = 0;
    nccl().get_version(&version);
    return nccl_version_text(version);
  } catch (const UserError&) {
    return "";
  }
}

std::string why_no_nccl() {
  try {
    nccl();
    return "";
  } catch (const UserError& e) {
    return e.what();
  }
}

}  // namespace fathom::cuda
