// Reading Fathom's HDF5 files: verified first, parsed then.
#include <cerrno>
#include <cstring>
#include <map>
#include <utility>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/error.h"
#include "src/io/atomic_file.h"
#include "src/io/checksum.h"
#include "src/io/hdf5_driver.h"
#include "src/io/hdf5_elements.h"
#include "src/io/hdf5_file.h"
#include "src/io/hdf5_handle.h"
#include "src/io/user_block.h"

namespace fathom {

using namespace hdf5;  // NOLINT: the library's lock, identifiers and types, in a source file of its own

struct H5Reader::Impl {
  std::string path;
  DriverState driver;
  Handle file;
  UserBlock block;
  mutable std::map<std::string, Handle> datasets;  // opened once

  ~Impl() {
    const Library library;
    datasets.clear();
    file.reset();
    if (driver.fd >= 0) ::close(driver.fd);
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw UserError(
        fmt::format("{} is a {} that cannot be used: {}.", path, block.kind, what),
        "Its checksum is right, so it was written this way: make it anew with this version of Fathom.");
  }

  bool has(const std::string& name) const {
    // H5Lexists wants every group on the way to exist.
    for (std::size_t end = 0; end != std::string::npos;) {
      end = name.find('/', end + 1);
      const std::string part = name.substr(0, end);
      if (part.empty() || part == "/") continue;
      if (H5Lexists(file.get(), part.c_str(), H5P_DEFAULT) <= 0) {
        H5Eclear2(H5E_DEFAULT);
        return false;
      }
    }
    return true;
  }

  hid_t dataset(const std::string& name) const {
    const auto found = datasets.find(name);
    if (found != datasets.end()) return found->second.get();
    if (!has(name)) fail(fmt::format("it has no dataset {}", name));
    // No cache of chunks: a small read goes to the file's bytes directly instead of loading a whole chunk.
    const Handle access(H5Pcreate(H5P_DATASET_ACCESS), H5Pclose);
    if (!access || H5Pset_chunk_cache(access.get(), 0, 0, 0) < 0) fail(library_error());
    Handle handle(H5Dopen2(file.get(), name.c_str(), access.get()), H5Dclose);
    if (!handle) fail(fmt::format("{} is not a dataset ({})", name, library_error()));
    return datasets.emplace(name, std::move(handle)).first->second.get();
  }

  std::vector<std::int64_t> dims(const std::string& name) const {
    const Handle space(H5Dget_space(dataset(name)), H5Sclose);
    const int rank = space ? H5Sget_simple_extent_ndims(space.get()) : -1;
    if (rank < 0) fail(fmt::format("dataset {} has no shape ({})", name, library_error()));
    std::vector<hsize_t> sizes(static_cast<std::size_t>(rank));
    if (rank > 0) H5Sget_simple_extent_dims(space.get(), sizes.data(), nullptr);
    return {sizes.begin(), sizes.end()};
  }

  std::size_t count(const std::string& name) const {
    std::size_t product = 1;
    for (const std::int64_t d : dims(name)) product *= static_cast<std::size_t>(d);
    return product;
  }

  void check_type(const std::string& name, const Element& type) const {
    const Handle stored(H5Dget_type(dataset(name)), H5Tclose);
    if (!stored || H5Tequal(stored.get(), type.stored) <= 0) {
      H5Eclear2(H5E_DEFAULT);
      fail(fmt::format("dataset {} does not hold {}", name, type.name));
    }
  }

  void read_all(const std::string& name, const Element& type, void* out, std::size_t elements) const {
    if (elements > 0 && H5Dread(dataset(name), type.native, H5S_ALL, H5S_ALL, H5P_DEFAULT, out) < 0) {
      fail(fmt::format("dataset {} cannot be read ({})", name, library_error()));
    }
  }

