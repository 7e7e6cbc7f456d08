#include "src/config/scalar.h"

#include <array>
#include <charconv>
#include <cmath>

#include <fmt/format.h>

namespace fathom {
namespace {

// std::from_chars takes no leading '+', and YAML does.
std::string_view without_plus(std::string_view text) {
  const bool plus = text.size() > 1 && text[0] == '+' && text[1] != '-' && text[1] != '+';
  return plus ? text.substr(1) : text;
}

template <typename T>
std::optional<T> read_all(std::string_view text) {
  T value{};
  const std::string_view digits = without_plus(text);
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (error != std::errc{} || end != digits.data() + digits.size()) return std::nullopt;
  return value;
}

template <typename Int>
std::optional<Int> read_whole(std::string_view text) {
  if (const auto exact = read_all<Int>(text)) return exact;
  constexpr double kExact = 9007199254740992.0;  // 2^53: above it a double no longer holds every whole number
  const auto x = read_number(text);
  if (!x || std::trunc(*x) != *x || std::abs(*x) > kExact || (std::is_unsigned_v<Int> && *x < 0))
    return std::nullopt;
  return static_cast<Int>(*x);
}

}  // namespace

std::optional<std::int64_t> read_integer(std::string_view text) { return read_whole<std::int64_t>(text); }
std::optional<std::uint64_t> read_unsigned(std::string_view text) { return read_whole<std::uint64_t>(text); }

std::optional<double> read_number(std::string_view text) {
  const auto x = read_all<double>(text);
  return x && std::isfinite(*x) ? x : std::nullopt;
}

std::optional<bool> read_bool(std::string_view text) {
  if (text == "true" || text == "True" || text == "TRUE") return true;
  if (text == "false" || text == "False" || text == "FALSE") return false;
  return std::nullopt;
}

std::string print_number(double x) {
  std::array<char, 32> digits;
  const auto [end, error] = std::to_chars(digits.data(), digits.data() + digits.size(), x);
  return error == std::errc{} ? std::string(digits.data(), end) : fmt::format("{}", x);
}

std::string print_text(std::string_view text) {
  constexpr std::string_view kPlain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./";
  bool plain = !text.empty() && text != "null" && text != "Null" && text != "NULL";
  for (std::size_t i = 0; i < text.size() && plain; ++i) {
    // '-' and ':' mean something to YAML in some places; inside a word '-' does not.
    plain = kPlain.find(text[i]) != std::string_view::npos || (i > 0 && text[i] == '-');
  }
  // Three dots or dashes alone would end or begin a document.
  if (plain && text.find_first_not_of(".-") != std::string_view::npos) return std::string(text);
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      quoted += '\\';
      quoted += c;
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      quoted += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    } else {
      quoted += c;
    }
  }
  return quoted + "\"";
}

}  // namespace fathom
