// Stacked histograms as inline SVG.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace fathom::report {

/// One part of what is counted; values that are not finite are left out.
struct HistogramPart {
  std::string name;
  int colour = 0;
  std::vector<double> values;
};

struct Histogram {
  std::string title;
  std::string note;
  std::string x_label;
  std::string y_label;
  std::vector<HistogramPart> parts;  // the first at the bottom
  std::optional<double> mark;        // a dashed line across, drawn where the values reach it
  std::string mark_label;
};

std::string render(const Histogram& histogram);

}  // namespace fathom::report
