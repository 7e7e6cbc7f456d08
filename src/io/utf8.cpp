#include "src/io/utf8.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace fathom {

namespace {

// The length of the character at the start of `s` (`n` bytes, n > 0); 0 when it is not valid.
std::size_t character(const unsigned char* s, std::size_t n) {
  const auto follows = [&](std::size_t i, unsigned char low = 0x80, unsigned char high = 0xBF) {
    return i < n && s[i] >= low && s[i] <= high;
  };
  const unsigned char c = s[0];
  if (c < 0x80) return 1;
  if (c >= 0xC2 && c <= 0xDF) return follows(1) ? 2 : 0;
  if (c >= 0xE0 && c <= 0xEF) {
    const unsigned char low = c == 0xE0 ? 0xA0 : 0x80;
    const unsigned char high = c == 0xED ? 0x9F : 0xBF;
    return follows(1, low, high) && follows(2) ? 3 : 0;
  }
  if (c >= 0xF0 && c <= 0xF4) {
    const unsigned char low = c == 0xF0 ? 0x90 : 0x80;
    const unsigned char high = c == 0xF4 ? 0x8F : 0xBF;
    return follows(1, low, high) && follows(2) && follows(3) ? 4 : 0;
  }
  return 0;
}

}  // namespace

std::size_t utf8_prefix(std::string_view text) {
  const auto* s = reinterpret_cast<const unsigned char*>(text.data());
  std::size_t i = 0;
  while (i < text.size()) {
    // Eight ASCII bytes at a time.
    std::uint64_t word = 0;
    while (i + 8 <= text.size()) {
      std::memcpy(&word, s + i, 8);
      if ((word & 0x8080808080808080u) != 0) break;
      i += 8;
    }
    if (i == text.size()) break;
    const std::size_t length = character(s + i, text.size() - i);
    if (length == 0) return i;
    i += length;
  }
  return i;
}

std::size_t utf8_boundary(std::string_view text, std::size_t limit) {
  if (limit >= text.size()) return text.size();
  std::size_t end = limit;
  // At most three continuation bytes lie before a boundary; in invalid text any place will do.
  while (end > 0 && limit - end < 4 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return limit - end < 4 && end > 0 ? end : limit;
}

std::string replace_invalid_utf8(std::string_view text) {
  std::string out;
  bool in_run = false;
  while (!text.empty()) {
    const std::size_t valid = utf8_prefix(text);
    out.append(text.substr(0, valid));
    if (valid == text.size()) break;
    if (!in_run || valid > 0) out += "\xEF\xBF\xBD";
    in_run = true;
    text.remove_prefix(valid + 1);
  }
  return out;
}

}  // namespace fathom
