#include "src/core/units.h"

#include <cmath>
#include <iterator>

#include <fmt/format.h>

namespace fathom {

namespace {

// Three significant digits and a decimal prefix: 12.3k, 4.56M.
std::string with_prefix(double value, const char* between, const char* kilo) {
  if (!std::isfinite(value)) return fmt::format("{}{}", value, between);
  const char* const prefixes[] = {"", kilo, "M", "G", "T", "P", "E", "Z"};
  std::size_t prefix = 0;
  while (std::abs(value) >= 999.5 && prefix + 1 < std::size(prefixes)) {
    value /= 1000.0;
    ++prefix;
  }
  const double size = std::abs(value);
  const bool whole = prefix == 0 && value == std::floor(value);
  const int decimals = whole ? 0 : size < 9.995 ? 2 : size < 99.95 ? 1 : 0;
  return fmt::format("{:.{}f}{}{}", value, decimals, between, prefixes[prefix]);
}

}  // namespace

std::string format_count(double value) { return with_prefix(value, "", "k"); }
std::string format_flops(double value) { return with_prefix(value, " ", "k") + "FLOP"; }
std::string format_rate(double per_second) { return with_prefix(per_second, " ", "k") + "FLOP/s"; }

std::string format_bytes(double bytes) {
  const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  std::size_t unit = 0;
  while (bytes >= 1024.0 && unit + 1 < std::size(units)) {
    bytes /= 1024.0;
    ++unit;
  }
  return fmt::format("{:.{}f} {}", bytes, unit == 0 || bytes >= 99.95 ? 0 : 1, units[unit]);
}

std::string format_duration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0.0) return "?";
  if (seconds < 9.95) return fmt::format("{:.1f} s", seconds);
  const auto whole = static_cast<std::int64_t>(std::llround(seconds));
  if (whole < 60) return fmt::format("{} s", whole);
  if (whole < 3600) return fmt::format("{} min {:02} s", whole / 60, whole % 60);
  if (whole < 86400) return fmt::format("{} h {:02} min", whole / 3600, whole % 3600 / 60);
  return fmt::format("{} d {:02} h", whole / 86400, whole % 86400 / 3600);
}

std::string format_percent(double share) { return fmt::format("{:.1f} %", 100.0 * share); }

std::string with_commas(std::int64_t value) {
  std::string digits = std::to_string(value);
  const std::size_t first = value < 0 ? 1 : 0;
  for (std::size_t at = digits.size(); at > first + 3;) digits.insert(at -= 3, ",");
  return digits;
}

}  // namespace fathom
