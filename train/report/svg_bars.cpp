// Grouped and stacked bars.
#include <algorithm>
#include <cmath>

#include <fmt/core.h>

#include "train/report/html.h"
#include "train/report/svg_chart.h"
#include "train/report/svg_figure.h"
#include "train/report/svg_scale.h"

namespace fathom::report {

std::string render(const BarChart& chart) {
  Frame f;
  f.width = 1240;
  f.height = 280;
  f.bottom = 28;
  std::vector<std::int64_t> categories;
  double high = 0.0;
  std::string legend;
  for (const BarSeries& s : chart.series) {
    for (const auto& [category, value] : s.bars) {
      categories.push_back(category);
      if (std::isfinite(value)) high = std::max(high, value);
    }
    for (const auto& [category, value] : s.ticks) {
      if (std::isfinite(value)) high = std::max(high, value);
    }
    high = std::max(high, s.reference);
    legend += fmt::format(
        "<li class=\"{0}\" title=\"{1}\"><i class=\"swatch\" style=\"margin:0\"></i><span>{1}</span></li>",
        colour_class(s.colour), escape(s.name));
  }
  std::sort(categories.begin(), categories.end());
  categories.erase(std::unique(categories.begin(), categories.end()), categories.end());
  if (categories.empty() || high <= 0.0)
    return figure(chart.title, legend, no_data(f, chart.title), chart.note, " class=\"wide\"");

  const PixelScale y(0.0, high * 1.08, Scale::Linear, f.y0(), f.y1());
  const double group = (f.x1() - f.x0()) / static_cast<double>(categories.size());
  const double width = std::min(46.0, 0.72 * group / static_cast<double>(chart.series.size()));
  std::string svg = open_svg(f, chart.title) + "<g class=\"axis\">";
  const std::vector<double> ticks = y.ticks(5);
  for (const double tick : ticks) {
    svg += fmt::format("<line class=\"grid\" x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>",
                       f.x0(), f.x1(), y(tick), y(tick));
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"end\">{} %</text>", f.x0() - 8,
                       y(tick) + 4, tick_label(100.0 * tick, 100.0 * (ticks[1] - ticks[0])));
  }
  for (std::size_t i = 0; i < categories.size(); ++i) {
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{} {}</text>",
                       f.x0() + group * (static_cast<double>(i) + 0.5), f.y0() + 18, escape(chart.category),
                       categories[i]);
  }
  svg += fmt::format("<line x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>", f.x0(), f.x1(),
                     f.y0(), f.y0());
  svg += fmt::format(
      "<text class=\"label\" transform=\"translate(14 {:.1f}) rotate(-90)\" "
      "text-anchor=\"middle\">{}</text></g>",
      (f.y0() + f.y1()) / 2, escape(chart.y_label));
  const double start = (group - width * static_cast<double>(chart.series.size())) / 2.0;
  for (std::size_t n = 0; n < chart.series.size(); ++n) {
    const BarSeries& s = chart.series[n];
    const auto left_of = [&](std::int64_t category) {
      const auto at = std::lower_bound(categories.begin(), categories.end(), category) - categories.begin();
      return f.x0() + group * static_cast<double>(at) + start + width * static_cast<double>(n);
    };
    svg += fmt::format("<g class=\"{}\">", colour_class(s.colour));
    for (const auto& [category, value] : s.bars) {
      if (!std::isfinite(value)) continue;
      svg += fmt::format(
          "<rect class=\"bar\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\"><title>{}&#10;{} "
          "{}: {:.2f} %</title></rect>",
          left_of(category) + 1, y(value), width - 2, f.y0() - y(value), escape(s.name),
          escape(chart.category), category, 100.0 * value);
    }
    for (const auto& [category, value] : s.ticks) {
      if (!std::isfinite(value) || !std::binary_search(categories.begin(), categories.end(), category))
        continue;
      svg += fmt::format("<line class=\"tick\" x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>",
                         left_of(category) - 1, left_of(category) + width + 1, y(value), y(value));
    }
    if (s.reference > 0.0) {
      svg +=
          fmt::format("<line class=\"reference\" x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>",
                      f.x0(), f.x1(), y(s.reference), y(s.reference));
    }
    svg += "</g>\n";
  }
  return figure(chart.title, legend, svg + "</svg>", chart.note, " class=\"wide\"");
}

std::string render_stacked(const std::string& title, const std::string& note,
                           const std::vector<StackedRow>& rows) {
  constexpr double kRow = 46, kWidth = 1240;
  std::vector<std::string> terms;  // in order of first appearance, so that a term has one colour in all rows
  for (const StackedRow& row : rows) {
    for (const auto& [term, value] : row.parts) {
      if (std::find(terms.begin(), terms.end(), term) == terms.end()) terms.push_back(term);
    }
  }
  std::string legend;
  for (std::size_t i = 0; i < terms.size(); ++i) {
    legend += fmt::format(
        "<li class=\"{0}\" title=\"{1}\"><i class=\"swatch\" style=\"margin:0\"></i><span>{1}</span></li>",
        colour_class(static_cast<int>(i)), escape(terms[i]));
  }
  double largest = 0.0;
  for (const StackedRow& row : rows) {
    double total = 0.0;
    for (const auto& [term, value] : row.parts) total += value;
    largest = std::max(largest, total);
  }
  Frame f;
  f.width = kWidth;
  f.height = kRow * static_cast<double>(rows.size()) + 4;
  if (largest <= 0.0) return figure(title, legend, no_data(f, title), note, " class=\"wide\"");
  std::string svg = open_svg(f, title);
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const double top = kRow * static_cast<double>(r);
    double total = 0.0, x = 0.0;
    for (const auto& [term, value] : rows[r].parts) total += value;
    svg += fmt::format("<text class=\"name\" x=\"0\" y=\"{:.1f}\">{}</text>", top + 13, escape(rows[r].name));
    for (const auto& [term, value] : rows[r].parts) {
      const auto index = std::find(terms.begin(), terms.end(), term) - terms.begin();
      const double width = kWidth * value / largest;
      svg += fmt::format(
          "<g class=\"{}\"><rect class=\"bar\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" "
          "height=\"22\"><title>{}: {:.3g} ({:.1f} %)</title></rect></g>",
          colour_class(static_cast<int>(index)), x, top + 19, std::max(0.5, width - 1.0), escape(term), value,
          100.0 * value / total);
      x += width;
    }
  }
  return figure(title, legend, svg + "</svg>", note, " class=\"wide\"");
}

}  // namespace fathom::report
