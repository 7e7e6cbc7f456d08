// A cell of a CSV file (RFC 4180).
#pragma once

#include <string>
#include <string_view>

namespace fathom::report {

/// `text`, quoted where it has to be.
std::string csv_cell(std::string_view text);

}  // namespace fathom::report
