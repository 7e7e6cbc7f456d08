// The devices of the ranks of a training: each has one GPU of its own, or all compute on the CPU.
#pragma once

#include <memory>

#include "app/command.h"
#include "kernels/backend.h"
#include "train/comm/communicator.h"

namespace fathom::app {

/// A rank and its backend.
struct RankOnDevice {
  std::shared_ptr<Backend> backend;
  std::shared_ptr<Communicator> ranks;  // whose collectives on the backend's memory work
};

/// open_training_backend for one of the ranks; under `auto` on the CPU where none of their GPUs can be used.
/// A collective. UserError: more ranks than GPUs, GPUs here and none there, or no way in which GPUs could
/// train together.
RankOnDevice open_rank(const std::shared_ptr<Communicator>& ranks, const Globals& globals,
                       const Config& config);

/// UserError: this machine does not show so many GPUs.
void require_gpus(int number);

}  // namespace fathom::app
