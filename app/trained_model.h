// A trained model and the device that it computes on, for the commands that use one.
#pragma once

#include <memory>
#include <string>

#include "app/command.h"
#include "src/autograd/context.h"
#include "src/io/token_store.h"
#include "src/model/checkpoint.h"

namespace fathom::app {

struct TrainedModel {
  std::unique_ptr<Context> context;
  LoadedModel loaded;
};

/// Opens the model of a run folder or a checkpoint file, on --device. Row-invariant kernels when `options` or
/// the model's config asks for them. `precision`: fp32, bf16 (UsageError on the CPU), or auto: bf16 on a GPU,
/// whose engine is made for it, and fp32 on the CPU.
TrainedModel open_model(const std::string& path, const BackendOptions& options, const Globals& globals,
                        const std::string& precision = "fp32");
/// The same where another model computes already, by its options: what both make on a device can be put
/// together there.
TrainedModel open_model_beside(std::shared_ptr<Backend> backend, const std::string& path,
                               const std::string& precision);
/// fp32, or bf16: on a GPU all of it, on the CPU the weights of products and lookups, computed with in fp32.
std::unique_ptr<Context> inference_context(std::shared_ptr<Backend> backend, const std::string& precision);
/// UserError: the weights are of few bits, of which `command` makes nothing.
void require_unquantized(const LoadedModel& loaded, const char* command);
/// UserError: the store's ids are not those of the model's tokenizer.
void require_same_tokens(const TokenStore& store, const LoadedModel& loaded);
/// --precision, of commands that compute with a trained model.
void add_precision_flag(CLI::App& sub, std::string& precision, const char* what);

}  // namespace fathom::app
