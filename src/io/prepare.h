// Text to token stores: `fathom data prepare`.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "src/io/text_reader.h"

namespace fathom {

struct PrepareProgress {
  std::int64_t bytes_done = 0;  // of the input files
  std::int64_t bytes_total = 0;
  std::int64_t documents = 0;
  std::int64_t tokens = 0;
};

struct PrepareOptions {
  std::vector<std::string> inputs;  // text, JSON lines, compressed or not; or llm.c and nanoGPT .bin files
  std::string output;               // the token store
  std::string tokenizer = "bytes";  // "bytes" or the path of a SentencePiece model; not used for .bin
  double valid_fraction = 0;        // share of the documents that go to valid_path(output), in [0, 1)
  TextReaderOptions text;
  int threads = 0;                                          // 0: all cores
  std::int64_t external_vocab = 0;                          // .bin: the vocabulary's size
  std::int32_t external_end = -1;                           // .bin: the id between documents; -1: none
  std::function<void(const PrepareProgress&)> on_progress;  // called often; may be empty
};

struct PreparedStore {
  std::string path;
  std::int64_t documents = 0;
  std::int64_t tokens = 0;
  std::int64_t text_bytes = 0;
};

struct PrepareResult {
  PreparedStore train;
  std::optional<PreparedStore> valid;
  std::int64_t skipped = 0;  // documents left out because of invalid UTF-8
  std::string warning;       // empty: none
};

/// Encodes every document on all cores and writes the store, or the two stores. The stores do not depend on
/// the number of threads. UserError when something cannot be read, encoded or written, or would replace
/// an input or a file that is no token store; no file is touched then.
PrepareResult prepare(const PrepareOptions& options);

/// Where the validation store of `output` goes: x.valid.h5 beside x.h5.
std::string valid_path(const std::string& output);

/// The side that a document falls on: a pure function of its content, so that equal documents never end up on
/// both.
bool goes_to_valid(std::string_view document, double valid_fraction);

}  // namespace fathom
