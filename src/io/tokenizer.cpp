#include "src/io/tokenizer.h"

#include <algorithm>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/io/utf8.h"

namespace fathom {

std::vector<std::int32_t> ByteTokenizer::encode(std::string_view text) const {
  std::vector<std::int32_t> ids(text.size());
  for (std::size_t i = 0; i < text.size(); ++i) ids[i] = static_cast<unsigned char>(text[i]);
  return ids;
}

std::string ByteTokenizer::decode(std::span<const std::int32_t> ids) const {
  std::string text;
  text.reserve(ids.size());
  for (const std::int32_t id : ids) {
    if (id < 0 || id >= vocab_size()) {
      throw UserError(
          fmt::format("the token id {} is outside the byte vocabulary [0, {}).", id, vocab_size()));
    }
    if (id != kEndOfDocument) text.push_back(static_cast<char>(id));
  }
  return text;
}

std::string ByteTokenizer::piece(std::int32_t id) const {
  if (id == kEndOfDocument) return "<end of document>";
  return escape_text(decode(std::span(&id, 1)));
}

std::string escape_text(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const std::size_t valid = utf8_prefix(text);
    for (const char c : text.substr(0, valid)) {
      if (c == '\n')
        out += "\\n";
      else if (c == '\t')
        out += "\\t";
      else if (c == '\r')
        out += "\\r";
      else if (c == '"' || c == '\\')
        out += {'\\', c};
      else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f)
        out += fmt::format("\\x{:02x}", c);
      else
        out += c;
    }
    if (valid < text.size()) out += fmt::format("\\x{:02x}", static_cast<unsigned char>(text[valid]));
    text.remove_prefix(std::min(text.size(), valid + 1));
  }
  return out;
}

}  // namespace fathom
