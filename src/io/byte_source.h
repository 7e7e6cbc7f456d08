// The bytes of a file, decompressed when it is gzip, xz or Zstandard (told by its first bytes), in constant
// memory. Files that are several compressed members one after the other give all of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace fathom {

class ByteSource {
 public:
  virtual ~ByteSource() = default;

  /// Fills `out` as far as there are bytes; returns how many: less than out.size() only at the end.
  /// UserError when the file cannot be read, or its compressed stream is damaged or ends too early.
  virtual std::size_t read(std::span<char> out) = 0;
  /// Bytes of the file itself that were read so far (compressed ones, if it is).
  virtual std::int64_t consumed() const = 0;
};

/// UserError when `path` cannot be opened, is a folder, or is named .gz, .xz or .zst and is nothing of the
/// kind.
std::unique_ptr<ByteSource> open_bytes(const std::string& path);

}  // namespace fathom
