// A second fit beside the parabolas: one surface for all cells of a family,
//   L(N, D) = E + A / N^alpha + B / D^beta      (Hoffmann et al. 2022, approach 3; N parameters, D tokens)
// by variable projection: for each (alpha, beta) the best E, A, B >= 0 are a linear problem, so only two
// unknowns are searched. With C ~ N D its optimum goes as N_opt ~ C^(beta / (alpha + beta)), and what can
// still be won as L_opt - E ~ C^-(alpha beta / (alpha + beta)).
#pragma once

#include <optional>
#include <span>

namespace fathom::isoflop {

struct SurfacePoint {
  double n = 0;     // parameters
  double d = 0;     // training tokens
  double loss = 0;  // nats a token
};

struct Surface {
  double e = 0, a = 0, b = 0;  // of L(N, D), N and D as they are
  double alpha = 0, beta = 0;
  double rms = 0;  // of the residuals

  double at(double n, double d) const;
  double size_exponent() const { return beta / (alpha + beta); }
  double loss_exponent() const { return alpha * beta / (alpha + beta); }
  /// Whether alpha or beta ended at the limit of what is searched (0.01 to 3), or A or B at zero: the cells
  /// do not determine the surface.
  bool at_limit = false;
};

/// Nothing with fewer than six points, or fewer than three different N or D. `start`: a surface nearby, such
/// as that of the points that a bootstrap's were made from; the search then begins there.
std::optional<Surface> fit_surface(std::span<const SurfacePoint> points, const Surface* start = nullptr);

}  // namespace fathom::isoflop
