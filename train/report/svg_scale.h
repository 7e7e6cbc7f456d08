// From values to pixels: the ranges, ticks and labels of a chart's axes.
#pragma once

#include <string>
#include <vector>

#include "train/report/svg_chart.h"

namespace fathom::report {

/// The picture and, within it, the frame that the data is drawn in; SVG units.
struct Frame {
  double width = 640, height = 330;
  double left = 62, right = 14, top = 12, bottom = 46;
  double x0() const { return left; }
  double x1() const { return width - right; }
  double y0() const { return height - bottom; }
  double y1() const { return top; }
};

class PixelScale {
 public:
  /// Maps [low, high] to [from, to]. An empty or one-point range is widened.
  PixelScale(double low, double high, Scale scale, double from, double to);

  double operator()(double value) const;
  std::vector<double> ticks(int count) const;
  double low() const { return low_; }
  double high() const { return high_; }

 private:
  double low_, high_;
  Scale scale_;
  double from_, to_;
};

/// A tick's label: as many decimals as the step between ticks needs.
std::string tick_label(double value, double step);
/// Grid lines, tick labels, axis lines and axis titles.
std::string draw_axes(const Frame& frame, const Axis& x_axis, const PixelScale& x, const Axis& y_axis,
                      const PixelScale& y);

}  // namespace fathom::report
