// What a sweep's table says: for each family and budget a parabola of loss over log10 N and its minimum;
// power laws through the minima; a surface L(N, D) beside them; each with intervals.
//
// Everything here is a pure function of the rows: the same table gives the same figures to the bit.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "train/isoflop/parabola.h"
#include "train/isoflop/row.h"
#include "train/isoflop/surface.h"

namespace fathom::isoflop {

/// What N is. Both leave out the embedding's lookup table, which no FLOP touches.
enum class SizeAxis {
  Active,  // parameters that work on a token on average: a routed block counts K / T times. What C = 6 N D
           // means
  Total    // all of them: what the model's memory holds
};
const char* name_of(SizeAxis axis);  // "active", "total"

/// A cell that passed over its text more than once, and whose validation loss ended this much (a share) above
/// its lowest evaluation, has overfitted. Within the first pass a rise is the noise of training.
inline constexpr double kOverfitRise = 0.005;

struct FitOptions {
  SizeAxis size = SizeAxis::Active;
  std::int64_t replicates = 1000;  // of the bootstrap; 0: no intervals
  double level = 0.95;             // of the intervals
  std::uint64_t seed = 1;
  bool surfaces = true;  // they take most of the time
};

struct Interval {
  double low = 0, high = 0;
};

struct Estimate {
  double value = 0;
  std::optional<Interval> interval;  // none: nothing is known about the noise, or there was no bootstrap
};

struct CurveCell {
  std::size_t row = 0;   // of the rows given
  double n = 0;          // by the axis
  double loss = 0;       // by the curve's measure
  std::string left_out;  // why it is drawn and not fitted; empty: it is fitted
};

/// The lowest point of a curve.
struct Minimum {
  Estimate n;           // parameters
  Estimate loss;        // nats a token
  bool usable = false;  // not at the grid's edge, of a parabola that opens upwards: power laws take it
};

struct Curve {
  std::string family;
  std::string kind;
  std::string measure;  // "val_loss" (dense), "val_causal", "val_topk"
  bool judged = false;  // by the loss that the family is judged by: not val_topk where val_causal is there
  double budget = 0;
  std::vector<CurveCell> cells;  // ascending in N
  double low = 0, high = 0;      // log10 N of the smallest and largest fitted cell
  std::optional<Parabola> parabola;
  std::optional<Minimum> minimum;
  std::vector<std::string> flags;  // for people: "the minimum is at the grid's edge: ..."
};

/// Exponents only: they compare between families, and a prefactor would be an extrapolation.
struct PowerLaw {
  std::string family, measure;
  std::int64_t budgets = 0;  // usable minima
  Estimate n_exponent;       // a of N_opt ~ C^a
  Estimate loss_exponent;    // b of L_opt ~ C^-b, without an irreducible loss
};

struct SurfaceFit {
  std::string family, measure;
  std::int64_t cells = 0;
  Surface surface;
  Estimate e, alpha, beta, n_exponent, loss_exponent;
};

struct Fit {
  FitOptions options;
  std::vector<Curve> curves;  // by family in the table's order, measure, budget
  std::vector<PowerLaw> power_laws;
  std::vector<SurfaceFit> surfaces;
  /// replicates[r][c]: curve c's parabola in replicate r; as curve c has one, so has each of these.
  std::vector<std::vector<std::optional<Parabola>>> replicates;
  double noise = 0;                // standard deviation of the residuals, nats a token; 0: unknown
  std::int64_t noise_freedom = 0;  // degrees of freedom that it was found with

  const Curve* find(std::string_view family, std::string_view measure, double budget) const;
};

/// UserError when no cell is done.
Fit fit_rows(std::span<const Row> rows, const FitOptions& options = {});

/// Adds the surfaces to a fit that has its curves; fit_rows does.
void fit_surfaces(Fit& fit, std::span<const Row> rows);

/// The middle `level` of the values; nothing with fewer than 20.
std::optional<Interval> interval_of(std::vector<double> values, double level);

/// Tables for a terminal, and one JSON object.
std::string fit_text(const Fit& fit, std::span<const Row> rows);
std::string fit_json(const Fit& fit, std::span<const Row> rows);

}  // namespace fathom::isoflop
