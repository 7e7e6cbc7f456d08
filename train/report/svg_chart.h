// Charts as inline SVG. Colours are CSS classes s0..s7 of the page, so light and dark need one picture.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace fathom::report {

struct Point {
  double x = 0.0;
  double y = 0.0;
};

enum class Scale { Linear, Log };
enum class Stroke { Solid, Dashed, Faint };
enum class Marks { None, Filled, Hollow };

struct Axis {
  std::string label;
  Scale scale = Scale::Linear;
  double unit = 1.0;         // values are divided by it; the label names the unit
  double upper_limit = 0.0;  // what lies above is cut off; 0: nothing is
};

/// A line. A point that is not finite leaves a gap; a point alone between gaps is drawn as a dot.
struct Series {
  std::string name;  // in the legend (empty: not there) and in the hover text
  int colour = 0;    // any index; the palette has eight colours, then repeats
  Stroke stroke = Stroke::Solid;
  Marks marks = Marks::None;
  std::vector<Point> points;
};

struct LineChart {
  std::string title;
  std::string note;  // one line below the chart; may be empty
  Axis x, y;
  std::vector<Series> series;
};

/// Grouped bars, one group a category (a layer), with a reference line and a tick mark on each bar.
struct BarSeries {
  std::string name;
  int colour = 0;
  std::vector<std::pair<std::int64_t, double>> bars;   // layer, share
  std::vector<std::pair<std::int64_t, double>> ticks;  // layer, share: drawn as a short line over the bar
  double reference = 0.0;                              // a dashed line over the groups; 0: none
};

struct BarChart {
  std::string title;
  std::string note;
  std::string category;  // "layer"
  std::string y_label;
  std::vector<BarSeries> series;
};

/// One row of shares that add up to its total.
struct StackedRow {
  std::string name;
  std::vector<std::pair<std::string, double>> parts;
};

/// Each a <figure> with caption, legend, picture and note.
std::string render(const LineChart& chart);
std::string render(const BarChart& chart);
std::string render_stacked(const std::string& title, const std::string& note,
                           const std::vector<StackedRow>& rows);

/// Round positions (1, 2, 5 times a power of ten) within [low, high], about `count` of them.
std::vector<double> nice_ticks(double low, double high, int count);
/// At most `count` points that keep the outline of the line: of each stretch its lowest and its highest
/// point.
std::vector<Point> thin_out(const std::vector<Point>& points, std::size_t count);

}  // namespace fathom::report
