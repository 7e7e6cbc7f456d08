#include "src/io/hdf5_file.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <type_traits>
#include <utility>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/error.h"
#include "src/io/atomic_file.h"
#include "src/io/checksum.h"
#include "src/io/hdf5_driver.h"
#include "src/io/user_block.h"

namespace fathom {

namespace {

// One lock for the whole library, held by every public function below. The first one to take it sets the
// library up: no printing of errors, and no clean-up at exit (a file that could not be closed must not
// disturb the exit).
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
std::string library_error() {
  std::string text;
  H5Ewalk2(
      H5E_DEFAULT, H5E_WALK_UPWARD,
      [](unsigned n, const H5E_error2_t* error, void* out) -> herr_t {
        auto& message = *static_cast<std::string*>(out);
        if (n < 3 && error->desc != nullptr) message += (n == 0 ? "" : "; ") + std::string(error->desc);
        return 0;
      },
      &text);
  H5Eclear2(H5E_DEFAULT);
  return text.empty() ? "unknown HDF5 error" : text;
}

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

std::string shape_text(const std::vector<std::int64_t>& dims) {
  return fmt::format("[{}]", fmt::join(dims, ", "));
}

std::vector<hsize_t> to_hsize(const std::vector<std::int64_t>& dims) { return {dims.begin(), dims.end()}; }

Handle simple_space(const std::vector<hsize_t>& dims, const hsize_t* maximum = nullptr) {
  return {H5Screate_simple(static_cast<int>(dims.size()), dims.data(), maximum), H5Sclose};
}

constexpr std::size_t kMaxStringAttribute = 60000;  // an HDF5 object header holds at most 64 KiB

}  // namespace

// ----------------------------------------------------------------------------------------------------
// writing

// A dataset that grows, and what was appended but does not fill a chunk yet.
struct Stream {
  Handle dataset;
  Element type{};
  std::size_t chunk_bytes = 0;
  std::uint64_t written = 0;  // elements in the file
  std::vector<std::byte> pending;
};

struct H5Writer::Impl {
  AtomicFile out;
  std::string kind;
  DriverState driver;
  Handle file;
  std::map<std::string, Stream> streams;

  Impl(const std::string& path, std::string_view file_kind) : out(path), kind(file_kind) {
    driver.fd = out.fd();
  }

  // Streams and the file are closed before the descriptor and the driver's state go away.
  ~Impl() {
    const Library library;
    streams.clear();
    file.reset();
    H5Eclear2(H5E_DEFAULT);
  }

  // After a call to the library: did the disk refuse, or did the library?
  void check(bool ok, const char* what, const std::string& name) {
    if (driver.error != 0) AtomicFile::fail(out.path(), "cannot write", driver.error);
    if (!ok)
      throw InternalError(fmt::format("[hdf5] {} {} in {}: {}", what, name, out.path(), library_error()));
  }

