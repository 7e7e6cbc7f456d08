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
  std::int64_t chunk = 0;       // rows of a pass; 0: chunk_for()
  int kv = 0;                   // bits of keys and values; 0: as the model has it

  /// For `requests` of a model.
  EngineOptions options(const Context& c, const Transformer& model, std::size_t requests) const;
};

/// Tokens of a pass where nobody says: as many as keep a device busy.
std::int64_t chunk_for(const Backend& backend);
/// Declares --chunk.
void add_chunk_flag(CLI::App& sub, std::int64_t& chunk);
/// Declares --kv, which is 4, 8 or 16.
void add_kv_flag(CLI::App& sub, int& kv, const char* what);
/// Declares --sequences, --chunk, --cache-gb, --block and --kv.
void add_engine_flags(CLI::App& sub, EngineFlags& flags);

}  // namespace fathom::app
