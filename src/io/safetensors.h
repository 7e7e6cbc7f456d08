// Safetensors files (https://github.com/huggingface/safetensors, "Format"): the exchange of weights.
//
// A file is the length of its header (8 bytes, little-endian), the header (a JSON object: a tensor's name,
// its dtype, its shape and the range of its bytes), and the data without a gap. A reader maps the file and
// believes nothing: every range is checked before a byte of data is handed out, so no file, however made,
// reads outside of itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace fathom {

enum class SafetensorsType : std::uint8_t { Bool, U8, I8, I16, U16, I32, U32, I64, U64, F16, BF16, F32, F64 };

/// Bytes of an element.
std::size_t size_of(SafetensorsType t);
/// As the format writes it: "BF16".
const char* name_of(SafetensorsType t);

struct SafetensorsEntry {
  std::string name;
  SafetensorsType type = SafetensorsType::F32;
  std::vector<std::int64_t> shape;  // empty: a scalar

  std::int64_t elements() const;
  std::size_t bytes() const { return static_cast<std::size_t>(elements()) * size_of(type); }
};

/// Free text beside the tensors, under `__metadata__`.
using SafetensorsMetadata = std::map<std::string, std::string>;

/// Writes a file tensor by tensor, so that a model need not be in memory twice. What is at `path` stays until
/// commit (atomic_file.h). Equal content gives equal bytes.
class SafetensorsWriter {
 public:
  /// The data of `entries` is to follow in their order. UserError when `path` cannot be written;
  /// InternalError when two entries have one name or a dimension is negative.
  SafetensorsWriter(const std::string& path, std::vector<SafetensorsEntry> entries,
                    const SafetensorsMetadata& metadata = {});
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  /// All bytes of the next tensor. InternalError when it is not that one or they are not as many.
  void write(const std::string& name, std::span<const std::byte> data);
  /// InternalError when a tensor is missing. UserError when the disk refuses.
  void commit();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// A file, mapped. Copies share the mapping, and spans live as long as one of them.
class SafetensorsFile {
 public:
  /// UserError naming the path and what is wrong: cut off, a header that is no JSON or lies about ranges,
  /// shapes or dtypes, a name twice, bytes that belong to no tensor.
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const;
  const SafetensorsMetadata& metadata() const;
  /// In the order of their data.
  const std::vector<SafetensorsEntry>& entries() const;
  /// Null: there is none of that name.
  const SafetensorsEntry* find(const std::string& name) const;
  /// Its bytes, at any address. InternalError: there is none of that name.
  std::span<const std::byte> data(const std::string& name) const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

}  // namespace fathom
