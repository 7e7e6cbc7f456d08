// The characters that byte-level BPE writes for bytes (Radford et al. 2019): those of Latin-1 that can be
// seen stand for themselves, the other 68 bytes are written as U+0100 to U+0143, in order.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace fathom {

/// The character of a byte, as UTF-8: one or two bytes.
std::string byte_character(unsigned char byte);

/// The bytes that the characters of `text` stand for; nothing when one of them stands for none.
std::optional<std::string> bytes_of_characters(std::string_view text);

}  // namespace fathom