  Handle create_dataset(const std::string& name, const Element& type, const Handle& space,
                        const std::vector<hsize_t>& chunk) {
    const Handle links(H5Pcreate(H5P_LINK_CREATE), H5Pclose);
    const Handle creation(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
    // No times in the file: equal content gives equal bytes.
    bool ok = links && creation && space && H5Pset_create_intermediate_group(links.get(), 1) >= 0 &&
              H5Pset_obj_track_times(creation.get(), 0) >= 0;
    if (ok && !chunk.empty())
      ok = H5Pset_chunk(creation.get(), static_cast<int>(chunk.size()), chunk.data()) >= 0;
    check(ok, "cannot describe", name);
    Handle dataset(H5Dcreate2(file.get(), name.c_str(), type.stored, space.get(), links.get(), creation.get(),
                              H5P_DEFAULT),
                   H5Dclose);
    check(static_cast<bool>(dataset), "cannot create", name);
    return dataset;
  }

  void write(const std::string& name, const Element& type, const void* data, std::size_t count,
             std::vector<std::int64_t> dims) {
    if (dims.empty()) dims = {static_cast<std::int64_t>(count)};
    std::size_t product = 1;
    for (const std::int64_t d : dims) product *= static_cast<std::size_t>(d);
    if (product != count) {
      throw InternalError(
          fmt::format("[hdf5] {} has {} elements, its shape is {}", name, count, shape_text(dims)));
    }
    const Handle space = simple_space(to_hsize(dims));
    Handle dataset = create_dataset(name, type, space, {});
    if (count > 0) {
      check(H5Dwrite(dataset.get(), type.native, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) >= 0, "cannot write",
            name);
    }
    check(dataset.reset() >= 0, "cannot close", name);
  }

  void create_stream(const std::string& name, const Element& type, std::int64_t chunk) {
    const hsize_t unlimited = H5S_UNLIMITED;
    const Handle space = simple_space({0}, &unlimited);
    Stream stream;
    stream.dataset = create_dataset(name, type, space, {static_cast<hsize_t>(chunk)});
    stream.type = type;
    stream.chunk_bytes = static_cast<std::size_t>(chunk) * type.size;
    if (!streams.emplace(name, std::move(stream)).second)
      throw InternalError("[hdf5] stream made twice: " + name);
  }

  void append(const std::string& name, const Element& type, std::span<const std::byte> bytes) {
    const auto found = streams.find(name);
    if (found == streams.end()) throw InternalError("[hdf5] no such stream: " + name);
    Stream& stream = found->second;
    if (stream.type.stored != type.stored) {
      throw InternalError(
          fmt::format("[hdf5] stream {} holds {}, not {}", name, stream.type.name, type.name));
    }
    while (!bytes.empty()) {
      const std::size_t take = std::min(bytes.size(), stream.chunk_bytes - stream.pending.size());
      stream.pending.insert(stream.pending.end(), bytes.begin(),
                            bytes.begin() + static_cast<std::ptrdiff_t>(take));
      bytes = bytes.subspan(take);
      if (stream.pending.size() == stream.chunk_bytes) flush(name, stream);
    }
  }

  void flush(const std::string& name, Stream& stream) {
    if (stream.pending.empty()) return;
    const hsize_t start = stream.written;
    const hsize_t count = stream.pending.size() / stream.type.size;
    const hsize_t total = start + count;
    bool ok = H5Dset_extent(stream.dataset.get(), &total) >= 0;
    const Handle memory = simple_space({count});
    const Handle space(H5Dget_space(stream.dataset.get()), H5Sclose);
    ok = ok && memory && space &&
         H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, &start, nullptr, &count, nullptr) >= 0 &&
         H5Dwrite(stream.dataset.get(), stream.type.native, memory.get(), space.get(), H5P_DEFAULT,
                  stream.pending.data()) >= 0;
    check(ok, "cannot extend", name);
    stream.written = total;
    stream.pending.clear();
  }

