// A trained model and the device that it computes on, for the commands that use one.
#pragma once

#include <memory>
#include <string>

#include "app/command.h"
#include "src/autograd/context.h"
#include "src/model/checkpoint.h"

namespace fathom::app {

struct TrainedModel {
  std::unique_ptr<Context> context;
  LoadedModel loaded;
};

/// Opens the model of a run folder or a checkpoint file, in fp32, on --device. Row-invariant kernels when the
/// flag or the model's config asks for them.
TrainedModel open_model(const std::string& path, bool invariant, const Globals& globals);

}  // namespace fathom::app
