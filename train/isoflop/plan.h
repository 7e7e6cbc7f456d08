// What a sweep's cells cost before anything runs, and what became of them: the rows of its table.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "train/isoflop/cells.h"
#include "train/isoflop/row.h"
#include "train/isoflop/sweep_folder.h"

namespace fathom::isoflop {

/// The row of a cell that has not run: status todo. UsageError as config_of.
Row planned_row(const Sweep& sweep, const Cell& cell, const DataSize& data);

/// Fills in what a finished or failed run measured, from its metrics.jsonl. UserError: unreadable.
void measure(Row& row, const std::filesystem::path& run_dir);

/// Every known cell's row: its result where it has ended, else running (with where) or todo. Without a
/// folder, all are todo. UserError: a cell was trained with another config than the sweep says now.
std::vector<Row> rows_of(const Sweep& sweep, const SweepFolder* folder, const DataSize& data);

/// UsageError when a cell passes over the data more often than max_passes allows and allow_repeats is off.
/// One paragraph, with the worst cell and the largest budget that keeps within.
void require_few_passes(const Sweep& sweep, std::span<const Row> rows);

/// FLOP/s by family: of its finished cells, else of all finished cells, else `given`; nothing when unknown.
class Rates {
 public:
  explicit Rates(std::span<const Row> rows, double given = 0);
  std::optional<double> of(const std::string& family) const;

 private:
  std::map<std::string, double> by_family_;
  std::optional<double> overall_;
};

struct PlanSummary {
  std::int64_t cells = 0;         // known now
  std::int64_t more_near = 0;     // further seeds that are not decided yet, at most
  double flops = 0;               // of the known cells
  std::optional<double> seconds;  // of the known cells on one worker; nothing: no rate is known
  double checkpoint_bytes = 0;    // that the folder holds in the end
};
PlanSummary summarise(const Sweep& sweep, std::span<const Row> rows, const Rates& rates,
                      const Decisions& decided);

/// The table of `fathom isoflop plan`, for a terminal.
std::string plan_text(const Sweep& sweep, std::span<const Row> rows, const Rates& rates,
                      const PlanSummary& summary, const DataSize& data);
/// One JSON object: {"sweep", "data_tokens", "vocab", "cells": [...], "cells_total", ...}.
std::string plan_json(const Sweep& sweep, std::span<const Row> rows, const Rates& rates,
                      const PlanSummary& summary, const DataSize& data);

/// The table of `fathom isoflop status`: counts, the cells that are not done, and when the rest will be.
std::string status_text(const Sweep& sweep, const SweepFolder& folder, std::span<const Row> rows,
                        const Decisions& decided);
/// One JSON object: {"sweep", "done", "failed", "running", "todo", "eta_seconds", "cells": [...]}.
std::string status_json(const Sweep& sweep, const SweepFolder& folder, std::span<const Row> rows,
                        const Decisions& decided);

}  // namespace fathom::isoflop
