#include "serve/metrics.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include <fmt/format.h>

namespace fathom::serve {

namespace {

std::string number(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "+Inf" : "-Inf";
  return fmt::format("{}", value);
}

std::string escaped(std::string_view text, bool is_label) {
  std::string out;
  for (const char c : text) {
    if (c == '\\') {
      out += "\\\\";
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '"' && is_label) {
      out += "\\\"";
    } else {
      out += c;
    }
  }
  return out;
}

}  // namespace

void Histogram::observe(double value) {
  const auto at = std::lower_bound(bounds_.begin(), bounds_.end(), value);
  ++counts_[static_cast<std::size_t>(at - bounds_.begin())];
  sum_ += value;
}

std::int64_t Histogram::count() const {
  return std::accumulate(counts_.begin(), counts_.end(), std::int64_t{0});
}

void MetricsText::family(std::string_view name, std::string_view type, std::string_view help) {
  family_ = name;
  text_ += fmt::format("# HELP {} {}\n# TYPE {} {}\n", name, escaped(help, false), name, type);
}

void MetricsText::sample(double value, Labels labels) { line("", value, labels); }

void MetricsText::line(std::string_view suffix, double value, Labels labels) {
  text_ += family_;
  text_ += suffix;
  std::string inside;
  for (const auto& [name, label] : labels)
    inside += fmt::format("{}{}=\"{}\"", inside.empty() ? "" : ",", name, escaped(label, true));
  if (!inside.empty()) text_ += "{" + inside + "}";
  text_ += " " + number(value) + "\n";
}

void MetricsText::histogram(std::string_view name, std::string_view help, const Histogram& histogram) {
  family(name, "histogram", help);
  std::int64_t up_to = 0;
  for (std::size_t i = 0; i < histogram.bounds().size(); ++i) {
    up_to += histogram.counts()[i];
    line("_bucket", static_cast<double>(up_to), {{"le", number(histogram.bounds()[i])}});
  }
  line("_bucket", static_cast<double>(histogram.count()), {{"le", "+Inf"}});
  line("_sum", histogram.sum(), {});
  line("_count", static_cast<double>(histogram.count()), {});
}

void MetricsText::counter(std::string_view name, std::string_view help, double value) {
  family(name, "counter", help);
  sample(value);
}

void MetricsText::gauge(std::string_view name, std::string_view help, double value) {
  family(name, "gauge", help);
  sample(value);
}

}  // namespace fathom::serve
