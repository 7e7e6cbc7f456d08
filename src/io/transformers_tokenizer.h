// A tokenizer's files as Hugging Face transformers reads them (AutoTokenizer).
#pragma once

#include <map>
#include <string>
#include <string_view>

namespace fathom {

/// For a tokenizer of bytes: byte-level BPE without a merge, so that an id is a byte, and 256 ends a
/// document. File names and texts: tokenizer.json and tokenizer_config.json.
std::map<std::string, std::string> transformers_byte_tokenizer();

/// For the bytes of a SentencePiece model: the model itself, tokenizer.model, and where Fathom trained it
/// also tokenizer.json and tokenizer_config.json, which give the same ids. Models of other programs normalise
/// text in ways of their own; those who read them have their own converters. UserError: no such model.
std::map<std::string, std::string> transformers_sentencepiece(std::string_view model,
                                                              const std::string& origin);

/// For the text of a tokenizer.json that make_bpe_tokenizer takes: the text itself, and the least
/// tokenizer_config.json that goes with it. UserError: no such text.
std::map<std::string, std::string> transformers_bpe(const std::string& json, const std::string& origin);

}  // namespace fathom
