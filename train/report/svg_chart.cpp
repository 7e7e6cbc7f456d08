#include "train/report/svg_chart.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include <fmt/core.h>

#include "train/report/html.h"
#include "train/report/svg_figure.h"
#include "train/report/svg_scale.h"

namespace fathom::report {
namespace {

constexpr std::size_t kLinePoints = 700;  // more than the frame has pixels to show
constexpr std::size_t kHoverPoints = 48;  // of a line without marks

struct Range {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();
  void add(double v) {
    low = std::min(low, v);
    high = std::max(high, v);
  }
  bool empty() const { return low > high; }
};

bool drawable(const Point& p, const LineChart& chart) {
  return std::isfinite(p.x) && std::isfinite(p.y) && (chart.x.scale == Scale::Linear || p.x > 0.0) &&
         (chart.y.scale == Scale::Linear || p.y > 0.0);
}

// Each run has a shape of its own as well as a colour: circle, square, triangle, diamond.
std::string mark(double x, double y, int shape, Marks marks, const std::string& title) {
  const char* const cls = marks == Marks::Hollow ? "mark hollow" : "mark";
  const std::string end = title.empty() ? "/>" : "><title>" + title + "</title></";
  const auto close = [&](const char* tag) { return title.empty() ? end : end + tag + ">"; };
  switch (shape % 4) {
    case 1:
      return fmt::format("<rect class=\"{}\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"7\" height=\"7\"", cls,
                         x - 3.5, y - 3.5) +
             close("rect");
    case 2:
      return fmt::format("<path class=\"{}\" d=\"M{:.1f} {:.1f}l4.4 7.8h-8.8z\"", cls, x, y - 4.8) +
             close("path");
    case 3:
      return fmt::format("<path class=\"{}\" d=\"M{:.1f} {:.1f}l4.7 4.7l-4.7 4.7l-4.7 -4.7z\"", cls, x,
                         y - 4.7) +
             close("path");
    default:
      return fmt::format("<circle class=\"{}\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3.7\"", cls, x, y) +
             close("circle");
  }
}

const char* line_class(Stroke stroke) {
  switch (stroke) {
    case Stroke::Dashed:
      return "line dashed";
    case Stroke::Faint:
      return "line faint";
    case Stroke::Solid:
      return "line";
  }
  return "line";
}

std::string legend_item(const Series& s) {
  std::string picture =
      fmt::format("<svg class=\"{}\" viewBox=\"0 0 26 12\" aria-hidden=\"true\">", colour_class(s.colour));
  picture += fmt::format("<path class=\"{}\" d=\"M1 6H25\"/>", line_class(s.stroke));
  if (s.marks != Marks::None) picture += mark(13, 6, s.colour, s.marks, "");
  return fmt::format("<li title=\"{0}\">{1}</svg><span>{0}</span></li>", escape(s.name), picture);
}

std::string draw_series(const Series& s, const LineChart& chart, const PixelScale& x, const PixelScale& y) {
  const auto title_of = [&](const Point& p) {
    return fmt::format("{}&#10;{}: {:.6g}&#10;{}: {:.6g}", escape(s.name), escape(chart.x.label), p.x,
                       escape(chart.y.label), p.y);
  };
  std::string path, marks;
  const std::vector<Point> points = s.marks == Marks::None ? thin_out(s.points, kLinePoints) : s.points;
  for (std::size_t i = 0; i < points.size(); ++i) {
    if (!drawable(points[i], chart)) continue;
    const bool joined = i > 0 && drawable(points[i - 1], chart);
    const bool goes_on = i + 1 < points.size() && drawable(points[i + 1], chart);
    const double px = x(points[i].x), py = y(points[i].y);
    path += fmt::format("{}{:.1f} {:.1f}", joined ? "L" : "M", px, py);
    const bool alone = !joined && !goes_on;
    if (s.marks != Marks::None || (alone && s.stroke != Stroke::Faint)) {
      marks += mark(px, py, s.colour, s.marks == Marks::Hollow ? Marks::Hollow : Marks::Filled,
                    title_of(points[i]));
    }
  }
  if (s.marks == Marks::None && s.stroke != Stroke::Faint) {
    const std::size_t every = std::max<std::size_t>(1, points.size() / kHoverPoints);
    for (std::size_t i = 0; i < points.size(); i += every) {
      if (!drawable(points[i], chart)) continue;
      marks +=
          fmt::format("<circle class=\"hit\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"6\"><title>{}</title></circle>",
                      x(points[i].x), y(points[i].y), title_of(points[i]));
    }
  }
  if (path.empty()) return "";
  return fmt::format("<g class=\"{}\"><path class=\"{}\" d=\"{}\"/>{}</g>\n", colour_class(s.colour),
                     line_class(s.stroke), path, marks);
}

std::string next_clip_id() {
  static std::atomic<int> count{0};
  return fmt::format("clip{}", count++);
}

}  // namespace

std::vector<Point> thin_out(const std::vector<Point>& points, std::size_t count) {
  if (points.size() <= count || count < 4) return points;
  const std::size_t stretches = count / 2;
  std::vector<Point> out;
  for (std::size_t b = 0; b < stretches; ++b) {
    const std::size_t begin = b * points.size() / stretches, end = (b + 1) * points.size() / stretches;
    std::size_t low = begin, high = begin;
    bool gap = false;
    for (std::size_t i = begin; i < end; ++i) {
      if (!std::isfinite(points[i].y)) {
        gap = true;
        continue;
      }
      if (!std::isfinite(points[low].y) || points[i].y < points[low].y) low = i;
      if (!std::isfinite(points[high].y) || points[i].y > points[high].y) high = i;
    }
    out.push_back(points[std::min(low, high)]);
    if (low != high) out.push_back(points[std::max(low, high)]);
    if (gap) out.push_back({points[end - 1].x, std::nan("")});
  }
  return out;
}

std::string render(const LineChart& chart) {
  const Frame f;
  LineChart c = chart;
  Range xs, ys;
  for (Series& s : c.series) {
    for (Point& p : s.points) {
      p.x /= c.x.unit;
      p.y /= c.y.unit;
      if (!drawable(p, c)) continue;
      xs.add(p.x);
      if (c.y.upper_limit <= 0.0 || p.y <= c.y.upper_limit) ys.add(p.y);
    }
  }
  std::string legend;
  for (const Series& s : c.series) {
    if (!s.name.empty() && s.stroke != Stroke::Faint) legend += legend_item(s);
  }
  if (xs.empty() || ys.empty()) return figure(c.title, legend, no_data(f, c.title), c.note);
  if (c.x.scale == Scale::Linear && xs.low > 0.0 && xs.low < 0.35 * xs.high) xs.low = 0.0;
  const double pad = c.y.scale == Scale::Log ? 0.0 : 0.05 * (ys.high - ys.low);
  const bool from_zero = c.y.scale == Scale::Linear && ys.low >= 0.0 && ys.low < 0.2 * ys.high;
  const double factor = c.y.scale == Scale::Log ? std::pow(ys.high / ys.low, 0.04) : 1.0;
  const PixelScale x(xs.low, xs.high, c.x.scale, f.x0(), f.x1());
  const PixelScale y((from_zero ? 0.0 : ys.low - pad) / factor, (ys.high + pad) * factor, c.y.scale, f.y0(),
                     f.y1());
  const std::string clip = next_clip_id();
  std::string svg = open_svg(f, c.title) + draw_axes(f, c.x, x, c.y, y);
  svg += fmt::format(
      "<clipPath id=\"{}\"><rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\"/></clipPath>"
      "<g clip-path=\"url(#{})\">\n",
      clip, f.x0() - 5, f.y1() - 1, f.x1() - f.x0() + 10, f.y0() - f.y1() + 6, clip);
  for (const bool faint : {true, false}) {  // the faint lines lie below the others
    for (const Series& s : c.series) {
      if ((s.stroke == Stroke::Faint) == faint) svg += draw_series(s, c, x, y);
    }
  }
  return figure(c.title, legend, svg + "</g></svg>", c.note);
}

}  // namespace fathom::report
