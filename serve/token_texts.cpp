#include "serve/token_texts.h"

#include <algorithm>
#include <array>

#include <fmt/format.h>

#include "src/io/utf8.h"

namespace fathom::serve {

TokenTexts::TokenTexts(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {
  const auto vocab = static_cast<std::int32_t>(tokenizer.vocab_size());
  for (std::int32_t id = 0; id < vocab && before_ < 0; ++id) {
    const std::array<std::int32_t, 1> one = {id};
    const std::array<std::int32_t, 2> two = {id, id};
    const std::string text = tokenizer.decode(one);
    // One that reads the same wherever it stands.
    if (text.empty() || utf8_prefix(text) != text.size() || text == "\xEF\xBF\xBD" ||
        tokenizer.decode(two) != text + text)
      continue;
    before_ = id;
    before_bytes_ = text.size();
  }
  for (std::int32_t id = 0; id < vocab; ++id)
    longest_ = std::max({longest_, bytes(id).size(), tokenizer.piece(id).size()});
}

std::string TokenTexts::bytes(std::int32_t id) const {
  const std::array<std::int32_t, 2> ids = {before_, id};
  const std::string text =
      before_ < 0 ? tokenizer_.decode(std::span(ids).last(1)) : tokenizer_.decode(ids).substr(before_bytes_);
  return text.empty() ? tokenizer_.piece(id) : text;
}

std::string TokenTexts::shown(std::int32_t id) const {
  std::string text = bytes(id);
  if (utf8_prefix(text) == text.size()) return text;
  std::string out = "bytes:";
  for (const char c : text) out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
  return out;
}

}  // namespace fathom::serve
