#include "app/trained_model.h"

#include "app/device.h"

namespace fathom::app {

TrainedModel open_model(const std::string& path, bool invariant, const Globals& globals) {
  TrainedModel model;
  model.loaded = load_model(path, [&](const Config& trained) -> Context& {
    Config config;  // not the device that it was trained on
    config.invariant = invariant || trained.invariant;
    std::shared_ptr<Backend> backend = open_backend(globals, config);
    require_head_dim(*backend, path, trained.model.head_dim());
    model.context = std::make_unique<Context>(std::move(backend), DType::F32);
    return *model.context;
  });
  return model;
}

}  // namespace fathom::app
