// UTF-8 validity (Unicode 15, table 3-7: no overlong forms, no surrogates, nothing above U+10FFFF).
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace fathom {

/// The length of the longest prefix of `text` that is valid UTF-8; text.size() when all of it is.
std::size_t utf8_prefix(std::string_view text);

/// The longest prefix of `text`, at most `limit` bytes, that does not end inside a character.
std::size_t utf8_boundary(std::string_view text, std::size_t limit);

/// `text` with each byte that is not part of valid UTF-8 replaced by U+FFFD (a run of them by one).
std::string replace_invalid_utf8(std::string_view text);

}  // namespace fathom
