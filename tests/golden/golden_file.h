// Reads the golden files, which are plain HDF5 (not Fathom's own container).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fathom::golden {

class GoldenFile {
 public:
  /// A file of this folder, "dense.h5". Throws std::runtime_error when it is missing or malformed, as all
  /// below do.
  explicit GoldenFile(const std::string& name);
  ~GoldenFile();
  GoldenFile(const GoldenFile&) = delete;
  GoldenFile& operator=(const GoldenFile&) = delete;

  bool has(const std::string& path) const;
  /// All elements of a data set, whatever its type, row-major.
  std::vector<double> doubles(const std::string& path) const;
  std::vector<std::int32_t> ints(const std::string& path) const;
  /// A scalar data set.
  double number(const std::string& path) const { return doubles(path).at(0); }
  /// A scalar attribute of the file.
  double attribute(const std::string& name) const;
  bool has_attribute(const std::string& name) const;
  /// The names in a group.
  std::vector<std::string> names(const std::string& group) const;

 private:
  template <typename T>
  std::vector<T> read(const std::string& path, std::int64_t memory_type) const;

  std::string name_;
  std::int64_t file_ = -1;  // hid_t
};

}  // namespace fathom::golden
