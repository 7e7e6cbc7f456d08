// The engine's size, for the commands that run one.
#pragma once

#include <cstdint>

#include <CLI/CLI.hpp>

#include "infer/engine.h"

namespace fathom::app {

struct EngineFlags {
  double cache_gb = 0;  // 0: what the sequences need, as far as the device has it
  std::int64_t block = 64;
  std::int64_t sequences = 64;  // at the same time
  std::int64_t chunk = 512;     // rows of a pass

  /// For `requests` of a model.
  EngineOptions options(const Context& c, const Transformer& model, std::size_t requests) const;
};

/// Declares --sequences, --chunk, --cache-gb and --block.
void add_engine_flags(CLI::App& sub, EngineFlags& flags);

}  // namespace fathom::app
