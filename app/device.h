// Which backend a command runs on.
#pragma once

#include <memory>
#include <string>

#include "app/command.h"
#include "kernels/backend.h"

namespace fathom::app {

/// The backend for --device, or for the config's device when the flag says auto. UserError when it is not
/// there. Warns when `auto` goes on without a GPU although there is a driver for one.
std::shared_ptr<Backend> open_backend(const Globals& globals, const Config& config);

/// A precision, and who asked for it: a key of the config or a flag.
struct PrecisionChoice {
  std::string name;     // "train.precision"
  std::string value;    // "bf16" or "fp32"
  std::string way_out;  // what asks for fp32: "--set train.precision=fp32"
};

/// UsageError when the backend, as opened by open_backend of the same arguments, does not compute in the
/// precision; it says why it is no GPU.
void require_precision(const Backend& backend, const PrecisionChoice& choice, const Globals& globals,
                       const Config& config);
/// UsageError when the backend's attention has no heads of this size. `what` names it: "--head-dim",
/// "model.heads".
void require_head_dim(const Backend& backend, const std::string& what, std::int64_t head_dim);
/// open_backend, require_precision and require_head_dim for a training of this config.
std::shared_ptr<Backend> open_training_backend(const Globals& globals, const Config& config);

/// What a model of this config is computed in on this backend: bf16 on a GPU where it was asked for, else
/// fp32.
DType compute_dtype(const Backend& backend, const Config& config);

/// Bytes of memory that this process may have: the machine's, or less by a control group's limit (in a
/// container); 0 if unknown.
std::int64_t machine_memory();

/// The most memory that this process ever held, in bytes (peak resident set).
std::int64_t peak_resident_bytes();

}  // namespace fathom::app
