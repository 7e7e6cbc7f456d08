// Rows of cells: planned, and measured from their runs.
#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/config/names.h"
#include "src/config/print.h"
#include "src/flops/flops.h"
#include "src/io/checksum.h"
#include "train/isoflop/plan.h"
#include "train/metrics/metrics_log.h"

namespace fathom::isoflop {
namespace {

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

std::string kind_of(const Config& c) {
  if (c.routing.kind == RoutingKind::Mod && c.routing.selection == Selection::Stochastic) return "stochastic";
  return name_of(c.routing.kind);
}

// The config as text without what changes neither the model that comes out nor the slice that judges it.
// Tables that are published hold its hash: a key that came later stands in it only where it is not at its
// default.
std::string what_counts(Config c) {
  const Config any;
  c.device = any.device;
  c.data = {.train = "", .valid = "", .tokenizer = "", .document_mask = c.data.document_mask};
  c.train.recompute = any.train.recompute;
  c.train.log_every = any.train.log_every;
  c.train.eval_every = any.train.eval_every;
  c.train.checkpoint_every = any.train.checkpoint_every;
  c.train.keep_checkpoints = any.train.keep_checkpoints;
  std::string text = to_yaml(c);
  if (c.model.rope_scaling == any.model.rope_scaling) {
    const std::size_t begin = text.find("  rope_scaling:\n");
    std::size_t end = text.find('\n', begin) + 1;
    while (text.compare(end, 4, "    ") == 0) end = text.find('\n', end) + 1;
    text.erase(begin, end - begin);
  }
  const auto erase_line = [&text](const char* key) {
    const std::size_t begin = text.find(key);
    text.erase(begin, text.find('\n', begin) + 1 - begin);
  };
  for (const char* of_several_ranks : {"  rank_timeout:", "  reduction:"}) erase_line(of_several_ranks);
  if (c.model.own_head_dim == any.model.own_head_dim) {
    erase_line("  head_dim:");
  }
  return text;
}

void refuse_other_config(const Row& planned, const Row& recorded, const SweepFolder& folder) {
  if (!recorded.done() || planned.trained == recorded.trained) return;
  throw UserError(
      fmt::format("{}: cell {} was trained with another config than the sweep file says now.",
                  folder.result(recorded.cell).string(), recorded.cell),
      "Put the sweep file back, use another --dir, or remove the cell's result and run folder to train it "
      "again.");
}

}  // namespace

Row planned_row(const Sweep& sweep, const Cell& cell, const DataSize& data) {
  const Config c = config_of(sweep, cell, data.vocab);
  const ParameterCount n = count_parameters(c);
  const Horizon horizon = plan_horizon(c);
  Row row;
  row.sweep = sweep.name;
  row.cell = cell.id;
  row.role = name_of(cell.role);
  row.family = cell.family;
  row.kind = kind_of(c);
  row.status = "todo";
  row.budget = cell.budget;
  row.width = c.model.width;
  row.depth = c.model.depth;
  row.heads = c.model.heads;
  row.hidden = c.model.ffn_hidden;
  row.seed = cell.seed;
  row.lr = cell.lr;
  row.params_total = n.total;
  row.params_active = n.active;
  row.params_embedding = n.embedding;
  row.flops_per_token_forward = forward_flops_per_token(c).total();
  row.flops_per_token_train = train_flops_per_token(c).total();
  row.steps = horizon.steps;
  row.tokens = horizon.tokens;
  row.flops = horizon.flops;
  row.store_tokens = data.tokens;
  row.passes = data.tokens > 0 ? static_cast<double>(horizon.tokens) / static_cast<double>(data.tokens) : 0;
  row.max_passes = sweep.max_passes;
  if (cell.lr) {
    row.trained = to_hex(checksum64(std::string_view(what_counts(c))));
  }
  return row;
}

void measure(Row& row, const std::filesystem::path& run_dir) {
  const std::filesystem::path path = run_dir / "metrics.jsonl";
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return;
  const Metrics m = read_metrics(path);
  if (!m.evals.empty()) {
    const EvalRecord& last = m.evals.back();
    row.val_loss = last.val_loss;
    row.val_topk = last.val_topk;
    row.val_causal = last.val_causal;
    for (const EvalRecord& e : m.evals) {
      const double loss = e.judged_loss();
      if (std::isfinite(loss) && (!row.best_val || loss < *row.best_val)) row.best_val = loss;
    }
  }
  std::vector<double> paces;
  const double batch = row.steps > 0 ? static_cast<double>(row.tokens) / static_cast<double>(row.steps) : 0;
  for (const StepRecord& s : m.steps) {
    if (s.tokens_per_s > 0) paces.push_back(batch / s.tokens_per_s);
    if (s.memory_bytes) row.memory_bytes = std::max(row.memory_bytes.value_or(0), *s.memory_bytes);
  }
  if (!paces.empty()) row.step_seconds = median(std::move(paces));
  if (!m.steps.empty()) row.seconds = m.steps.back().seconds;
  std::int64_t begins = 0;
  for (const EventRecord& e : m.events) {
    if (!e.facts) continue;
    ++begins;
    row.device = e.facts->device;
    row.git_sha = e.facts->git_sha;
  }
  if (begins > 0) row.resumes = begins - 1;
}

std::vector<Row> rows_of(const Sweep& sweep, const SweepFolder* folder, const DataSize& data) {
  std::vector<Row> rows;
  const Decisions decided = folder != nullptr ? folder->decisions(sweep) : Decisions{};
  for (const Cell& cell : cells_of(sweep, decided)) {
    Row row = planned_row(sweep, cell, data);
    if (folder != nullptr) {
      if (std::optional<Row> recorded = folder->read_result(cell.id)) {
        refuse_other_config(row, *recorded, *folder);
        recorded->role = row.role;
        recorded->sweep = row.sweep;
        recorded->max_passes = row.max_passes;
        row = std::move(*recorded);
      } else if (const std::optional<Owner> owner = claimed_by(folder->claim(cell.id))) {
        row.status = "running";
        row.reason = owner->text;
      }
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

}  // namespace fathom::isoflop
