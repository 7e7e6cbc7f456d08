#include "train/routes/characters.h"

#include <algorithm>
#include <array>
#include <span>

#include <fmt/format.h>

#include "src/io/utf8.h"

namespace fathom::routes {

namespace {

// The text of each token. Some tokenizers drop the space before the first token of what they decode, so each
// is decoded after the one before it.
std::vector<std::string> texts_of(const std::vector<std::int32_t>& tokens, const Tokenizer& tokenizer) {
  std::vector<std::string> texts;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const std::size_t before = i == 0 ? 0 : 1;
    const std::span<const std::int32_t> both(tokens.data() + i - before, 1 + before);
    texts.push_back(tokenizer.decode(both).substr(tokenizer.decode(both.first(before)).size()));
  }
  return texts;
}

// Whether bytes that are no character yet may become one with the bytes that follow.
bool may_go_on(std::string_view tail) {
  const auto first = static_cast<unsigned char>(tail[0]);
  const std::size_t length = first >= 0xF0 && first < 0xF5 ? 4 : first >= 0xE0 ? 3 : first >= 0xC2 ? 2 : 0;
  return first < 0xF5 && tail.size() < length && std::all_of(tail.begin() + 1, tail.end(), [](char c) {
           return (static_cast<unsigned char>(c) & 0xC0) == 0x80;
         });
}

// Bytes that are no UTF-8 as <0xE2>.
std::string with_marks(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const std::size_t valid = utf8_prefix(text);
    out += text.substr(0, valid);
    if (valid < text.size()) out += fmt::format("<0x{:02X}>", static_cast<unsigned char>(text[valid]));
    text.remove_prefix(std::min(text.size(), valid + 1));
  }
  return out;
}

struct Range {
  char32_t low, high;
};
constexpr std::array kWide{Range{0x1100, 0x115F}, Range{0x2E80, 0xA4CF},   Range{0xAC00, 0xD7A3},
                           Range{0xF900, 0xFAFF}, Range{0xFE30, 0xFE6F},   Range{0xFF00, 0xFF60},
                           Range{0xFFE0, 0xFFE6}, Range{0x1F300, 0x1FAFF}, Range{0x20000, 0x3FFFD}};
constexpr std::array kNarrowless{Range{0x0300, 0x036F}, Range{0x200B, 0x200F}, Range{0x20D0, 0x20FF},
                                 Range{0xFE00, 0xFE0F}};

template <std::size_t N>
bool within(const std::array<Range, N>& ranges, char32_t c) {
  return std::any_of(ranges.begin(), ranges.end(), [c](const Range& r) { return c >= r.low && c <= r.high; });
}

// The characters of valid UTF-8.
std::vector<char32_t> code_points(std::string_view text) {
  std::vector<char32_t> out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if ((byte & 0xC0) == 0x80 && !out.empty())
      out.back() = (out.back() << 6) | (byte & 0x3FU);
    else
      out.push_back(byte < 0x80   ? byte
                    : byte < 0xE0 ? byte & 0x1FU
                    : byte < 0xF0 ? byte & 0x0FU
                                  : byte & 0x07U);
  }
  return out;
}

}  // namespace

std::vector<Piece> pieces_of(const std::vector<std::int32_t>& tokens, const Tokenizer* tokenizer) {
  std::vector<Piece> pieces;
  if (tokenizer == nullptr) {
    for (std::size_t i = 0; i < tokens.size(); ++i)
      pieces.push_back({fmt::format("<{}>", tokens[i]), i, i + 1, true});
    return pieces;
  }
  const std::vector<std::string> texts = texts_of(tokens, *tokenizer);
  for (std::size_t first = 0; first < tokens.size();) {
    std::string text = texts[first];
    std::size_t last = first + 1;
    const auto whole = [&] { return utf8_prefix(text) == text.size(); };
    while (!whole() && last < tokens.size() && may_go_on(std::string_view(text).substr(utf8_prefix(text))))
      text += texts[last++];
    if (text.empty()) {
      pieces.push_back({tokenizer->piece(tokens[first]), first, last, true});
    } else if (whole()) {
      pieces.push_back({text, first, last, false});
    } else {
      last = first + 1;
      pieces.push_back({with_marks(texts[first]), first, last, true});
    }
    first = last;
  }
  return pieces;
}

std::string printable(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const bool c1 = byte == 0xC2 && i + 1 < text.size() && static_cast<unsigned char>(text[i + 1]) < 0xA0;
    if (c1)
      out += fmt::format("\\x{:02x}", static_cast<unsigned char>(text[++i]));
    else if (byte == '\n')
      out += "\\n";
    else if (byte == '\t')
      out += "\\t";
    else if (byte < 0x20 || byte == 0x7F)
      out += fmt::format("\\x{:02x}", byte);
    else
      out += text[i];
  }
  return out;
}

std::size_t columns_of(std::string_view text) {
  std::size_t columns = 0;
  for (const char32_t c : code_points(text)) columns += within(kNarrowless, c) ? 0 : within(kWide, c) ? 2 : 1;
  return columns;
}

}  // namespace fathom::routes
