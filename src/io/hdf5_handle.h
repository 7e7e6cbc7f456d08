// What the reader and the writer of Fathom's HDF5 files share: the library's lock, its errors, identifiers
// that close themselves, and element types. Private to src/io.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/io/hdf5_driver.h"

namespace fathom::hdf5 {

// One lock for the whole library, held by every public function of the reader and the writer. The first one
// to take it sets the library up: no printing of errors, and no clean-up at exit (a file that could not be
// closed must not disturb the exit).
class Library {
 public:
  Library() : lock_(mutex()) {
    static const bool ready = [] {
      H5dont_atexit();
      return H5open() >= 0;
    }();
    if (!ready) throw InternalError("[hdf5] the library cannot be initialised");
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
  }

 private:
  static std::recursive_mutex& mutex() {
    static std::recursive_mutex m;
    return m;
  }
  std::lock_guard<std::recursive_mutex> lock_;
};

// What the library says of the last failure, innermost reason first; clears its stack.
std::string library_error();

// An HDF5 identifier and the function that closes it.
class Handle {
 public:
  Handle() = default;
  Handle(hid_t id, herr_t (*close)(hid_t)) : id_(id), close_(close) {}
  ~Handle() { reset(); }
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Handle& operator=(Handle&& other) noexcept {
    if (this != &other) {
      reset();
      id_ = std::exchange(other.id_, -1);
      close_ = other.close_;
    }
    return *this;
  }
  hid_t get() const { return id_; }
  explicit operator bool() const { return id_ >= 0; }
  herr_t reset() { return id_ >= 0 ? close_(std::exchange(id_, -1)) : 0; }

 private:
  hid_t id_ = -1;
  herr_t (*close_)(hid_t) = nullptr;
};

struct Element {
  const char* name;
  hid_t stored;  // little-endian, in the file
  hid_t native;  // in memory
  std::size_t size;
};

// A function, not a table: HDF5's type names are values that exist only once the library runs.
template <typename T>
Element element() {
  if constexpr (std::is_same_v<T, float>) return {"float32", H5T_IEEE_F32LE, H5T_NATIVE_FLOAT, 4};
  if constexpr (std::is_same_v<T, double>) return {"float64", H5T_IEEE_F64LE, H5T_NATIVE_DOUBLE, 8};
  if constexpr (std::is_same_v<T, std::int32_t>) return {"int32", H5T_STD_I32LE, H5T_NATIVE_INT32, 4};
  if constexpr (std::is_same_v<T, std::int64_t>) return {"int64", H5T_STD_I64LE, H5T_NATIVE_INT64, 8};
  if constexpr (std::is_same_v<T, std::uint8_t>) return {"uint8", H5T_STD_U8LE, H5T_NATIVE_UINT8, 1};
  if constexpr (std::is_same_v<T, std::uint16_t>) return {"uint16", H5T_STD_U16LE, H5T_NATIVE_UINT16, 2};
  if constexpr (std::is_same_v<T, std::uint32_t>) return {"uint32", H5T_STD_U32LE, H5T_NATIVE_UINT32, 4};
  if constexpr (std::is_same_v<T, std::uint64_t>) return {"uint64", H5T_STD_U64LE, H5T_NATIVE_UINT64, 8};
}

std::string shape_text(const std::vector<std::int64_t>& dims);
std::vector<hsize_t> to_hsize(const std::vector<std::int64_t>& dims);
Handle simple_space(const std::vector<hsize_t>& dims, const hsize_t* maximum = nullptr);

}  // namespace fathom::hdf5
