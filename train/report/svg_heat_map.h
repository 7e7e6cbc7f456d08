// Heat maps of rows by positions as inline SVG.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fathom::report {

/// A row of cells, each a share in [0, 1] of full colour. `muted`: drawn in grey, for rows that are there for
/// comparison.
struct HeatRow {
  std::string label;
  std::vector<double> cells;
  bool muted = false;
};

struct HeatMap {
  std::string title;
  std::string note;
  std::string x_label;
  std::string y_label;            // names a row with its label: "layer"
  std::int64_t first_column = 0;  // the number of the first cell of a row
  std::vector<HeatRow> rows;      // the first at the bottom, as layers are stacked
};

std::string render(const HeatMap& map);

}  // namespace fathom::report
