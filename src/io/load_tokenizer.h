// Any tokenizer that Fathom reads, told apart by its content.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "src/io/tokenizer.h"

namespace fathom {

/// Of the bytes of a file: a tokenizer.json (JSON, make_bpe_tokenizer), or a SentencePiece model. `origin`
/// names it in errors. UserError: damaged, of neither kind, or with a feature that Fathom has not.
std::unique_ptr<Tokenizer> make_tokenizer(std::string_view bytes, const std::string& origin);

/// "bytes", or the path of a tokenizer's file.
std::unique_ptr<Tokenizer> load_tokenizer(const std::string& path_or_bytes);

}  // namespace fathom
