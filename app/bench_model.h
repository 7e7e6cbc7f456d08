// The models that benches of training and of decoding measure: the shapes and variants of the PyTorch peer.
#pragma once

#include <cstdint>
#include <string>

#include <CLI/CLI.hpp>

#include "src/config/config.h"

namespace fathom::app {

struct BenchModel {
  std::string preset = "d4";
  std::string variant = "dense";
  std::int64_t vocab = 4096;
  double capacity = 0.125;
  std::int64_t experts = 8;
};

/// Declares --preset, --variant, --vocab, --capacity and --experts.
void add_bench_model_flags(CLI::App& sub, BenchModel& model);

/// Its model and routing, not resolved. UsageError: no such preset or variant.
Config bench_model(const BenchModel& model);

}  // namespace fathom::app
