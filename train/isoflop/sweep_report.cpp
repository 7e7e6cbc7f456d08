#include "train/isoflop/sweep_report.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/config/scalar.h"
#include "src/core/units.h"
#include "src/io/atomic_file.h"
#include "train/isoflop/compare.h"
#include "train/isoflop/report_figures.h"
#include "train/report/html.h"

namespace fathom::isoflop {
namespace {

using report::escape;
using report::Table;

constexpr const char* kNone = "–";

template <typename Format>
std::string cell(const Estimate& e, const Format& format) {
  if (!std::isfinite(e.value)) return kNone;
  std::string text = format(e.value);
  if (e.interval)
    text += fmt::format("<br><small>{} to {}</small>", format(e.interval->low), format(e.interval->high));
  return text;
}

std::string loss(double x) { return fmt::format("{:.4f}", x); }
std::string exponent(double x) { return fmt::format("{:.3f}", x); }
std::string warn(const std::string& text) { return "<span class=\"warn\">" + text + "</span>"; }

// `html` may take several lines.
std::string wrapped(const std::string& html) { return "<span class=\"prose\">" + html + "</span>"; }
std::string prose(const std::string& text) { return wrapped(escape(text)); }

// A claim, and below it each family that it is about.
std::string claims_table(std::span<const PaperClaim> claims) {
  Table t{.head = {"family", "verdict", prose("our figure"), prose("why")}, .rows = {}};
  std::vector<std::string> said;
  for (const PaperClaim& first : claims) {
    if (std::ranges::find(said, first.claim) != said.end()) continue;
    said.push_back(first.claim);
    t.rows.push_back({escape(first.claim)});
    for (const PaperClaim& c : claims) {
      if (c.claim != first.claim) continue;
      const char* const cls = c.verdict == Verdict::Held      ? "best"
                              : c.verdict == Verdict::NotHeld ? "warn"
                                                              : "sub";
      t.rows.push_back({escape(c.family.empty() ? kNone : c.family),
                        fmt::format("<span class=\"{}\">{}</span>", cls, name_of(c.verdict)),
                        prose(c.figure.empty() ? kNone : c.figure), prose(c.why)});
    }
  }
  return "<h2>The paper's claims</h2>\n" + render(t);
}

std::string minima_table(const Fit& fit) {
  Table t{.head = {"Minimum", "loss", "budget", "cells", "N_opt", "L_opt", "flags"}, .rows = {}};
  for (const Curve& c : fit.curves) {
    const auto fitted = std::count_if(c.cells.begin(), c.cells.end(),
                                      [](const CurveCell& one) { return one.left_out.empty(); });
    std::string flags;
    for (const std::string& flag : c.flags) flags += (flags.empty() ? "" : "<br>") + warn(escape(flag));
    t.rows.push_back({escape(c.family), c.measure, print_number(c.budget),
                      fmt::format("{} of {}", fitted, c.cells.size()),
                      c.minimum ? cell(c.minimum->n, format_count) : kNone,
                      c.minimum ? cell(c.minimum->loss, loss) : kNone, wrapped(flags)});
  }
  return "<h2>Minima</h2>\n" + render(t);
}

std::string laws_table(const Fit& fit) {
  std::string out;
  if (!fit.power_laws.empty()) {
    Table t{.head = {"N_opt ~ C^a, L_opt ~ C^-b", "loss", "budgets", "a", "b"}, .rows = {}};
    for (const PowerLaw& p : fit.power_laws)
      t.rows.push_back({escape(p.family), p.measure, std::to_string(p.budgets), cell(p.n_exponent, exponent),
                        cell(p.loss_exponent, exponent)});
    out += "<h2>Power laws through the minima</h2>\n" + render(t);
  }
  if (!fit.surfaces.empty()) {
    Table t{.head = {"L = E + A / N^alpha + B / D^beta", "loss", "cells", "E", "alpha", "beta", "N_opt ~ C^",
                     "rms"},
            .rows = {}};
    for (const SurfaceFit& s : fit.surfaces)
      t.rows.push_back(
          {escape(s.family) + (s.surface.at_limit ? "<br>" + warn("not determined by these cells") : ""),
           s.measure, std::to_string(s.cells), cell(s.e, exponent), cell(s.alpha, exponent),
           cell(s.beta, exponent), cell(s.n_exponent, exponent), loss(s.surface.rms)});
    out += "<h2>Surfaces over all fitted cells</h2>\n" + render(t);
  }
  return out;
}

// Each family's step at its minimum beside the first family's at its own.
std::string step_table(const Fit& fit, std::span<const Row> rows) {
  Table t{.head = {"At the minimum", "budget", "seconds a step", "of the first family's", "FLOPs a step",
                   "of the first family's"},
          .rows = {}};
  const Curve* first = nullptr;
  for (const Curve& c : fit.curves) {
    if (!c.judged || !c.minimum) continue;
    if (first == nullptr) first = &c;
    const auto at = [&](const Curve& curve, const std::function<std::optional<double>(const Row&)>& of) {
      return along(curve, rows, std::log10(curve.minimum->n.value), of);
    };
    const auto seconds = comparable_steps(rows);
    const auto flops = [](const Row& r) {
      return std::optional<double>(r.flops / static_cast<double>(r.steps));
    };
    const Curve* const base = fit.find(first->family, first->measure, c.budget);
    const auto ratio = [&](const auto& of) -> std::string {
      const auto own = at(c, of);
      const auto other = base != nullptr && base->minimum ? at(*base, of) : std::nullopt;
      return own && other ? fmt::format("{:.2f}x", *own / *other) : kNone;
    };
    const auto own_seconds = at(c, seconds), own_flops = at(c, flops);
    t.rows.push_back({escape(c.family), print_number(c.budget),
                      own_seconds ? fmt::format("{:.4g}", *own_seconds) : kNone, ratio(seconds),
                      own_flops ? format_flops(*own_flops) : kNone, ratio(flops)});
  }
  return "<h2>Steps</h2>\n" + render(t);
}

// The best rate of each family's search; one at the end of the rates tried may not be the best there is.
std::string search_table(std::span<const Row> rows) {
  struct Tried {
    const Row* best = nullptr;
    double low = INFINITY, high = 0;
  };
  std::map<std::string, Tried> families;
  for (const Row& r : rows) {
    if (r.role != "search" || !r.lr || !r.done() || !r.judged()) continue;
    Tried& t = families[r.family];
    t.low = std::min(t.low, *r.lr);
    t.high = std::max(t.high, *r.lr);
    if (t.best == nullptr || *r.judged() < *t.best->judged()) t.best = &r;
  }
  Table t{.head = {"Search", "shape", "learning rate", "loss", "status"}, .rows = {}};
  for (const Row& r : rows) {
    if (r.role != "search") continue;
    const Tried& tried = families[r.family];
    std::string note = escape(r.status);
    if (tried.best == &r) {
      const bool at_end = *r.lr == tried.low || *r.lr == tried.high;
      note = at_end ? warn("chosen, at the end of the rates tried") : "chosen";
    }
    t.rows.push_back({escape(r.family), fmt::format("{}x{}", r.width, r.depth),
                      r.lr ? print_number(*r.lr) : kNone, r.judged() ? loss(*r.judged()) : kNone, note});
  }
  return t.rows.empty() ? "" : "<h2>Search of the learning rate</h2>\n" + render(t);
}

std::string cells_table(std::span<const Row> rows, const Fit& fit) {
  std::map<std::size_t, std::string> left_out;
  for (const Curve& c : fit.curves) {
    for (const CurveCell& one : c.cells) left_out[one.row] = one.left_out;
  }
  Table t{.head = {"Cell", "status", "width x depth", "heads", "parameters", "active", "FLOPs", "steps",
                   "tokens", "passes", "lr", "loss", "top-k", "seconds", "s/step", "note"},
          .rows = {}};
  const auto count = [](std::int64_t n) { return format_count(static_cast<double>(n)); };
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Row& r = rows[i];
    std::string note = escape(r.reason);
    if (!left_out[i].empty()) note += "not fitted: " + escape(left_out[i]);
    t.rows.push_back({escape(r.cell), r.done() ? "done" : warn(escape(r.status)),
                      fmt::format("{}x{}", r.width, r.depth), std::to_string(r.heads), count(r.params_total),
                      count(r.params_active), fmt::format("{:.4g}", r.flops), std::to_string(r.steps),
                      count(r.tokens), fmt::format("{:.2f}", r.passes),
                      r.lr ? fmt::format("{:.3g}", *r.lr) : kNone, r.judged() ? loss(*r.judged()) : kNone,
                      r.val_topk ? loss(*r.val_topk) : kNone,
                      r.seconds ? fmt::format("{:.1f}", *r.seconds) : kNone,
                      r.step_seconds ? fmt::format("{:.4g}", *r.step_seconds) : kNone, note});
  }
  return "<details><summary>All " + std::to_string(rows.size()) + " cells</summary>\n" + render(t) +
         "</details>\n";
}

std::string summary_of(std::span<const Row> rows, const Fit& fit) {
  const auto with = [&](std::string_view status) {
    return std::count_if(rows.begin(), rows.end(), [&](const Row& r) { return r.status == status; });
  };
  std::string text = fmt::format("{} cells done", with("done"));
  for (const char* status : {"failed", "running", "todo"}) {
    if (const auto n = with(status); n > 0) text += ", " + warn(fmt::format("{} {}", n, status));
  }
  double passes = 0;
  for (const Row& r : rows) passes = std::max(passes, r.passes);
  text += fmt::format(". At most {:.2f} passes over {} tokens of training text. ", passes,
                      with_commas(rows.empty() ? 0 : rows.front().store_tokens));
  text +=
      fit.noise_freedom > 0
          ? fmt::format("Noise of a cell: {:.4f} nats a token ({} degrees of freedom); intervals hold {}.",
                        fit.noise, fit.noise_freedom, format_percent(fit.options.level))
          : warn("No intervals: every parabola meets its cells exactly.");
  return "<p class=\"verdict\">" + text + "</p>\n";
}

}  // namespace