  void read_rows(const std::string& name, const Element& type, std::int64_t first, void* out,
                 std::size_t elements) const {
    const std::vector<std::int64_t> shape = dims(name);
    if (shape.empty()) fail(fmt::format("dataset {} is a scalar, rows were expected", name));
    std::size_t row = 1;
    for (std::size_t i = 1; i < shape.size(); ++i) row *= static_cast<std::size_t>(shape[i]);
    if (row == 0 || elements % row != 0 || first < 0 ||
        static_cast<std::size_t>(first) + elements / row > static_cast<std::size_t>(shape[0])) {
      throw InternalError(
          fmt::format("[hdf5] {} elements from row {} of {} {}", elements, first, name, shape_text(shape)));
    }
    if (elements == 0) return;
    std::vector<hsize_t> start(shape.size(), 0);
    std::vector<hsize_t> size = to_hsize(shape);
    start[0] = static_cast<hsize_t>(first);
    size[0] = elements / row;
    const hid_t data = dataset(name);
    const Handle space(H5Dget_space(data), H5Sclose);
    const Handle memory = simple_space(size);
    const bool ok =
        space && memory &&
        H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, start.data(), nullptr, size.data(), nullptr) >= 0 &&
        H5Dread(data, type.native, memory.get(), space.get(), H5P_DEFAULT, out) >= 0;
    if (!ok) fail(fmt::format("dataset {} cannot be read ({})", name, library_error()));
  }

  bool has_attribute(const std::string& name, const std::string& object) const {
    if (object != "/" && !has(object)) return false;
    const htri_t exists = H5Aexists_by_name(file.get(), object.c_str(), name.c_str(), H5P_DEFAULT);
    H5Eclear2(H5E_DEFAULT);
    return exists > 0;
  }

  Handle attribute(const std::string& name, const std::string& object) const {
    if (!has_attribute(name, object)) fail(fmt::format("it has no attribute {} on {}", name, object));
    Handle handle(H5Aopen_by_name(file.get(), object.c_str(), name.c_str(), H5P_DEFAULT, H5P_DEFAULT),
                  H5Aclose);
    if (!handle) fail(fmt::format("attribute {} cannot be opened ({})", name, library_error()));
    return handle;
  }

  void get_scalar(const std::string& name, const std::string& object, const Element& type, void* out) const {
    const Handle handle = attribute(name, object);
    const Handle stored(H5Aget_type(handle.get()), H5Tclose);
    const Handle space(H5Aget_space(handle.get()), H5Sclose);
    if (!stored || !space || H5Tequal(stored.get(), type.stored) <= 0 ||
        H5Sget_simple_extent_npoints(space.get()) != 1) {
      H5Eclear2(H5E_DEFAULT);
      fail(fmt::format("attribute {} is not one {}", name, type.name));
    }
    if (H5Aread(handle.get(), type.native, out) < 0) {
      fail(fmt::format("attribute {} cannot be read ({})", name, library_error()));
    }
  }
};

H5Reader::H5Reader(const std::string& path, std::string_view kind) {
  auto impl = std::make_unique<Impl>();
  impl->path = path;
  impl->driver.fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (impl->driver.fd < 0) {
    throw UserError(fmt::format("cannot open the {} {}: {}.", kind, path, std::strerror(errno)));
  }
  impl->block =
      verify_file(impl->driver.fd, path, kind);  // outside the lock: it takes the time of reading the file
  const Library library;
  const Handle access(make_fd_access(impl->driver), H5Pclose);
  if (access) impl->file = Handle(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access.get()), H5Fclose);
  if (!impl->file) impl->fail(library_error());
  impl_ = std::move(impl);
}

H5Reader::~H5Reader() = default;
H5Reader::H5Reader(H5Reader&&) noexcept = default;
H5Reader& H5Reader::operator=(H5Reader&&) noexcept = default;

const std::string& H5Reader::path() const { return impl_->path; }
std::uint64_t H5Reader::checksum() const { return impl_->block.payload_checksum; }

bool H5Reader::has(const std::string& name) const {
  const Library library;
  return impl_->has(name);
}

