// "Depth before width": whether, at the same size and budget, the deeper and narrower model is lower in loss.
//
// All fitted cells of a family are one regression: a parabola in log10 N for each budget, and one common term
// g * log10(depth / width). g is the effect: nats for ten times the depth over width.
#pragma once

#include <span>
#include <string>

#include "train/isoflop/fit.h"

namespace fathom::isoflop {

struct DepthTest {
  Estimate effect;  // nats; below zero: depth is worth more
  std::string why;  // why it cannot be tested here; empty: it can
};

/// It takes two cells of one budget whose sizes are within 20 % and whose depth over width differs 1.5 times.
DepthTest test_depth(const Fit& fit, std::span<const Row> rows, const std::string& family);

}  // namespace fathom::isoflop