std::string sweep_page(std::span<const Row> rows, const Fit& fit, std::span<const PaperClaim> claims) {
  const std::string name = rows.empty() ? "" : rows.front().sweep;
  const std::string title = "IsoFLOP sweep " + name;
  std::string body = "<header>\n<h1>" + escape(title) + "</h1>\n" + summary_of(rows, fit) + "</header>\n";
  body += claims_table(claims);
  body += "<h2>IsoFLOP curves</h2>\n<div class=\"charts\">\n" + isoflop_figures(fit, rows) + "</div>\n";
  body += minima_table(fit) + "<div class=\"charts\">\n" + minima_figures(fit, rows) + "</div>\n";
  body += laws_table(fit);
  body += "<h2>Frontiers and cost</h2>\n<div class=\"charts\">\n" + frontier_figures(fit, rows) +
          cost_figures(fit, rows) + "</div>\n";
  body += step_table(fit, rows) + search_table(rows) + cells_table(rows, fit);
  body +=
      "<footer>Losses are in nats a token on one fixed validation slice; a family with a causal rule is "
      "judged "
      "by it, as it would be served. A FLOP count takes a multiply-add as two. fathom isoflop report "
      "--from-csv makes this page again from the CSV beside it.</footer>\n";
  return report::page(title, body);
}

Fit write_sweep_report(std::span<const Row> rows, const FitOptions& options,
                       const std::filesystem::path& html) {
  std::filesystem::path csv = html;
  csv.replace_extension(".csv");
  if (csv == html)
    throw UsageError(fmt::format("the report {} would be overwritten by its own CSV file.", html.string()),
                     "Give a name that ends in .html.");
  Fit fit = fit_rows(rows, options);
  write_file(html.string(), sweep_page(rows, fit, test_claims(fit, rows)));
  write_file(csv.string(), to_csv(rows));
  return fit;
}

}  // namespace fathom::isoflop
