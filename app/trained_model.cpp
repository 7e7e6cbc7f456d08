#include "app/trained_model.h"

#include "app/device.h"

namespace fathom::app {

TrainedModel open_model(const std::string& path, bool invariant, const Globals& globals,
                        const std::string& precision) {
  TrainedModel model;
  model.loaded = load_model(path, [&](const Config& trained) -> Context& {
    Config config;  // not the device that it was trained on
    config.invariant = invariant || trained.invariant;
    std::shared_ptr<Backend> backend = open_backend(globals, config);
    require_head_dim(*backend, path, trained.model.head_dim());
    config.train.precision = precision != "auto" ? precision : backend->is_cpu() ? "fp32" : "bf16";
    require_precision(*backend, {"--precision", config.train.precision, "--precision fp32"}, globals, config);
    const DType dtype = compute_dtype(*backend, config);
    model.context = std::make_unique<Context>(std::move(backend), dtype);
    return *model.context;
  });
  return model;
}

void add_precision_flag(CLI::App& sub, std::string& precision, const char* what) {
  sub.add_option("--precision", precision, what)
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "bf16", "fp32"}));
}

}  // namespace fathom::app
