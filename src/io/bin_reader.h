// Token files of other programs: llm.c's .bin (a header of 256 int32, then uint16 or uint32 ids) and
// nanoGPT's .bin (uint16 ids, no header). `fathom data prepare` turns them into token stores.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace fathom {

/// Is `path` named as such a file?
bool is_bin_file(const std::string& path);

class BinReader {
 public:
  /// `end_of_document`: the id between documents, -1 when there is none. UserError when the file cannot be
  /// read, is of an unknown version, or is not as long as its header says.
  BinReader(const std::string& path, std::int32_t end_of_document);
  ~BinReader();

  /// The ids of the next document, its end-of-document token included (llm.c puts it in front, nanoGPT
  /// behind); at most 2^20 ids, then a document is cut. False at the end of the file.
  bool next(std::vector<std::int32_t>& ids);

  std::int64_t bytes_done() const;
  std::int64_t bytes_total() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace fathom
