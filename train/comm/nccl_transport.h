// Collectives between NVIDIA's GPUs by NCCL, on a stream of their own: it waits for what the backend's stream
// had been given, and the backend's waits for it in finish(), so that between the two they run beside the
// backend's own work. All of that can be captured (kernels/capture.h). Only in builds with NCCL's header.
#pragma once

#include <memory>

#include "kernels/backend.h"
#include "train/comm/communicator.h"
#include "train/comm/device_transport.h"

namespace fathom {

/// A collective of `ranks`, each with a CUDA backend of a GPU of its own. UserError: NCCL is not there, is of
/// another version than rank 0's, or cannot connect the GPUs, or has not within kRankPatience times `timeout`
/// seconds. RankError: another rank is lost meanwhile.
std::unique_ptr<DeviceTransport> make_nccl_transport(Communicator& ranks, std::shared_ptr<Backend> backend,
                                                     double timeout = kRankTimeout);

}  // namespace fathom
