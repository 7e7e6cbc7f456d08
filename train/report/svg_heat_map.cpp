#include "train/report/svg_heat_map.h"

#include <algorithm>
#include <cmath>
#include <map>

#include <fmt/core.h>

#include "train/report/html.h"
#include "train/report/svg_figure.h"
#include "train/report/svg_scale.h"

namespace fathom::report {
namespace {

constexpr double kLargestRow = 22, kSmallestRow = 7, kAllRows = 420;
constexpr double kLetters = 13;  // height of a label
constexpr int kShades = 16;

// Cells of one shade are one path, and neighbours one rectangle: a map of a thousand positions stays small.
std::string draw_row(const HeatRow& row, double top, double height, double left, double cell) {
  std::map<int, std::string> paths;
  for (std::size_t first = 0; first < row.cells.size();) {
    const auto shade = [&](std::size_t i) {
      const double v = row.cells[i];
      return v > 0 ? std::max(1, static_cast<int>(std::lround(std::min(v, 1.0) * kShades))) : 0;
    };
    std::size_t last = first + 1;
    while (last < row.cells.size() && shade(last) == shade(first)) ++last;
    if (shade(first) > 0) {
      const double width = cell * static_cast<double>(last - first);
      paths[shade(first)] += fmt::format("M{:.2f} {:.1f}h{:.2f}v{:.1f}h-{:.2f}z",
                                         left + cell * static_cast<double>(first), top, width, height, width);
    }
    first = last;
  }
  std::string out;
  for (const auto& [shade, path] : paths) {
    out += fmt::format("<path class=\"{}\" fill-opacity=\"{:.3g}\" d=\"{}\"/>",
                       row.muted ? "heat muted" : "heat", 0.15 + 0.85 * static_cast<double>(shade) / kShades,
                       path);
  }
  return out;
}

}  // namespace

std::string render(const HeatMap& map) {
  std::size_t columns = 0;
  for (const HeatRow& row : map.rows) columns = std::max(columns, row.cells.size());
  Frame f;
  f.width = 1240;
  const auto rows = static_cast<double>(map.rows.size());
  const double pitch =
      map.rows.empty() ? kLargestRow : std::clamp(kAllRows / rows, kSmallestRow, kLargestRow);
  f.height = f.top + f.bottom + pitch * rows;
  if (columns == 0) return figure(map.title, "", no_data(f, map.title), map.note, " class=\"wide\"");
  const auto first = static_cast<double>(map.first_column), n = static_cast<double>(columns);
  const PixelScale x(first, first + n, Scale::Linear, f.x0(), f.x1());
  const double cell = (f.x1() - f.x0()) / n;
  std::string svg = open_svg(f, map.title) + "<g class=\"axis\">";
  for (const double tick : x.ticks(10)) {
    const double at = x(tick) + cell / 2;
    if (std::floor(tick) != tick || tick >= first + n) continue;
    svg += fmt::format(
        "<line x1=\"{0:.1f}\" x2=\"{0:.1f}\" y1=\"{1:.1f}\" y2=\"{2:.1f}\"/><text x=\"{0:.1f}\" "
        "y=\"{3:.1f}\" "
        "text-anchor=\"middle\">{4}</text>",
        at, f.y0(), f.y0() + 5, f.y0() + 18, tick_label(tick, 1));
  }
  svg += fmt::format(
      "<line x1=\"{0:.1f}\" x2=\"{1:.1f}\" y1=\"{2:.1f}\" y2=\"{2:.1f}\"/><text class=\"label\" "
      "x=\"{3:.1f}\" "
      "y=\"{4:.1f}\" text-anchor=\"middle\">{5}</text><text class=\"label\" transform=\"translate(14 "
      "{6:.1f}) "
      "rotate(-90)\" text-anchor=\"middle\">{7}</text></g>\n",
      f.x0(), f.x1(), f.y0(), (f.x0() + f.x1()) / 2, f.height - 8, escape(map.x_label), (f.y0() + f.y1()) / 2,
      escape(map.y_label));
  const auto every = static_cast<std::size_t>(std::ceil(kLetters / pitch));  // rows that have a label
  for (std::size_t i = 0; i < map.rows.size(); ++i) {
    const HeatRow& row = map.rows[i];
    const double top = f.y0() - pitch * static_cast<double>(i + 1);
    double sum = 0;
    for (const double v : row.cells) sum += v > 0 ? 1 : 0;
    svg += fmt::format("<g><title>{} {}: {:.0f} of {}</title>", escape(map.y_label), escape(row.label), sum,
                       row.cells.size());
    svg +=
        fmt::format("<rect class=\"heat-row\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\"/>",
                    f.x0(), top + 1, f.x1() - f.x0(), pitch - 2);
    svg += draw_row(row, top + 1, pitch - 2, f.x0(), cell);
    if (i % every == 0) {
      svg += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"end\">{}</text>", f.x0() - 8,
                         top + pitch / 2 + 4, escape(row.label));
    }
    svg += "</g>\n";
  }
  return figure(map.title, "", svg + "</svg>", map.note, " class=\"wide\"");
}

}  // namespace fathom::report
