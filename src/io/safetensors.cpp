#include "src/io/safetensors.h"

#include <bit>
#include <cerrno>
#include <cstring>
#include <unordered_map>
#include <utility>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/error.h"
#include "src/io/atomic_file.h"
#include "src/io/safetensors_header.h"

namespace fathom {

namespace {

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

constexpr std::size_t kLengthBytes = 8;

[[noreturn]] void fail_to_open(const std::string& path, int error) {
  throw UserError(fmt::format("cannot open the safetensors file {}: {}.", path, std::strerror(error)));
}

// A whole file, mapped for reading.
class Mapping {
 public:
  explicit Mapping(const std::string& path) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) fail_to_open(path, errno);
    struct stat status {};
    const bool known = ::fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
    const int error = known ? 0 : S_ISDIR(status.st_mode) ? EISDIR : EINVAL;
    if (known && status.st_size > 0) {
      bytes_ = static_cast<std::size_t>(status.st_size);
      data_ = ::mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, fd, 0);
    }
    const int why = data_ == MAP_FAILED ? errno : error;
    ::close(fd);
    if (why != 0) fail_to_open(path, why);
  }
  ~Mapping() {
    if (data_ != nullptr && data_ != MAP_FAILED) ::munmap(data_, bytes_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), bytes_}; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace

struct SafetensorsWriter::Impl {
  Impl(const std::string& path, std::vector<SafetensorsEntry> e) : file(path), entries(std::move(e)) {}
  AtomicFile file;
  std::vector<SafetensorsEntry> entries;
  std::size_t next = 0;
};

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<SafetensorsEntry> entries,
                                     const SafetensorsMetadata& metadata) {
  const std::string header = safetensors_header(entries, metadata);
  impl_ = std::make_unique<Impl>(path, std::move(entries));
  const auto length = static_cast<std::uint64_t>(header.size());
  impl_->file.write(std::as_bytes(std::span(&length, 1)));
  impl_->file.write(header);
}

SafetensorsWriter::~SafetensorsWriter() = default;

void SafetensorsWriter::write(const std::string& name, std::span<const std::byte> data) {
  const bool is_next = impl_->next < impl_->entries.size() && impl_->entries[impl_->next].name == name;
  if (!is_next || impl_->entries[impl_->next].bytes() != data.size()) {
    throw InternalError(
        fmt::format("[safetensors] {} of {} bytes is not what comes next", name, data.size()));
  }
  impl_->file.write(data);
  ++impl_->next;
}

void SafetensorsWriter::commit() {
  if (impl_->next != impl_->entries.size()) {
    throw InternalError(fmt::format("[safetensors] {} was not written", impl_->entries[impl_->next].name));
  }
  impl_->file.commit();
}

struct SafetensorsFile::Impl {
  explicit Impl(const std::string& p) : path(p), mapping(p) {
    const std::span<const std::byte> all = mapping.bytes();
    const auto refuse = [&](const std::string& why) {
      throw UserError(fmt::format("{} is not a usable safetensors file: {}.", path, why));
    };
    std::uint64_t length = 0;
    if (all.size() < kLengthBytes) refuse(fmt::format("it has {} bytes", all.size()));
    std::memcpy(&length, all.data(), kLengthBytes);
    if (length > kMaxSafetensorsHeader) refuse(fmt::format("its header would be of {} bytes", length));
    if (length > all.size() - kLengthBytes) {
      refuse(fmt::format("its header is of {} bytes, and the file ends before that", length));
    }
    const auto* text = reinterpret_cast<const char*>(all.data()) + kLengthBytes;
    data = all.subspan(kLengthBytes + length);
    header = parse_safetensors_header({text, length}, data.size(), path);
    for (std::size_t i = 0; i < header.entries.size(); ++i) by_name.emplace(header.entries[i].name, i);
  }

  std::string path;
  Mapping mapping;
  std::span<const std::byte> data;
  SafetensorsHeader header;
  std::unordered_map<std::string, std::size_t> by_name;
};

SafetensorsFile::SafetensorsFile(const std::string& path) : impl_(std::make_shared<const Impl>(path)) {}

const std::string& SafetensorsFile::path() const { return impl_->path; }
const SafetensorsMetadata& SafetensorsFile::metadata() const { return impl_->header.metadata; }
const std::vector<SafetensorsEntry>& SafetensorsFile::entries() const { return impl_->header.entries; }

const SafetensorsEntry* SafetensorsFile::find(const std::string& name) const {
  const auto found = impl_->by_name.find(name);
  return found == impl_->by_name.end() ? nullptr : &impl_->header.entries[found->second];
}

std::span<const std::byte> SafetensorsFile::data(const std::string& name) const {
  const auto found = impl_->by_name.find(name);
  if (found == impl_->by_name.end()) {
    throw InternalError(fmt::format("[safetensors] {} has no tensor {}", impl_->path, name));
  }
  return impl_->data.subspan(impl_->header.begins[found->second],
                             impl_->header.entries[found->second].bytes());
}

}  // namespace fathom
