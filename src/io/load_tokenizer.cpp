#include "src/io/load_tokenizer.h"

#include "src/io/atomic_file.h"
#include "src/io/bpe_tokenizer.h"
#include "src/io/sentencepiece_tokenizer.h"

namespace fathom {

std::unique_ptr<Tokenizer> make_tokenizer(std::string_view bytes, const std::string& origin) {
  const std::size_t first = bytes.find_first_not_of(" \t\r\n");
  // A SentencePiece model starts with the tag of a protobuf field, which no '{' is.
  if (first != std::string_view::npos && bytes[first] == '{') return make_bpe_tokenizer(bytes, origin);
  return make_sentencepiece(bytes, origin);
}

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& path_or_bytes) {
  if (path_or_bytes == "bytes") return std::make_unique<ByteTokenizer>();
  return make_tokenizer(read_file(path_or_bytes, "tokenizer"), path_or_bytes);
}

}  // namespace fathom
