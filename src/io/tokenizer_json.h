// What a tokenizer.json says, of those that hold byte-level BPE: as GPT-2, Llama 3 and Qwen3 are published.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "src/io/bpe_merges.h"
#include "src/io/pre_tokenizer.h"

namespace fathom {

struct AddedToken {
  std::int32_t id = 0;
  std::string content;
  bool special = false;     // controls, and gives no text
  bool normalized = false;  // is looked for after those that are not
};

struct TokenizerJson {
  std::vector<std::string>
      texts;  // of each id, as bytes; empty: no token has this id, or it is a special one
  std::unordered_map<std::string, std::int32_t> words;  // ids of the vocabulary, by bytes
  std::array<std::int32_t, 256> byte_ids{};
  BpeMerges merges;
  bool ignore_merges = false;  // a word that is a token is that token, whatever the merges would make of it
  PreTokenizer pre_tokenizer;
  std::vector<AddedToken> added;
  bool normalizes = false;  // to NFC
  std::int32_t bos = -1;    // what the post-processor puts before a text; -1: nothing
};

/// `origin` names the file in errors. UserError: no JSON, no byte-level BPE, a token that is missing or
/// stands twice, or a feature that Fathom has not, which is named.
TokenizerJson parse_tokenizer_json(std::string_view text, const std::string& origin);

}  // namespace fathom
