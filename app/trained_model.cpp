#include "app/trained_model.h"

#include <fmt/format.h>

#include "app/device.h"
#include "kernels/error.h"

namespace fathom::app {

namespace {

/// `backend_for`: of what was trained.
template <typename BackendFor>
TrainedModel open_by(const std::string& path, const std::string& precision, BackendFor&& backend_for) {
  TrainedModel model;
  model.loaded = load_model(path, [&](const Config& trained) -> Context& {
    std::shared_ptr<Backend> backend = backend_for(trained);
    require_head_dim(*backend, path, trained.model.head_dim());
    const std::string of = precision != "auto" ? precision : backend->is_cpu() ? "fp32" : "bf16";
    model.context = inference_context(std::move(backend), of);
    return *model.context;
  });
  model.loaded.model->parameters().forget_masters(*model.context);
  return model;
}

}  // namespace

TrainedModel open_model(const std::string& path, const BackendOptions& options, const Globals& globals,
                        const std::string& precision) {
  return open_by(path, precision, [&](const Config& trained) {
    Config config;  // not the device that it was trained on
    config.invariant = options.invariant || trained.invariant;
    config.deterministic = options.deterministic;
    if (precision != "auto") config.train.precision = precision;
    return open_backend(globals, config);
  });
}

TrainedModel open_model_beside(std::shared_ptr<Backend> backend, const std::string& path,
                               const std::string& precision) {
  return open_by(path, precision, [&](const Config& /*trained*/) { return std::move(backend); });
}

void require_unquantized(const LoadedModel& loaded, const char* command) {
  const Quantization* q = loaded.model->quantization();
  if (q == nullptr) return;
  if (!q->has_packed_weights() && q->kv == 16) {
    throw UserError(
        fmt::format("{} is rotated and transforms what it computes as it runs ({}): fathom {} takes "
                    "a model before it was rotated.",
                    loaded.checkpoint.string(), q->method, command),
        "Give the run or the model that it was made from.");
  }
  throw UserError(
      fmt::format("{} has {} of {} bits ({}): fathom {} takes a model before it was quantized.",
                  loaded.checkpoint.string(), q->has_packed_weights() ? "weights" : "keys and values",
                  q->has_packed_weights() ? q->bits : q->kv, q->method, command),
      "Give the run or the model that it was made from.");
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

// Of ids that a program made nobody knows the tokenizer: they are taken for those of a model that was trained
// elsewhere, whose tokenizer Fathom may not read either.
void require_same_tokens(const TokenStore& store, const LoadedModel& loaded) {
  const std::string& kind = store.info().tokenizer_kind;
  const CheckpointMeta& meta = loaded.meta;
  const bool is_known = !meta.tokenizer_hash.empty();
  if (is_known && store.tokenizer_hash() == meta.tokenizer_hash) return;
  const bool is_foreign = meta.store_hash.empty();
  if (is_foreign && kind == "external" && store.info().vocab_size <= loaded.config.model.vocab_size) return;
  if (!is_known) {
    throw UserError(
        fmt::format(
            "{} holds {} ids of the kind {}, and Fathom does not read the tokenizer of this model of {} ids.",
            store.path(), store.info().vocab_size, kind, loaded.config.model.vocab_size),
        "Make a store of ids that the model's own tokenizer gave (fathom data prepare FILE.bin).");
  }
  throw UserError(
      fmt::format("{} was made with the tokenizer {} ({}), the model was trained with {} ({}).", store.path(),
                  store.tokenizer_hash(), kind, meta.tokenizer_hash, meta.tokenizer_kind),
      "Prepare the text with the model's tokenizer.");
}

}  // namespace fathom::app
