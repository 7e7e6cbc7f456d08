// The header of a safetensors file: from bytes to checked entries and back. Private to src/io.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "src/io/safetensors.h"

namespace fathom {

/// The format's own limit: no reader accepts a longer header.
inline constexpr std::uint64_t kMaxSafetensorsHeader = 100'000'000;

struct SafetensorsHeader {
  std::vector<SafetensorsEntry> entries;  // by the start of their data
  std::vector<std::size_t> begins;        // of each: bytes from the end of the header
  SafetensorsMetadata metadata;
};

/// `text` is the header, `data_bytes` what follows it. UserError that begins with `path`.
SafetensorsHeader parse_safetensors_header(std::string_view text, std::size_t data_bytes,
                                           const std::string& path);

/// JSON in the order of the entries, padded with spaces so that the data begins at a multiple of 8.
std::string safetensors_header(const std::vector<SafetensorsEntry>& entries,
                               const SafetensorsMetadata& metadata);

}  // namespace fathom