std::vector<std::string> H5Reader::list(const std::string& group) const {
  const Library library;
  if (!impl_->has(group)) impl_->fail(fmt::format("it has no group {}", group));
  const Handle handle(H5Gopen2(impl_->file.get(), group.c_str(), H5P_DEFAULT), H5Gclose);
  H5G_info_t info{};
  if (!handle || H5Gget_info(handle.get(), &info) < 0) {
    impl_->fail(fmt::format("{} is not a group ({})", group, library_error()));
  }
  std::vector<std::string> names;
  for (hsize_t i = 0; i < info.nlinks; ++i) {
    const ssize_t size =
        H5Lget_name_by_idx(handle.get(), ".", H5_INDEX_NAME, H5_ITER_INC, i, nullptr, 0, H5P_DEFAULT);
    if (size < 0) impl_->fail(fmt::format("group {} cannot be listed ({})", group, library_error()));
    std::string name(static_cast<std::size_t>(size), '\0');
    H5Lget_name_by_idx(handle.get(), ".", H5_INDEX_NAME, H5_ITER_INC, i, name.data(), name.size() + 1,
                       H5P_DEFAULT);
    names.push_back(std::move(name));
  }
  return names;
}

std::vector<std::int64_t> H5Reader::dims(const std::string& name) const {
  const Library library;
  return impl_->dims(name);
}

template <typename T>
std::vector<T> H5Reader::read(const std::string& name) const {
  const Library library;
  impl_->check_type(name, element<T>());
  std::vector<T> out(impl_->count(name));
  impl_->read_all(name, element<T>(), out.data(), out.size());
  return out;
}

template <typename T>
void H5Reader::read_into(const std::string& name, std::span<T> out) const {
  const Library library;
  impl_->check_type(name, element<T>());
  if (impl_->count(name) != out.size()) {
    impl_->fail(fmt::format("dataset {} has the shape {}, {} elements were expected", name,
                            shape_text(impl_->dims(name)), out.size()));
  }
  impl_->read_all(name, element<T>(), out.data(), out.size());
}

template <typename T>
void H5Reader::read_rows(const std::string& name, std::int64_t first, std::span<T> out) const {
  const Library library;
  impl_->check_type(name, element<T>());
  impl_->read_rows(name, element<T>(), first, out.data(), out.size());
}

std::string H5Reader::read_text(const std::string& name) const {
  const std::vector<std::uint8_t> bytes = read<std::uint8_t>(name);
  return {bytes.begin(), bytes.end()};
}

bool H5Reader::has_attribute(const std::string& name, const std::string& object) const {
  const Library library;
  return impl_->has_attribute(name, object);
}

std::string H5Reader::get_string(const std::string& name, const std::string& object) const {
  const Library library;
  const Handle handle = impl_->attribute(name, object);
  const Handle type(H5Aget_type(handle.get()), H5Tclose);
  if (!type || H5Tget_class(type.get()) != H5T_STRING || H5Tis_variable_str(type.get()) != 0) {
    H5Eclear2(H5E_DEFAULT);
    impl_->fail(fmt::format("attribute {} is not a string", name));
  }
  std::string value(H5Tget_size(type.get()), '\0');
  if (H5Aread(handle.get(), type.get(), value.data()) < 0) {
    impl_->fail(fmt::format("attribute {} cannot be read ({})", name, library_error()));
  }
  return value.substr(0, value.find('\0'));
}

std::int64_t H5Reader::get_int(const std::string& name, const std::string& object) const {
  const Library library;
  std::int64_t value = 0;
  impl_->get_scalar(name, object, element<std::int64_t>(), &value);
  return value;
}

double H5Reader::get_double(const std::string& name, const std::string& object) const {
  const Library library;
  double value = 0;
  impl_->get_scalar(name, object, element<double>(), &value);
  return value;
}

#define FATHOM_H5_ELEMENT(T)                                                    \
  template std::vector<T> H5Reader::read<T>(const std::string&) const;          \
  template void H5Reader::read_into<T>(const std::string&, std::span<T>) const; \
  template void H5Reader::read_rows<T>(const std::string&, std::int64_t, std::span<T>) const;

FATHOM_FOR_EACH_H5_ELEMENT(FATHOM_H5_ELEMENT)
#undef FATHOM_H5_ELEMENT

}  // namespace fathom
