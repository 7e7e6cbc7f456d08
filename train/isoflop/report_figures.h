// The figures of a sweep's report, each as HTML.
#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

#include "train/isoflop/fit.h"

namespace fathom::isoflop {

/// A colour a family, the same in all figures, in the table's order.
std::map<std::string, int> colours_of(std::span<const Row> rows);

/// A chart a budget: loss against parameters, each family's cells (hollow: drawn and not fitted), parabola
/// and minimum, by the losses that the families are judged by.
std::string isoflop_figures(const Fit& fit, std::span<const Row> rows);
/// N_opt and L_opt against the budget, with the ends of their intervals.
std::string minima_figures(const Fit& fit, std::span<const Row> rows);
/// Loss against training FLOPs and against wall-clock: the cells, and each family's lower envelope.
std::string frontier_figures(const Fit& fit, std::span<const Row> rows);
/// Seconds a step against parameters; passes over the data against parameters.
std::string cost_figures(const Fit& fit, std::span<const Row> rows);

}  // namespace fathom::isoflop