  void set_attribute(const std::string& name, const std::string& object, hid_t stored, hid_t native,
                     const void* value) {
    const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
    const Handle attribute(H5Acreate_by_name(file.get(), object.c_str(), name.c_str(), stored, space.get(),
                                             H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT),
                           H5Aclose);
    check(attribute && H5Awrite(attribute.get(), native, value) >= 0, "cannot write the attribute", name);
  }
};

H5Writer::H5Writer(const std::string& path, std::string_view kind) {
  const Library library;
  impl_ = std::make_unique<Impl>(path, kind);
  const Handle access(make_fd_access(impl_->driver), H5Pclose);
  const Handle creation(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  const bool ok = access && creation && H5Pset_userblock(creation.get(), kH5UserBlockSize) >= 0 &&
                  H5Pset_obj_track_times(creation.get(), 0) >= 0;
  impl_->check(ok, "cannot prepare", path);
  impl_->file = Handle(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, creation.get(), access.get()), H5Fclose);
  impl_->check(static_cast<bool>(impl_->file), "cannot create", path);
}

H5Writer::~H5Writer() = default;
H5Writer::H5Writer(H5Writer&&) noexcept = default;
H5Writer& H5Writer::operator=(H5Writer&&) noexcept = default;

template <typename T>
void H5Writer::write(const std::string& name, std::span<const T> data,
                     const std::vector<std::int64_t>& dims) {
  const Library library;
  impl_->write(name, element<T>(), data.data(), data.size(), dims);
}

void H5Writer::write_text(const std::string& name, std::string_view text) {
  write<std::uint8_t>(name, {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
}

template <typename T>
void H5Writer::create_stream(const std::string& name, std::int64_t chunk) {
  const Library library;
  impl_->create_stream(name, element<T>(), chunk);
}

template <typename T>
void H5Writer::append(const std::string& name, std::span<const T> data) {
  const Library library;
  impl_->append(name, element<T>(), std::as_bytes(data));
}

void H5Writer::set_string(const std::string& name, std::string_view value, const std::string& object) {
  const Library library;
  if (value.size() > kMaxStringAttribute || value.find('\0') != std::string_view::npos) {
    throw InternalError(fmt::format("[hdf5] attribute {} of {} bytes: use write_text", name, value.size()));
  }
  const Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
  const bool ok = type && H5Tset_size(type.get(), std::max<std::size_t>(value.size(), 1)) >= 0 &&
                  H5Tset_strpad(type.get(), H5T_STR_NULLPAD) >= 0 &&
                  H5Tset_cset(type.get(), H5T_CSET_UTF8) >= 0;
  impl_->check(ok, "cannot describe the attribute", name);
  const std::string padded = value.empty() ? std::string(1, '\0') : std::string(value);
  impl_->set_attribute(name, object, type.get(), type.get(), padded.data());
}

void H5Writer::set_int(const std::string& name, std::int64_t value, const std::string& object) {
  const Library library;
  impl_->set_attribute(name, object, H5T_STD_I64LE, H5T_NATIVE_INT64, &value);
}

void H5Writer::set_double(const std::string& name, double value, const std::string& object) {
  const Library library;
  impl_->set_attribute(name, object, H5T_IEEE_F64LE, H5T_NATIVE_DOUBLE, &value);
}

void H5Writer::commit() {
  const Library library;
  for (auto& [name, stream] : impl_->streams) impl_->flush(name, stream);
  impl_->streams.clear();
  impl_->check(impl_->file.reset() >= 0, "cannot close", impl_->out.path());
  struct stat status {};
  if (::fstat(impl_->out.fd(), &status) != 0) AtomicFile::fail(impl_->out.path(), "cannot write", errno);
  UserBlock block;
  block.kind = impl_->kind;
  block.payload_bytes = static_cast<std::uint64_t>(status.st_size) - kH5UserBlockSize;
  block.payload_checksum =
      checksum_file(impl_->out.fd(), kH5UserBlockSize, block.payload_bytes, impl_->out.path());
  impl_->out.write_at(0, encode_user_block(block));
  impl_->out.commit();
}

// ----------------------------------------------------------------------------------------------------
// reading

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
  template void H5Writer::write<T>(const std::string&, std::span<const T>,      \
                                   const std::vector<std::int64_t>&);           \
  template void H5Writer::create_stream<T>(const std::string&, std::int64_t);   \
  template void H5Writer::append<T>(const std::string&, std::span<const T>);    \
  template std::vector<T> H5Reader::read<T>(const std::string&) const;          \
  template void H5Reader::read_into<T>(const std::string&, std::span<T>) const; \
  template void H5Reader::read_rows<T>(const std::string&, std::int64_t, std::span<T>) const;

FATHOM_H5_ELEMENT(float)
FATHOM_H5_ELEMENT(double)
FATHOM_H5_ELEMENT(std::int32_t)
FATHOM_H5_ELEMENT(std::int64_t)
FATHOM_H5_ELEMENT(std::uint8_t)
FATHOM_H5_ELEMENT(std::uint16_t)
FATHOM_H5_ELEMENT(std::uint32_t)
FATHOM_H5_ELEMENT(std::uint64_t)
#undef FATHOM_H5_ELEMENT

}  // namespace fathom
