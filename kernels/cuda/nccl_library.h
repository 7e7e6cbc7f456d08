// NCCL, opened at run time: the functions that train/comm calls, under their own names without the prefix.
// Only in builds that found its header.
#pragma once

#include <string>

#include <nccl.h>

namespace fathom::cuda {

struct Nccl {
  decltype(&ncclGetVersion) get_version;
  decltype(&ncclGetUniqueId) get_unique_id;
  decltype(&ncclCommInitRank) comm_init_rank;
  decltype(&ncclCommDestroy) comm_destroy;
  decltype(&ncclCommAbort) comm_abort;
  decltype(&ncclCommGetAsyncError) comm_get_async_error;
  decltype(&ncclGetErrorString) get_error_string;
  decltype(&ncclGetLastError) get_last_error;
  decltype(&ncclGroupStart) group_start;
  decltype(&ncclGroupEnd) group_end;
  decltype(&ncclAllReduce) all_reduce;
  decltype(&ncclReduce) reduce;
  decltype(&ncclReduceScatter) reduce_scatter;
  decltype(&ncclAllGather) all_gather;
  decltype(&ncclBroadcast) broadcast;
};

/// Opened by the first call, from wherever FATHOM_NCCL (the library's path or its folder) says, the dynamic
/// linker finds it, or /usr/local/cuda. NVLink multicast (NVLS) is off unless NCCL_NVLS_ENABLE in the
/// environment says otherwise; connections are made at once (NCCL_RUNTIME_CONNECT=0) likewise. UserError: it
/// is not there, or too old.
const Nccl& nccl();

/// "2.28.9" of 22809, as NCCL counts versions.
std::string nccl_version_text(int version);

}  // namespace fathom::cuda
