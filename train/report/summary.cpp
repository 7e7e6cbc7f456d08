// Runs side by side: the table, the sentence above it, and the same figures for programs.
#include <algorithm>
#include <cmath>
#include <functional>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "src/core/units.h"
#include "train/inputs.h"
#include "train/report/csv.h"
#include "train/report/html.h"
#include "train/report/sections.h"

namespace fathom::report {
namespace {

constexpr const char* kNone = "–";
constexpr double kEqualFlops = 0.02;  // relative

using Runs = std::span<const RunData>;

template <typename T>
using Field = std::optional<T> RunSummary::*;

std::string percents(const std::vector<double>& shares) {
  std::string out;
  for (const double s : shares) out += fmt::format("{}{:.1f}", out.empty() ? "" : " · ", 100.0 * s);
  return out.empty() ? kNone : out + " %";
}

template <typename T, typename F>
std::vector<std::string> row(Runs runs, const char* title, Field<T> field, F&& format) {
  std::vector<std::string> out{title};
  for (const RunData& run : runs) {
    const std::optional<T>& value = run.summary.*field;
    out.push_back(value ? format(*value) : kNone);
  }
  return out;
}

std::string loss_text(double v) { return std::isfinite(v) ? fmt::format("{:.4f}", v) : "not finite"; }

// A loss in bold where it is the lowest of all runs.
std::vector<std::string> loss_row(Runs runs, const char* title, Field<double> field) {
  const bool comparable = why_incomparable(runs).empty();
  double best = INFINITY;
  int count = 0;
  for (const RunData& run : runs) {
    const double v = (run.summary.*field).value_or(NAN);
    if (std::isfinite(v)) ++count;
    if (v < best) best = v;
  }
  return row(runs, title, field, [&](double v) {
    return comparable && count > 1 && v == best ? "<span class=\"best\">" + loss_text(v) + "</span>"
                                                : loss_text(v);
  });
}

std::string status_cell(const RunSummary& s) {
  const bool fine = s.status == "done";
  std::string out = fine ? s.status : "<span class=\"warn\">" + escape(s.status) + "</span>";
  const auto note = [&](std::int64_t n, const char* what) {
    if (n > 0) out += fmt::format("<br><small>{} {}{}</small>", n, what, n == 1 ? "" : "s");
  };
  note(s.resumes, "resume");
  note(s.spikes, "loss spike");
  note(s.nans, "NaN step");
  return out;
}

bool any(Runs runs, const std::function<bool(const RunSummary&)>& has) {
  return std::any_of(runs.begin(), runs.end(), [&](const RunData& r) { return has(r.summary); });
}

bool nonzero(Runs runs, Field<double> field) {
  return any(runs, [&](const RunSummary& s) { return (s.*field).value_or(0.0) > 0.0; });
}

}  // namespace

// Facts only: one seed a run is no proof that one architecture is better.
std::string verdict(Runs runs) {
  const std::string incomparable = why_incomparable(runs);
  std::vector<const RunSummary*> judged;
  for (const RunData& r : runs) {
    if (r.summary.val_served && std::isfinite(*r.summary.val_served)) judged.push_back(&r.summary);
  }
  if (judged.size() < 2) return "";
  std::sort(judged.begin(), judged.end(),
            [](const auto* a, const auto* b) { return *a->val_served < *b->val_served; });
  std::string out;
  if (incomparable.empty()) {
    const RunSummary &first = *judged[0], &second = *judged[1];
    const double gap = *second.val_served - *first.val_served;
    out = fmt::format(
        "Lowest validation loss as served: <b>{}</b>, {:.4f} nats a token; {:.4f} ({:.2f} %) below {}. ",
        escape(first.name), *first.val_served, gap, 100.0 * gap / *second.val_served, escape(second.name));
  } else {
    out = "<span class=\"warn\">" + escape(incomparable) + "</span> ";
  }
  double low = INFINITY, high = 0.0, passes = 0.0;
  for (const RunSummary* s : judged) {
    low = std::min(low, s->flops_total.value_or(NAN));
    high = std::max(high, s->flops_total.value_or(NAN));
    passes = std::max(passes, s->passes.value_or(0.0));
  }
  if (high > 0.0 && std::isfinite(low)) {
    const double spread = high / low - 1.0;
    out += spread <= kEqualFlops
               ? fmt::format("Training FLOPs are equal to within {:.2f} %. ", 100.0 * spread)
               : fmt::format(
                     "<span class=\"warn\">Training FLOPs differ by {:.0f} %</span>, so the losses do not "
                     "compare at equal cost. ",
                     100.0 * spread);
  }
  if (passes > kManyPasses) {
    out += fmt::format(
        "<span class=\"warn\">A run made {:.1f} passes over its text</span>, where repeated text is worth "
        "less than fresh text. ",
        passes);
  }
  if (any(runs, [](const RunSummary& s) { return s.status != "done"; })) {
    out += "<span class=\"warn\">Not every run is done.</span> ";
  }
  return "<p class=\"verdict\">" + out + "</p>\n";
}

std::string summary_table(Runs runs) {
  Table t;
  t.head.push_back("Run");
  for (std::size_t i = 0; i < runs.size(); ++i) {
    t.head.push_back(fmt::format("<i class=\"swatch s{}\"></i>{}", i % 8, escape(runs[i].name)));
  }
  const auto count = [](auto v) { return format_count(static_cast<double>(v)); };
  std::vector<std::string> status{"Status"}, steps{"Steps"}, best{"Best validation loss"},
      routed{"Routed layers"}, realised{"Realised capacity by layer"};
  for (const RunData& run : runs) {
    const RunSummary& s = run.summary;
    status.push_back(status_cell(s));
    steps.push_back(
        s.steps ? fmt::format("{}{}", *s.steps, s.total_steps ? fmt::format(" of {}", *s.total_steps) : "")
                : kNone);
    best.push_back(s.best_val
                       ? fmt::format("{}<br><small>at step {}</small>", loss_text(*s.best_val), *s.best_step)
                       : kNone);
    routed.push_back(s.routed_layers.empty() ? kNone : fmt::format("{}", fmt::join(s.routed_layers, " · ")));
    realised.push_back(percents(s.realised_capacity));
  }
  t.rows.push_back(std::move(status));
  t.rows.push_back(std::move(steps));
  t.rows.push_back({"Loss, nats a token"});
  t.rows.push_back(loss_row(runs, "Validation, as served (dense or causal)", &RunSummary::val_served));
  if (any(runs, [](const RunSummary& s) { return s.val_topk.has_value(); })) {
    t.rows.push_back(row(runs, "Validation, top-k routing", &RunSummary::val_topk, loss_text));
    t.rows.push_back(row(runs, "Validation, causal routing", &RunSummary::val_causal, loss_text));
    t.rows.push_back(row(runs, "Gap, causal minus top-k", &RunSummary::gap,
                         [](double v) { return fmt::format("{:+.4f}", v); }));
  }
  if (any(runs, [](const RunSummary& s) { return s.bits_per_byte.has_value(); })) {
    t.rows.push_back(row(runs, "Validation, bits per byte", &RunSummary::bits_per_byte, loss_text));
  }
  t.rows.push_back(std::move(best));
  t.rows.push_back(row(runs, "Training, mean of the last 5 %", &RunSummary::train_loss, loss_text));
  t.rows.push_back({"Cost"});
  t.rows.push_back(row(runs, "Training FLOPs in all", &RunSummary::flops_total, format_flops));
  t.rows.push_back(row(runs, "FLOPs a token, training", &RunSummary::flops_per_token_train, format_flops));
  t.rows.push_back(row(runs, "FLOPs a token, forward", &RunSummary::flops_per_token_forward, format_flops));
  if (nonzero(runs, &RunSummary::causal_flops_per_token)) {
    t.rows.push_back(
        row(runs, "FLOPs a token, forward, causal", &RunSummary::causal_flops_per_token, format_flops));
  }
  t.rows.push_back(row(runs, "Training tokens", &RunSummary::tokens, count));
  t.rows.push_back(row(runs, "Passes over the text", &RunSummary::passes, [](double v) {
    const std::string text = fmt::format("{:.2f}", v);
    return v > kManyPasses ? "<span class=\"warn\">" + text + "</span>" : text;
  }));
  t.rows.push_back(row(runs, "Wall-clock of training", &RunSummary::seconds, format_duration));
  t.rows.push_back(row(runs, "Throughput, median", &RunSummary::tokens_per_s,
                       [](double v) { return format_count(v) + " tok/s"; }));
  t.rows.push_back(row(runs, "Compute rate, median", &RunSummary::flops_per_s, format_rate));
  if (nonzero(runs, &RunSummary::mfu))
    t.rows.push_back(row(runs, "Share of the peak (MFU)", &RunSummary::mfu, format_percent));
  if (nonzero(runs, &RunSummary::memory_bytes))
    t.rows.push_back(row(runs, "Peak memory", &RunSummary::memory_bytes, format_bytes));
  t.rows.push_back({"Model"});
  t.rows.push_back(row(runs, "Parameters", &RunSummary::params_total, count));
  t.rows.push_back(row(runs, "Parameters, active", &RunSummary::params_active, count));
  t.rows.push_back(
      row(runs, "Blocks", &RunSummary::depth, [](std::int64_t v) { return fmt::format("{}", v); }));
  if (any(runs, [](const RunSummary& s) { return !s.routed_layers.empty(); })) {
    t.rows.push_back(std::move(routed));
    t.rows.push_back(row(runs, "Capacity C", &RunSummary::capacity, format_percent));
    t.rows.push_back(std::move(realised));
    t.rows.push_back(row(runs, "Causal decision: recall", &RunSummary::router_recall, format_percent));
    t.rows.push_back(row(runs, "Causal decision: precision", &RunSummary::router_precision, format_percent));
  }
  return render(t);
}

namespace {

using Json = nlohmann::ordered_json;

template <typename T>
Json value_of(const std::optional<T>& value) {
  return value ? Json(*value) : Json(nullptr);
}

Json to_json(const RunSummary& s) {
  return {{"name", s.name},
          {"status", s.status},
          {"steps", value_of(s.steps)},
          {"total_steps", value_of(s.total_steps)},
          {"tokens", value_of(s.tokens)},
          {"val_served", value_of(s.val_served)},
          {"val_topk", value_of(s.val_topk)},
          {"val_causal", value_of(s.val_causal)},
          {"gap", value_of(s.gap)},
          {"bits_per_byte", value_of(s.bits_per_byte)},
          {"best_val", value_of(s.best_val)},
          {"best_step", value_of(s.best_step)},
          {"train_loss", value_of(s.train_loss)},
          {"flops_total", value_of(s.flops_total)},
          {"flops_per_token_train", value_of(s.flops_per_token_train)},
          {"flops_per_token_forward", value_of(s.flops_per_token_forward)},
          {"causal_flops_per_token", value_of(s.causal_flops_per_token)},
          {"passes", value_of(s.passes)},
          {"seconds", value_of(s.seconds)},
          {"tokens_per_s", value_of(s.tokens_per_s)},
          {"flops_per_s", value_of(s.flops_per_s)},
          {"mfu", value_of(s.mfu)},
          {"memory_bytes", value_of(s.memory_bytes)},
          {"params_total", value_of(s.params_total)},
          {"params_active", value_of(s.params_active)},
          {"depth", value_of(s.depth)},
          {"capacity", value_of(s.capacity)},
          {"routed_layers", s.routed_layers},
          {"realised_capacity", s.realised_capacity},
          {"router_recall", value_of(s.router_recall)},
          {"router_precision", value_of(s.router_precision)},
          {"resumes", s.resumes},
          {"spikes", s.spikes},
          {"nans", s.nans},
          {"tokenizer_hash", s.tokenizer_hash},
          {"valid_source_hash", s.valid_source_hash},
          {"seed", value_of(s.seed)},
          {"device", s.device},
          {"git_sha", s.git_sha}};
}

std::string csv_value(const Json& value) {
  std::string text;
  if (value.is_null()) return text;
  if (value.is_array()) {
    for (const Json& v : value) text += (text.empty() ? "" : " ") + v.dump();
  } else {
    text = value.is_string() ? value.get<std::string>() : value.dump();
  }
  return csv_cell(text);
}

}  // namespace

std::string summary_json(Runs runs) {
  Json list = Json::array();
  for (const RunData& run : runs) list.push_back(to_json(run.summary));
  Json out{{"runs", list}};
  if (const std::string why = why_incomparable(runs); !why.empty()) out["warning"] = why;
  return out.dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string summary_csv(Runs runs) {
  std::string out;
  const auto line = [&](const std::vector<std::string>& cells) {
    out += fmt::format("{}\r\n", fmt::join(cells, ","));
  };
  std::vector<std::string> head;
  const Json keys = to_json(RunSummary{});
  for (const auto& [key, value] : keys.items()) head.push_back(key);
  line(head);
  for (const RunData& run : runs) {
    std::vector<std::string> cells;
    const Json figures = to_json(run.summary);
    for (const auto& [key, value] : figures.items()) cells.push_back(csv_value(value));
    line(cells);
  }
  return out;
}

}  // namespace fathom::report
