// What a report knows of one run: its records, the texts beside them, and the figures that sum it up.
#pragma once

#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "train/metrics/metrics_log.h"

namespace fathom::report {

/// One row of the summary. What a run did not record is empty.
struct RunSummary {
  std::string name;
  std::string status;  // done | stopped | failed | unfinished
  std::optional<std::int64_t> steps, total_steps, tokens;
  std::optional<double> val_served;                 // the last evaluation's loss: dense, or causal
  std::optional<double> val_topk, val_causal, gap;  // gap: causal minus top-k
  std::optional<double> bits_per_byte;              // of val_served
  std::optional<double> best_val;
  std::optional<std::int64_t> best_step;
  std::optional<double> train_loss;  // mean over the last twentieth of the records
  std::optional<double> flops_total, flops_per_token_train, flops_per_token_forward, causal_flops_per_token;
  std::optional<std::int64_t> params_total, params_active, depth;
  std::optional<double> capacity;  // C
  std::vector<std::int64_t> routed_layers;
  std::vector<double> realised_capacity;  // by routed layer
  std::optional<double> router_recall, router_precision;
  std::optional<double> passes;                          // over the training text
  std::optional<double> tokens_per_s, flops_per_s, mfu;  // medians over the records
  std::optional<double> seconds, memory_bytes;
  std::int64_t resumes = 0, spikes = 0, nans = 0;
  std::string tokenizer_hash, valid_source_hash;  // empty: not recorded
  std::string device, git_sha;
  std::optional<std::uint64_t> seed;
};

struct Sample {
  std::string prompt;  // may be empty
  std::string text;
};

struct RunData {
  std::filesystem::path path;
  std::string name;
  Metrics metrics;
  std::string config;  // config.yaml as it is; empty: none
  std::vector<Sample> samples;
  std::vector<std::pair<std::string, double>> breakdown;  // of plan.json: FLOPs by term
  RunSummary summary;
};

/// Loads run folders; names are the folders' names, made longer until they differ.
/// UserError: a folder that is no run, or unreadable metrics.
std::vector<RunData> load_runs(std::span<const std::filesystem::path> paths);

/// Why the runs' losses do not compare as they stand, in a sentence or two: another tokenizer (nats a token
/// are then of another unit), or another validation text. Empty when no two runs are known to differ.
std::string why_incomparable(std::span<const RunData> runs);

/// The mean of y over a centred window of `window` points; NaN stays NaN and is left out of its neighbours'
/// means.
std::vector<double> smooth(const std::vector<double>& y, std::size_t window);

}  // namespace fathom::report
