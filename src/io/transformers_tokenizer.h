// A tokenizer's files as Hugging Face transformers reads them (AutoTokenizer).
#pragma once

#include <map>
#include <string>

namespace fathom {

/// For a tokenizer of bytes: byte-level BPE without a merge, so that an id is a byte, and 256 ends a
/// document. File names and texts: tokenizer.json and tokenizer_config.json.
std::map<std::string, std::string> transformers_byte_tokenizer();

}  // namespace fathom
