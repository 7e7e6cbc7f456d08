// fathom bench speculative: what both kinds of its lines share. A measured line is of a model that was
// trained and of texts that it reads; a composed one of a random model at a preset's shapes, whose proposals
// are taken by chance, with a probability that somebody measured elsewhere: every pass, copy and gathering is
// run and timed, and only what is taken is made up.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "app/bench_decode.h"
#include "app/speculation.h"

namespace fathom::app {

struct SpeculativeBenchFlags {
  DecodeFlags model;  // of composed lines; precision, kv and block of both
  SpeculationFlags levels;
  std::vector<std::string> methods = {"retrieval", "draft", "triforce"};
  std::vector<std::int64_t> contexts = {4096};
  std::int64_t tokens = 512;  // that are timed of each text
  double temperature = 0;
  // Measured
  std::string run;
  std::string text;
  std::int64_t texts = 4;
  // Composed: the share of proposals that is taken, of retrieval by the model, of a draft by the model, and
  // of a draft by retrieval
  std::vector<double> acceptance;
};

void bench_measured(const SpeculativeBenchFlags& flags, const Globals& globals);
void bench_composed(const SpeculativeBenchFlags& flags, const Globals& globals);

/// Adds to a line what the levels did, against `plain_seconds` a token, and prints it.
void print_speculative(nlohmann::json line, const SpeculationReport& report, double plain_seconds,
                       const Globals& globals);

}  // namespace fathom::app
