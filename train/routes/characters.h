// Tokens as they can be read: a token may be a word, a control token, or one byte of a character.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "src/io/tokenizer.h"

namespace fathom::routes {

/// Tokens [first, last) of a text that are shown as one.
struct Piece {
  std::string text;  // UTF-8
  std::size_t first = 0, last = 0;
  bool mark = false;  // stands for a token without text of its own: <end of document>, <0xE2>, <17>
};

/// Each token is a piece; but tokens that are the bytes of one character are one piece together, and bytes
/// that make no character are shown as <0xE2>. Without a tokenizer the ids are all there is.
std::vector<Piece> pieces_of(const std::vector<std::int32_t>& tokens, const Tokenizer* tokenizer);

/// `text` for one line of a terminal: control characters (C1 too, which some terminals obey) as \n, \t, \xNN.
std::string printable(std::string_view text);

/// Columns of a terminal that `text` (UTF-8, no control characters) takes: two for East Asian wide characters
/// and emoji, none for combining marks.
std::size_t columns_of(std::string_view text);

}  // namespace fathom::routes
