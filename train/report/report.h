// The report: runs side by side in one self-contained HTML file, and the same numbers as CSV.
#pragma once

#include <filesystem>
#include <span>
#include <string>

namespace fathom {

/// Reads run folders (metrics.jsonl; config.yaml, plan.json and samples.txt or samples.json where present),
/// writes `html` and, beside it, the same name with .csv. UserError: a folder that is no run, an
/// unwritable file, or one that is of another kind or is read here.
void write_report(std::span<const std::filesystem::path> runs, const std::filesystem::path& html);

/// The summary table as one JSON object: {"runs": [{"name", "status", "val_loss", "val_topk", "val_causal",
/// ...}]}.
std::string report_json(std::span<const std::filesystem::path> runs);

/// The summary table for a terminal: a column a run, a line a figure; figures that no run has are left out.
std::string report_text(std::span<const std::filesystem::path> runs);

}  // namespace fathom
