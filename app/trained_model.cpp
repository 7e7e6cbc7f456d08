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
    model.context = inference_context(std::move(backend), config.train.precision);
    return *model.context;
  });
  model.loaded.model->parameters().forget_masters(*model.context);
  return model;
}

std::unique_ptr<Context> inference_context(std::shared_ptr<Backend> backend, const std::string& precision) {
  const DType weights = precision == "bf16" ? DType::BF16 : DType::F32;
  const DType compute = backend->is_cpu() ? DType::F32 : weights;
  return std::make_unique<Context>(std::move(backend), compute, weights);
}

void add_precision_flag(CLI::App& sub, std::string& precision, const char* what) {
  sub.add_option("--precision", precision, what)
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "bf16", "fp32"}));
}

}  // namespace fathom::app
