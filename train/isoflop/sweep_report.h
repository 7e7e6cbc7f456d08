// A sweep's report: one self-contained HTML page, made from the sweep's table alone.
#pragma once

#include <filesystem>
#include <span>
#include <string>

#include "train/isoflop/fit.h"
#include "train/isoflop/paper_claims.h"

namespace fathom::isoflop {

/// The page: isoFLOP curves with parabolas and minima, the minima against budgets, frontiers against FLOPs
/// and against wall-clock, step times, passes over the data, the claims, every cell. Equal rows and options
/// give an equal page: it holds no date.
std::string sweep_page(std::span<const Row> rows, const Fit& fit, std::span<const PaperClaim> claims);

/// Fits the rows, and writes the page and, beside it, the rows as NAME.csv. UserError: nothing to fit, or
/// the disk refuses; UsageError: the page's name ends in .csv.
Fit write_sweep_report(std::span<const Row> rows, const FitOptions& options,
                       const std::filesystem::path& html);

}  // namespace fathom::isoflop
