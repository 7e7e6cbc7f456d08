// One value, from YAML text and back. Printing is the shortest text that reads back to the same value.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace fathom {

/// A whole number: digits, or a form such as 1e9 or 2.5e3 whose value is whole and exact in a double.
std::optional<std::int64_t> read_integer(std::string_view text);
std::optional<std::uint64_t> read_unsigned(std::string_view text);
/// A finite decimal number.
std::optional<double> read_number(std::string_view text);
std::optional<bool> read_bool(std::string_view text);

std::string print_number(double x);
/// Plain where YAML reads it back as the same text, double-quoted otherwise.
std::string print_text(std::string_view text);

}  // namespace fathom
