// One cell's line of the sweep's table: what it is, what it costs, how it went. The table as CSV is all that
// fit and report read.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace fathom::isoflop {

/// A cell whose FLOPs are further from its budget than this share is drawn and not fitted.
inline constexpr double kFlopsTolerance = 0.01;

struct Row {
  std::string sweep;
  std::string cell;
  std::string role;  // search | grid | near
  std::string family;
  std::string kind;    // none | mod | stochastic | moe | mode_staged | mode_integrated
  std::string status;  // done | failed | running | todo
  std::string reason;  // of a failure; where a running cell runs
  double budget = 0;   // training FLOPs asked for
  std::int64_t width = 0, depth = 0, heads = 0, hidden = 0;
  std::int64_t seed = 0;
  std::optional<double> lr;                                                // peak; none: not decided yet
  std::int64_t params_total = 0, params_active = 0, params_embedding = 0;  // src/flops/flops.h
  double flops_per_token_forward = 0, flops_per_token_train = 0;
  std::int64_t steps = 0, tokens = 0;  // of the whole horizon
  double flops = 0;                    // of these steps
  std::int64_t store_tokens = 0;       // of the training store
  double passes = 0;                   // tokens / store_tokens
  double max_passes = 0;               // the sweep's: a cell above it is not fitted
  // Measured; empty until the cell is done. Losses in nats a token, of the last evaluation.
  std::optional<double> val_loss;      // dense
  std::optional<double> val_topk;      // routed, as trained
  std::optional<double> val_causal;    // routed, as served
  std::optional<double> best_val;      // the lowest evaluation of the run, by the loss that it is judged by
  std::optional<double> seconds;       // of training, without evaluations
  std::optional<double> step_seconds;  // median over the logged steps
  std::optional<double> memory_bytes;  // peak
  std::optional<std::int64_t> resumes;
  std::string device;
  std::string git_sha;
  std::string trained;  // hash of what the config computes: a sweep file that changed is noticed

  bool done() const { return status == "done"; }
  /// The loss that the cell is judged by: val_loss, else val_causal, else val_topk.
  std::optional<double> judged() const { return val_loss ? val_loss : val_causal ? val_causal : val_topk; }

  bool operator==(const Row&) const = default;
};

/// RFC 4180 with a head; numbers are printed so that they read back to the same bits.
std::string to_csv(std::span<const Row> rows);
/// Columns may stand in any order; unknown ones are ignored. UserError with `name` and the line: no CSV of a
/// sweep, a missing column, or a value of the wrong kind.
std::vector<Row> read_csv(std::string_view text, const std::string& name);

/// One line of JSON, with the keys of the CSV; empty values are null.
std::string to_json(const Row& row);
/// A list of the same.
std::string to_json(std::span<const Row> rows);
/// The inverse of to_json. UserError with `name`.
Row row_from_json(std::string_view text, const std::string& name);

}  // namespace fathom::isoflop
