// The fits as tables for a terminal and as JSON.
#include <algorithm>
#include <cmath>
#include <iterator>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "src/core/units.h"
#include "train/isoflop/fit.h"

namespace fathom::isoflop {
namespace {

using Json = nlohmann::ordered_json;

template <typename Format>
std::string text_of(const Estimate& e, const Format& format) {
  if (!e.interval) return format(e.value);
  return fmt::format("{} [{}, {}]", format(e.value), format(e.interval->low), format(e.interval->high));
}

std::string loss(double x) { return fmt::format("{:.4f}", x); }
std::string exponent(double x) { return fmt::format("{:.3f}", x); }

Json number(double x) { return std::isfinite(x) ? Json(x) : Json(nullptr); }
Json json_of(const Estimate& e) {
  return {{"value", number(e.value)},
          {"low", e.interval ? number(e.interval->low) : Json(nullptr)},
          {"high", e.interval ? number(e.interval->high) : Json(nullptr)}};
}

Json json_of(const Curve& c, std::span<const Row> rows) {
  Json cells = Json::array();
  for (const CurveCell& cell : c.cells)
    cells.push_back(
        {{"cell", rows[cell.row].cell}, {"n", cell.n}, {"loss", cell.loss}, {"left_out", cell.left_out}});
  Json j{{"family", c.family}, {"kind", c.kind},     {"measure", c.measure},
         {"judged", c.judged}, {"budget", c.budget}, {"cells", std::move(cells)}};
  j["parabola"] = nullptr;
  if (c.parabola) {
    const Parabola& p = *c.parabola;
    j["parabola"] = {{"x0", p.x0}, {"c0", p.c0}, {"c1", p.c1}, {"c2", p.c2}};
  }
  j["minimum"] = nullptr;
  if (c.minimum)
    j["minimum"] = {
        {"n", json_of(c.minimum->n)}, {"loss", json_of(c.minimum->loss)}, {"usable", c.minimum->usable}};
  j["flags"] = c.flags;
  return j;
}

void add_curves(const Fit& fit, std::span<const Row> rows, std::string& text) {
  const auto out = std::back_inserter(text);
  fmt::format_to(out, "Minima over log10 of {} parameters without the embedding table\n\n",
                 name_of(fit.options.size));
  fmt::format_to(out, "{:<16} {:<10} {:>9} {:>6}  {:<28} {:<26}\n", "family", "loss", "budget", "cells",
                 "N_opt", "L_opt");
  for (const Curve& c : fit.curves) {
    const auto fitted = std::count_if(c.cells.begin(), c.cells.end(),
                                      [](const CurveCell& cell) { return cell.left_out.empty(); });
    fmt::format_to(out, "{:<16} {:<10} {:>9.3g} {:>6}  {:<28} {:<26}\n", c.family, c.measure, c.budget,
                   fitted, c.minimum ? text_of(c.minimum->n, format_count) : "-",
                   c.minimum ? text_of(c.minimum->loss, loss) : "-");
    for (const std::string& flag : c.flags) fmt::format_to(out, "  ! {}\n", flag);
    for (const CurveCell& cell : c.cells) {
      if (!cell.left_out.empty() && c.judged)
        fmt::format_to(out, "  ! {} is not fitted: {}\n", rows[cell.row].cell, cell.left_out);
    }
  }
}

}  // namespace

std::string fit_text(const Fit& fit, std::span<const Row> rows) {
  std::string text;
  const auto out = std::back_inserter(text);
  add_curves(fit, rows, text);
  if (fit.noise_freedom > 0) {
    fmt::format_to(
        out,
        "\nNoise of a cell: {:.4f} nats ({} degrees of freedom). Intervals hold {} and come from {} "
        "replicates.\n",
        fit.noise, fit.noise_freedom, format_percent(fit.options.level), fit.options.replicates);
  } else {
    text += "\nNo intervals: every parabola meets its cells exactly. More sizes or seeds tell the noise.\n";
  }
  if (!fit.power_laws.empty()) text += "\nPower laws through the minima: N_opt ~ C^a, L_opt ~ C^-b\n";
  for (const PowerLaw& p : fit.power_laws) {
    fmt::format_to(out, "{:<16} {:<10} a = {}, b = {} ({} budgets)\n", p.family, p.measure,
                   text_of(p.n_exponent, exponent), text_of(p.loss_exponent, exponent), p.budgets);
  }
  if (!fit.surfaces.empty()) text += "\nSurfaces L = E + A / N^alpha + B / D^beta over all fitted cells\n";
  for (const SurfaceFit& s : fit.surfaces) {
    fmt::format_to(
        out, "{:<16} {:<10} E = {}, alpha = {}, beta = {}, so N_opt ~ C^{} ({} cells, rms {:.4f}){}\n",
        s.family, s.measure, text_of(s.e, exponent), text_of(s.alpha, exponent), text_of(s.beta, exponent),
        text_of(s.n_exponent, exponent), s.cells, s.surface.rms,
        s.surface.at_limit ? "\n  ! the cells do not determine it: a parameter is at its limit" : "");
  }
  return text;
}

std::string fit_json(const Fit& fit, std::span<const Row> rows) {
  Json curves = Json::array(), laws = Json::array(), surfaces = Json::array();
  for (const Curve& c : fit.curves) curves.push_back(json_of(c, rows));
  for (const PowerLaw& p : fit.power_laws)
    laws.push_back({{"family", p.family},
                    {"measure", p.measure},
                    {"budgets", p.budgets},
                    {"n_exponent", json_of(p.n_exponent)},
                    {"loss_exponent", json_of(p.loss_exponent)}});
  for (const SurfaceFit& s : fit.surfaces)
    surfaces.push_back({{"family", s.family},
                        {"measure", s.measure},
                        {"cells", s.cells},
                        {"e", json_of(s.e)},
                        {"a", s.surface.a},
                        {"b", s.surface.b},
                        {"alpha", json_of(s.alpha)},
                        {"beta", json_of(s.beta)},
                        {"n_exponent", json_of(s.n_exponent)},
                        {"loss_exponent", json_of(s.loss_exponent)},
                        {"rms", s.surface.rms},
                        {"at_limit", s.surface.at_limit}});
  return Json{{"size", name_of(fit.options.size)},    {"level", fit.options.level},
              {"replicates", fit.options.replicates}, {"noise", fit.noise},
              {"noise_freedom", fit.noise_freedom},   {"curves", std::move(curves)},
              {"power_laws", std::move(laws)},        {"surfaces", std::move(surfaces)}}
      .dump();
}

}  // namespace fathom::isoflop
