// Writing Fathom's HDF5 files.
#include <algorithm>
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
#include "src/io/output_file.h"
#include "src/io/user_block.h"

namespace fathom {

using namespace hdf5;  // NOLINT: the library's lock, identifiers and types, in a source file of its own

namespace {
constexpr std::size_t kMaxStringAttribute = 60000;  // an HDF5 object header holds at most 64 KiB
}  // namespace

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
  const std::string what = kind == kLogitsKind ? std::string(kind) : fmt::format("a {}", kind);
  require_replaceable(path, what, [kind](const std::string& file) { return claimed_kind(file) == kind; });
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

void H5Writer::finish() {
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
  impl_->out.flush();
}

void H5Writer::commit() {
  if (impl_->file) finish();
  impl_->out.commit();
}

#define FATHOM_H5_ELEMENT(T)                                                  \
  template void H5Writer::write<T>(const std::string&, std::span<const T>,    \
                                   const std::vector<std::int64_t>&);         \
  template void H5Writer::create_stream<T>(const std::string&, std::int64_t); \
  template void H5Writer::append<T>(const std::string&, std::span<const T>);

FATHOM_FOR_EACH_H5_ELEMENT(FATHOM_H5_ELEMENT)
#undef FATHOM_H5_ELEMENT

}  // namespace fathom
