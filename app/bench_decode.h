// How `bench decode` brings texts to a context, and times their next tokens.
#pragma once

#include <cstdint>
#include <vector>

#include "app/bench_engine.h"

namespace fathom::app {

struct DecodeFlags : EngineBenchFlags {
  std::int64_t steps = 64;
  bool random_cache = false;
};

/// Tokens that each text has to have room for behind the context.
std::int64_t new_tokens(const DecodeFlags& flags);
/// A random model for such texts, whose routers keep the capacity at the end of the context.
EngineBench prepare_decode(const DecodeFlags& flags, const Globals& globals, std::int64_t more = 0);

struct DecodeTimes {
  double seconds = 0;     // of a step, the median
  EngineStats during;     // rows and routed rows of the steps alone
  bool is_whole = false;  // steps of one launch
};
/// Steps of --batch texts that have their context. Of a routed model, the routers come to the capacity first.
DecodeTimes time_decode(Engine& engine, const EngineBench& s, const DecodeFlags& flags);

double median(std::vector<double> values);

}  // namespace fathom::app
