#include "src/io/byte_alphabet.h"

#include <array>
#include <cstdint>

namespace fathom {

namespace {

constexpr int kCharacters = 0x144;  // U+0143 is the last

struct Alphabet {
  std::array<std::uint16_t, 256> character{};
  std::array<std::int16_t, kCharacters> byte{};

  Alphabet() {
    byte.fill(-1);
    std::uint16_t next = 0x100;
    for (std::uint16_t b = 0; b < 256; ++b) {
      const bool visible = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
      character[b] = visible ? b : next++;
      byte[character[b]] = static_cast<std::int16_t>(b);
    }
  }
};

const Alphabet& alphabet() {
  static const Alphabet all;
  return all;
}

}  // namespace

std::string byte_character(unsigned char byte) {
  const unsigned point = alphabet().character[byte];
  if (point < 0x80) return {static_cast<char>(point)};
  return {static_cast<char>(0xc0 | (point >> 6)), static_cast<char>(0x80 | (point & 0x3f))};
}

std::optional<std::string> bytes_of_characters(std::string_view text) {
  std::string bytes;
  bytes.reserve(text.size());
  for (std::size_t i = 0; i < text.size(); ++i) {
    unsigned point = static_cast<unsigned char>(text[i]);
    if (point >= 0x80) {
      const bool is_pair =
          point >= 0xc2 && point <= 0xdf && i + 1 < text.size() && (text[i + 1] & 0xc0) == 0x80;
      if (!is_pair) return std::nullopt;
      point = ((point & 0x1f) << 6) | (static_cast<unsigned char>(text[++i]) & 0x3f);
    }
    if (point >= kCharacters || alphabet().byte[point] < 0) return std::nullopt;
    bytes += static_cast<char>(alphabet().byte[point]);
  }
  return bytes;
}

}  // namespace fathom
