// The report: runs side by side in one self-contained HTML file, and the same numbers as CSV.
#pragma once

#include <filesystem>
#include <functional>
#include <span>
#include <string>

namespace fathom {

/// Reads run folders (metrics.jsonl; config.yaml, plan.json and samples.txt or samples.json where present),
/// writes `html` and, beside it, the same name with .csv. UserError: a folder that is no run, an
/// unwritable file, or one that is of another kind or is read here. `section` gives one more part of the
/// page, as HTML, for the runs' names in their order; it is called when all of that is known to be good.
using ReportSection = std::function<std::string(std::span<const std::string> names)>;
void write_report(std::span<const std::filesystem::path> runs, const std::filesystem::path& html,
                  const ReportSection& section = {});

/// The summary table as one JSON object: {"runs": [{"name", "status", "val_loss", "val_topk", "val_causal",
/// ...}]}.
std::string report_json(std::span<const std::filesystem::path> runs);

/// The summary table for a terminal: a column a run, a line a figure; figures that no run has are left out.
std::string report_text(std::span<const std::filesystem::path> runs);

}  // namespace fathom
