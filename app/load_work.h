// Requests of mixed lengths to measure a model's engine and its server by: the same for both.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "app/command.h"

namespace fathom::app {

struct LoadFlags {
  std::string data;  // a token store
  std::int64_t requests = 256;
  std::int64_t prompt_min = 32, prompt_max = 256;
  std::int64_t new_min = 16, new_max = 128;
  double temperature = 1;
  std::uint64_t seed = 1;
};

struct LoadRequest {
  std::vector<std::int32_t> prompt;
  std::int64_t max_tokens = 0;  // which are all written: the end of a document is no end
  std::uint64_t seed = 0;
};

/// Declares --data, --requests, --prompt-min, --prompt-max, --new-min, --new-max, --temperature and --seed.
void add_load_flags(CLI::App& sub, LoadFlags& flags);
/// A pure function of the flags and the store: pieces of its text from anywhere, lengths from an equal
/// distribution. UsageError: a least length above a greatest. UserError: the store is shorter than a prompt.
std::vector<LoadRequest> load_requests(const LoadFlags& flags);

/// Of this process, on all threads, so far.
double cpu_seconds();
/// The value below which the share `p` of them lies; 0 of none. Sorts.
double percentile(std::vector<double>& values, double p);
/// count, and in milliseconds min_ms, p50_ms, p90_ms, p99_ms, max_ms and mean_ms.
nlohmann::json times_json(std::vector<double>& seconds);

}  // namespace fathom::app
