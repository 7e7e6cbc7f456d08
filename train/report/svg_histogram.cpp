#include "train/report/svg_histogram.h"

#include <algorithm>
#include <cmath>

#include <fmt/core.h>

#include "train/report/html.h"
#include "train/report/svg_figure.h"
#include "train/report/svg_scale.h"

namespace fathom::report {
namespace {

constexpr std::size_t kBins = 48;

struct Range {
  double low = INFINITY, high = -INFINITY;
};

Range range_of(const Histogram& h) {
  Range r;
  for (const HistogramPart& part : h.parts) {
    for (const double v : part.values) {
      if (!std::isfinite(v)) continue;
      r.low = std::min(r.low, v);
      r.high = std::max(r.high, v);
    }
  }
  if (r.low == r.high) r = {r.low - 0.5, r.high + 0.5};
  return r;
}

std::vector<double> counts_of(const HistogramPart& part, const Range& r) {
  std::vector<double> counts(kBins);
  for (const double v : part.values) {
    if (!std::isfinite(v)) continue;
    const double at = (v - r.low) / (r.high - r.low) * static_cast<double>(kBins);
    counts[std::min(kBins - 1, static_cast<std::size_t>(at))] += 1;
  }
  return counts;
}

}  // namespace

std::string render(const Histogram& h) {
  Frame f;
  f.height = 260;
  std::string legend;
  for (const HistogramPart& part : h.parts) {
    legend +=
        fmt::format("<li class=\"{0}\"><i class=\"swatch\" style=\"margin:0\"></i><span>{1}</span></li>",
                    colour_class(part.colour), escape(part.name));
  }
  const Range r = range_of(h);
  if (r.low > r.high) return figure(h.title, legend, no_data(f, h.title), h.note);
  std::vector<double> total(kBins);
  for (const HistogramPart& part : h.parts) {
    const std::vector<double> counts = counts_of(part, r);
    for (std::size_t i = 0; i < kBins; ++i) total[i] += counts[i];
  }
  const PixelScale x(r.low, r.high, Scale::Linear, f.x0(), f.x1());
  const PixelScale y(0, 1.18 * *std::max_element(total.begin(), total.end()), Scale::Linear, f.y0(), f.y1());
  std::string svg = open_svg(f, h.title) + draw_axes(f, {.label = h.x_label}, x, {.label = h.y_label}, y);
  const double bin = (r.high - r.low) / static_cast<double>(kBins);
  std::vector<double> below(kBins);
  for (const HistogramPart& part : h.parts) {
    const std::vector<double> counts = counts_of(part, r);
    svg += fmt::format("<g class=\"{}\">", colour_class(part.colour));
    for (std::size_t i = 0; i < kBins; ++i) {
      if (counts[i] == 0) continue;
      const double from = r.low + bin * static_cast<double>(i);
      const double top = y(below[i] + counts[i]);
      svg += fmt::format(
          "<rect class=\"bar\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\"><title>{}&#10;"
          "{:.3g} to {:.3g}: {:.0f}</title></rect>",
          x(from), top, x(from + bin) - x(from) - 0.6, y(below[i]) - top, escape(part.name), from, from + bin,
          counts[i]);
      below[i] += counts[i];
    }
    svg += "</g>";
  }
  if (h.mark && *h.mark >= r.low && *h.mark <= r.high) {
    const double at = x(*h.mark);
    const bool left = at > (f.x0() + f.x1()) / 2;  // of the line, so that the label stays in the frame
    svg += fmt::format(
        "<line class=\"mark-line\" x1=\"{0:.1f}\" x2=\"{0:.1f}\" y1=\"{1:.1f}\" y2=\"{2:.1f}\"/>"
        "<text class=\"name\" x=\"{3:.1f}\" y=\"{4:.1f}\" text-anchor=\"{5}\">{6}</text>",
        at, f.y0(), f.y1(), at + (left ? -6 : 6), f.y1() + 10, left ? "end" : "start", escape(h.mark_label));
  }
  return figure(h.title, legend, svg + "</svg>", h.note);
}

}  // namespace fathom::report
