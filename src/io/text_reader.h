// Documents from text files, one at a time, in constant memory (that of the longest document).
//
// FILE.jsonl and FILE.ndjson hold a JSON object a line, whose "text" is a document. Any other file is plain
// text: it is cut into documents at the first end of a paragraph (a blank line) after 16 KiB, at the latest
// after 1 MiB, so that a corpus in one file can be split into training and validation documents; the pieces
// together are the file. Either may be compressed, FILE.jsonl.xz for example (byte_source.h).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace fathom {

enum class InvalidUtf8 {
  Error,    // UserError that says where
  Replace,  // U+FFFD in the place of what is invalid
  Skip,     // the document is left out
};

InvalidUtf8 parse_invalid_utf8(const std::string& name);

struct TextReaderOptions {
  InvalidUtf8 invalid_utf8 = InvalidUtf8::Error;
  std::string field = "text";  // of each JSON line
};

class TextReader {
 public:
  /// UserError when one of the files cannot be opened.
  explicit TextReader(std::vector<std::string> paths, TextReaderOptions options = {});
  ~TextReader();

  /// The next document that is not empty, in the order of the files; false after the last one.
  /// UserError names the file and the line or byte of what is wrong.
  bool next(std::string& document);

  /// Bytes of the files read so far and of all files: the progress. Compressed sizes.
  std::int64_t bytes_done() const;
  std::int64_t bytes_total() const;
  /// Documents left out because of invalid UTF-8.
  std::int64_t skipped() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace fathom
