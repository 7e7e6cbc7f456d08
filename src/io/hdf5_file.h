// Fathom's HDF5 files: complete or absent when written, verified before they are parsed when read.
//
// A file is an HDF5 file with a user block of 512 bytes (docs/formats.md): magic, format version, kind,
// length and checksum of everything after the block, checksum of the block. The HDF5 library only ever sees
// bytes whose length and checksum are right. The library is not thread-safe, so every call takes one lock of
// the process.
//
// Names are paths inside the file, such as "parameters/model.norm.weight"; groups are made as needed. Data is
// stored little-endian. T is one of float, double, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace fathom {

/// The kinds of files, as they stand in the user block.
inline constexpr std::string_view kTokenStoreKind = "token store";
inline constexpr std::string_view kCheckpointKind = "checkpoint";
inline constexpr std::string_view kLogitsKind = "logits";

inline constexpr std::uint32_t kH5FormatVersion = 1;
inline constexpr std::size_t kH5UserBlockSize = 512;

class H5Writer {
 public:
  /// Opens a temporary file beside `path`. UserError when that is impossible, or when a file that is not of
  /// this kind stands at `path`.
  H5Writer(const std::string& path, std::string_view kind);
  /// Without commit, nothing of the file remains and what was at `path` is untouched.
  ~H5Writer();
  H5Writer(H5Writer&&) noexcept;
  H5Writer& operator=(H5Writer&&) noexcept;

  /// A dataset of shape `dims`; empty `dims` means one dimension of data.size().
  template <typename T>
  void write(const std::string& name, std::span<const T> data, const std::vector<std::int64_t>& dims = {});
  /// A text of any length (a config, a log), as a dataset of bytes.
  void write_text(const std::string& name, std::string_view text);

  /// A one-dimensional dataset that grows by `append`, stored in chunks of `chunk` elements.
  template <typename T>
  void create_stream(const std::string& name, std::int64_t chunk);
  template <typename T>
  void append(const std::string& name, std::span<const T> data);

  /// Attributes of an object ("/" is the file itself); strings of up to 60,000 bytes without NUL.
  void set_string(const std::string& name, std::string_view value, const std::string& object = "/");
  void set_int(const std::string& name, std::int64_t value, const std::string& object = "/");
  void set_double(const std::string& name, double value, const std::string& object = "/");

  /// Closes the HDF5 file, writes the user block and flushes to the disk; only commit may follow.
  /// UserError naming the path and the reason when any write failed; the previous file then remains.
  void finish();
  /// finish, unless that is done, and puts the file in place.
  void commit();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

class H5Reader {
 public:
  /// Verifies length, kind and checksum, then opens. UserError says what is wrong with the file.
  H5Reader(const std::string& path, std::string_view kind);
  ~H5Reader();
  H5Reader(H5Reader&&) noexcept;
  H5Reader& operator=(H5Reader&&) noexcept;

  const std::string& path() const;
  /// The checksum of everything after the user block, which was verified: the identity of the content.
  std::uint64_t checksum() const;

  bool has(const std::string& name) const;
  /// Names in a group, sorted; "/" is the file itself.
  std::vector<std::string> list(const std::string& group = "/") const;
  std::vector<std::int64_t> dims(const std::string& name) const;

  /// The whole dataset. UserError when it is absent or of another type.
  template <typename T>
  std::vector<T> read(const std::string& name) const;
  /// The whole dataset into `out`. UserError when it is absent, of another type or of another number of
  /// elements.
  template <typename T>
  void read_into(const std::string& name, std::span<T> out) const;
  /// Rows first, first + 1, ... (along the first dimension) until `out` is full; `out` holds whole rows.
  template <typename T>
  void read_rows(const std::string& name, std::int64_t first, std::span<T> out) const;
  std::string read_text(const std::string& name) const;

  bool has_attribute(const std::string& name, const std::string& object = "/") const;
  std::string get_string(const std::string& name, const std::string& object = "/") const;
  std::int64_t get_int(const std::string& name, const std::string& object = "/") const;
  double get_double(const std::string& name, const std::string& object = "/") const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace fathom
