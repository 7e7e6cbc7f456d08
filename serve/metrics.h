// Numbers for Prometheus, in its text format (version 0.0.4).
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fathom::serve {

/// Counts of values by upper bound, with their sum. Not synchronised.
class Histogram {
 public:
  /// `bounds` rise; what is above the last counts as +Inf alone.
  explicit Histogram(std::vector<double> bounds) : bounds_(std::move(bounds)), counts_(bounds_.size() + 1) {}

  void observe(double value);
  std::int64_t count() const;
  double sum() const { return sum_; }
  const std::vector<double>& bounds() const { return bounds_; }
  /// Of values up to bounds()[i] and above the bound before; the last is what is above all.
  const std::vector<std::int64_t>& counts() const { return counts_; }

 private:
  std::vector<double> bounds_;
  std::vector<std::int64_t> counts_;
  double sum_ = 0;
};

/// Writes the format: a family's HELP and TYPE, then its samples.
class MetricsText {
 public:
  using Labels = std::initializer_list<std::pair<std::string_view, std::string>>;

  void family(std::string_view name, std::string_view type, std::string_view help);
  /// Of the family that was named last.
  void sample(double value, Labels labels = {});
  void histogram(std::string_view name, std::string_view help, const Histogram& histogram);
  void counter(std::string_view name, std::string_view help, double value);
  void gauge(std::string_view name, std::string_view help, double value);

  const std::string& text() const { return text_; }

 private:
  void line(std::string_view suffix, double value, Labels labels);

  std::string family_;
  std::string text_;
};

}  // namespace fathom::serve
