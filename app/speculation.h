// fathom generate --speculate: its flags, its draft, and one text by speculative decoding.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "app/engine_flags.h"
#include "app/trained_model.h"
#include "infer/speculate/speculation.h"
#include "src/io/tokenizer.h"

namespace fathom::app {

struct SpeculationFlags {
  std::string method;       // empty: none is asked for
  std::string draft;        // "self-skip", "ngram" or a model; empty: what the model can be
  std::int64_t budget = 0;  // 0: 4096, or a quarter of a context that is not four times as long
  std::int64_t chunk = 8;
  std::string proposals = "auto";
  std::int64_t proposals_between = 1;
  std::int64_t sinks = 16;
  std::int64_t window = 256;
  std::string coupling = "ratio";

  bool asked() const { return !method.empty(); }
};

/// Declares what goes with --speculate.
void add_level_flags(CLI::App& sub, SpeculationFlags& flags);
/// And --speculate.
void add_speculation_flags(CLI::App& sub, SpeculationFlags& flags);
/// UsageError: what goes with --speculate was given without it.
void check_speculation_flags(const CLI::App& sub, const SpeculationFlags& flags);

/// A text that is to go on.
struct SpeculativeText {
  const TrainedModel& model;
  Causal rule;
  const Tokenizer* tokenizer;  // null: ids alone
  std::string prompt;          // as text, if it was
  std::vector<std::string> stops;
  Request request;
  EngineFlags engine;
  std::string precision;
};

/// Writes the text, and how the levels fared, as `generate` writes one prompt's.
void generate_by_speculation(const SpeculationFlags& flags, const SpeculativeText& text,
                             const Globals& globals);

/// Of each level what it did, from the first draft to the model.
nlohmann::json levels_json(const SpeculationReport& report);

}  // namespace fathom::app
