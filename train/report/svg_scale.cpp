#include "train/report/svg_scale.h"

#include <algorithm>
#include <cmath>

#include <fmt/core.h>

#include "train/report/html.h"

namespace fathom::report {

PixelScale::PixelScale(double low, double high, Scale scale, double from, double to)
    : low_(low), high_(high), scale_(scale), from_(from), to_(to) {
  if (scale_ == Scale::Log) {
    if (!(low_ < high_)) {
      low_ /= 2.0;
      high_ *= 2.0;
    }
  } else if (!(low_ < high_)) {
    const double around = low_ == 0.0 ? 1.0 : 0.1 * std::abs(low_);
    low_ -= around;
    high_ += around;
  }
}

double PixelScale::operator()(double value) const {
  const double share = scale_ == Scale::Log ? std::log(value / low_) / std::log(high_ / low_)
                                            : (value - low_) / (high_ - low_);
  return from_ + share * (to_ - from_);
}

std::vector<double> PixelScale::ticks(int count) const {
  if (scale_ == Scale::Linear) return nice_ticks(low_, high_, count);
  // Powers of ten, with 2 and 5 between them where there is room.
  std::vector<double> out;
  const double decades = std::log10(high_ / low_);
  if (decades < 0.6) return nice_ticks(low_, high_, count);
  const int every = std::max(1, static_cast<int>(std::ceil(decades / count)));
  for (int e = static_cast<int>(std::floor(std::log10(low_))); std::pow(10.0, e) <= high_; ++e) {
    for (const double m : {1.0, 2.0, 5.0}) {
      if (m > 1.0 && decades > 2.5) break;
      const double tick = m * std::pow(10.0, e);
      if (tick >= low_ * 0.999 && tick <= high_ * 1.001 && e % every == 0) out.push_back(tick);
    }
  }
  return out;
}

std::vector<double> nice_ticks(double low, double high, int count) {
  if (!std::isfinite(low) || !std::isfinite(high) || !(low < high) || count < 1) return {};
  const double raw = (high - low) / count;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  const double ratio = raw / power;
  const double step = power * (ratio < 1.5 ? 1.0 : ratio < 3.5 ? 2.0 : ratio < 7.5 ? 5.0 : 10.0);
  std::vector<double> out;
  const double slack = 1e-9 * step;
  for (double i = std::ceil((low - slack) / step); i * step <= high + slack; ++i)
    out.push_back(i * step + 0.0);
  return out;
}

std::string tick_label(double value, double step) {
  const double size = std::abs(value);
  if (size != 0.0 && (size >= 1e6 || step < 1e-4)) {
    std::string text = fmt::format("{:.1e}", value);
    if (const auto zero = text.find(".0e"); zero != std::string::npos) text.erase(zero, 2);
    return text;
  }
  const int decimals = std::clamp(static_cast<int>(std::ceil(-std::log10(step) - 1e-9)), 0, 6);
  return fmt::format("{:.{}f}", value, decimals);
}

std::string draw_axes(const Frame& f, const Axis& x_axis, const PixelScale& x, const Axis& y_axis,
                      const PixelScale& y) {
  const auto step_of = [](const std::vector<double>& ticks, Scale scale, double tick) {
    return scale == Scale::Linear && ticks.size() > 1
               ? ticks[1] - ticks[0]
               : std::pow(10.0, std::floor(std::log10(std::abs(tick))));
  };
  std::string out = "<g class=\"axis\">";
  const std::vector<double> y_ticks = y.ticks(5), x_ticks = x.ticks(6);
  for (const double tick : y_ticks) {
    const double at = y(tick);
    out += fmt::format("<line class=\"grid\" x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>",
                       f.x0(), f.x1(), at, at);
    out += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"end\">{}</text>", f.x0() - 8, at + 4,
                       tick_label(tick, step_of(y_ticks, y_axis.scale, tick)));
  }
  for (const double tick : x_ticks) {
    const double at = x(tick);
    out += fmt::format("<line x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>", at, at, f.y0(),
                       f.y0() + 5);
    out += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>", at, f.y0() + 18,
                       tick_label(tick, step_of(x_ticks, x_axis.scale, tick)));
  }
  out += fmt::format("<line x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>", f.x0(), f.x1(),
                     f.y0(), f.y0());
  out += fmt::format("<text class=\"label\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>",
                     (f.x0() + f.x1()) / 2, f.height - 8, escape(x_axis.label));
  out += fmt::format(
      "<text class=\"label\" transform=\"translate(14 {:.1f}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
      (f.y0() + f.y1()) / 2, escape(y_axis.label));
  return out + "</g>";
}

}  // namespace fathom::report
