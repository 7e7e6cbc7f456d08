// The summary table for a terminal.
#include <algorithm>
#include <array>
#include <functional>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "src/core/units.h"
#include "train/report/report.h"
#include "train/report/run_data.h"

namespace fathom {
namespace {

using report::RunData;
using report::RunSummary;

template <typename T, typename F>
std::string cell(const std::optional<T>& value, F&& format) {
  return value ? format(*value) : "-";
}

std::string loss(double v) { return fmt::format("{:.4f}", v); }
std::string count(std::int64_t v) { return format_count(static_cast<double>(v)); }

struct Row {
  const char* title;
  std::string (*text)(const RunSummary&);
};

constexpr std::array kRows{
    Row{"status", [](const RunSummary& s) { return s.status; }},
    Row{"validation loss, as served", [](const RunSummary& s) { return cell(s.val_served, loss); }},
    Row{"  top-k routing", [](const RunSummary& s) { return cell(s.val_topk, loss); }},
    Row{"  causal routing", [](const RunSummary& s) { return cell(s.val_causal, loss); }},
    Row{"  bits per byte", [](const RunSummary& s) { return cell(s.bits_per_byte, loss); }},
    Row{"training FLOPs", [](const RunSummary& s) { return cell(s.flops_total, format_flops); }},
    Row{"FLOPs a token, training",
        [](const RunSummary& s) { return cell(s.flops_per_token_train, format_flops); }},
    Row{"FLOPs a token, forward",
        [](const RunSummary& s) { return cell(s.flops_per_token_forward, format_flops); }},
    Row{"  causal, as realised",
        [](const RunSummary& s) { return cell(s.causal_flops_per_token, format_flops); }},
    Row{"parameters", [](const RunSummary& s) { return cell(s.params_total, count); }},
    Row{"  active a token", [](const RunSummary& s) { return cell(s.params_active, count); }},
    Row{"steps", [](const RunSummary& s) { return cell(s.steps, [](auto v) { return std::to_string(v); }); }},
    Row{"training tokens", [](const RunSummary& s) { return cell(s.tokens, count); }},
    Row{"tokens a second", [](const RunSummary& s) { return cell(s.tokens_per_s, format_count); }},
    Row{"wall-clock", [](const RunSummary& s) { return cell(s.seconds, format_duration); }},
    Row{"capacity C", [](const RunSummary& s) { return cell(s.capacity, format_percent); }},
};

}  // namespace

std::string report_text(std::span<const std::filesystem::path> paths) {
  const std::vector<RunData> runs = report::load_runs(paths);
  std::vector<std::vector<std::string>> table(1, {""});
  for (const RunData& run : runs) table.front().push_back(run.name);
  const auto add = [&](std::string title, const std::function<std::string(const RunSummary&)>& text) {
    std::vector<std::string> cells{std::move(title)};
    for (const RunData& run : runs) cells.push_back(text(run.summary));
    const bool empty = std::all_of(cells.begin() + 1, cells.end(), [](const auto& c) { return c == "-"; });
    if (!empty) table.push_back(std::move(cells));
  };
  for (const Row& row : kRows) add(row.title, row.text);
  std::vector<std::int64_t> layers;  // routed in any run
  for (const RunData& run : runs) {
    layers.insert(layers.end(), run.summary.routed_layers.begin(), run.summary.routed_layers.end());
  }
  std::sort(layers.begin(), layers.end());
  layers.erase(std::unique(layers.begin(), layers.end()), layers.end());
  for (const std::int64_t layer : layers) {
    add(fmt::format("  realised by layer {}", layer), [layer](const RunSummary& s) -> std::string {
      const auto at = std::find(s.routed_layers.begin(), s.routed_layers.end(), layer);
      const auto i = static_cast<std::size_t>(at - s.routed_layers.begin());
      return i < s.realised_capacity.size() ? format_percent(s.realised_capacity[i]) : "-";
    });
  }

  std::string out;
  for (const std::vector<std::string>& cells : table) {
    out += fmt::format("{:<30}", cells[0]);
    for (std::size_t i = 1; i < cells.size(); ++i) {
      const std::size_t width = std::max<std::size_t>(16, table.front()[i].size() + 2);
      out += fmt::format("{:>{}}", cells[i], width);
    }
    out += "\n";
  }
  if (const std::string why = report::why_incomparable(runs); !why.empty()) out += "Warning: " + why + "\n";
  return out;
}

}  // namespace fathom
