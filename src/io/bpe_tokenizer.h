// Byte-level BPE of other programs, from a tokenizer.json: GPT-2's, Llama 3's, Qwen3's.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "src/io/tokenizer.h"

namespace fathom {

/// A tokenizer from the text of a tokenizer.json; `origin` names it in errors, which are
/// parse_tokenizer_json's. Its ids of valid UTF-8 are those of Hugging Face tokenizers without special tokens
/// around them: tokens that were added, special ones too, are found in the text. A byte that is no part of
/// valid UTF-8 is its own token, and what stands before and behind it is encoded by itself. NFC is not
/// applied: a text that is not in NFC gets the ids of what it is, and so comes back exactly.
///
/// The token that ends a document is the special one of a name that is known to (docs/formats.md), or -1.
std::unique_ptr<Tokenizer> make_bpe_tokenizer(std::string_view json, const std::string& origin);

}  // namespace fathom
