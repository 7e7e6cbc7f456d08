#include "src/io/user_block.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <span>
#include <vector>

#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/error.h"
#include "src/io/checksum.h"
#include "src/io/damaged_file.h"
#include "src/io/hdf5_file.h"
#include "src/io/output_file.h"

namespace fathom {

namespace {

static_assert(std::endian::native == std::endian::little, "the user block is written as it lies in memory");

// As in PNG: a transfer as text damages the line ends and is noticed.
constexpr std::string_view kMagic("FATHOM\r\n\x1a", 9);
constexpr std::string_view kHdf5Magic("\x89HDF\r\n\x1a\n", 8);
constexpr std::size_t kKindBytes = 64;

struct RawBlock {
  char magic[16];
  std::uint32_t version;
  std::uint32_t reserved;
  std::uint64_t payload_bytes;
  std::uint64_t payload_checksum;
  char kind[kKindBytes];
  char padding[400];
  std::uint64_t block_checksum;  // of everything before it
};
static_assert(sizeof(RawBlock) == kH5UserBlockSize);

std::uint64_t checksum_of(const RawBlock& raw) {
  return checksum64(std::as_bytes(std::span(&raw, 1)).first(offsetof(RawBlock, block_checksum)));
}

// Fills as much of `out` as the file has at `offset`; returns the number of bytes.
std::size_t read_at(int fd, std::uint64_t offset, std::span<std::byte> out, const std::string& path) {
  std::size_t done = 0;
  while (done < out.size()) {
    const ssize_t n = ::pread(fd, out.data() + done, out.size() - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw UserError(fmt::format("cannot read {}: {}.", path, std::strerror(errno)));
    if (n == 0) break;
    done += static_cast<std::size_t>(n);
  }
  return done;
}

const char* article(std::string_view noun) {
  return !noun.empty() && std::string_view("aeiou").find(noun[0]) != std::string_view::npos ? "an" : "a";
}

}  // namespace

std::array<std::byte, 512> encode_user_block(const UserBlock& block) {
  if (block.kind.size() >= kKindBytes) throw InternalError("[user block] kind is too long: " + block.kind);
  RawBlock raw{};
  kMagic.copy(raw.magic, kMagic.size());
  raw.version = kH5FormatVersion;
  raw.payload_bytes = block.payload_bytes;
  raw.payload_checksum = block.payload_checksum;
  block.kind.copy(raw.kind, block.kind.size());
  raw.block_checksum = checksum_of(raw);
  return std::bit_cast<std::array<std::byte, 512>>(raw);
}

std::uint64_t checksum_file(int fd, std::uint64_t offset, std::uint64_t size, const std::string& path) {
  StreamingHash hash;
  std::vector<std::byte> buffer(std::size_t{1} << 20);
  while (size > 0) {
    const auto want = static_cast<std::size_t>(std::min<std::uint64_t>(size, buffer.size()));
    const std::size_t got = read_at(fd, offset, std::span(buffer).first(want), path);
    if (got == 0) throw DamagedFile(fmt::format("{} became shorter while it was being read.", path));
    hash.update(std::span(buffer).first(got));
    offset += got;
    size -= got;
  }
  return hash.digest64();
}

std::string claimed_kind(const std::string& path) {
  const std::string start = start_of_file(path, kH5UserBlockSize);
  if (start.size() < kH5UserBlockSize || !start.starts_with(kMagic)) return {};
  const char* kind = start.data() + offsetof(RawBlock, kind);
  return {kind, ::strnlen(kind, kKindBytes)};
}

UserBlock verify_file(int fd, const std::string& path, std::string_view kind) {
  struct stat status {};
  if (::fstat(fd, &status) != 0)
    throw UserError(fmt::format("cannot read {}: {}.", path, std::strerror(errno)));
  if (!S_ISREG(status.st_mode))
    throw UserError(fmt::format("{} is not a regular file; expected a {}.", path, kind));
  const auto actual = static_cast<std::uint64_t>(status.st_size);
  if (actual == 0) throw DamagedFile(fmt::format("{} is empty; expected {} {}.", path, article(kind), kind));

  RawBlock raw{};
  const std::size_t got = read_at(fd, 0, std::as_writable_bytes(std::span(&raw, 1)), path);
  const std::string_view start(raw.magic, std::min<std::size_t>(got, sizeof(raw.magic)));
  if (start.substr(0, kHdf5Magic.size()) == kHdf5Magic) {
    throw UserError(
        fmt::format("{} is an HDF5 file but not one of Fathom's; expected {} {}.", path, article(kind), kind),
        "Token stores are made by fathom data prepare, checkpoints by fathom train.");
  }
  if (start.substr(0, kMagic.size()) != kMagic.substr(0, start.size())) {
    throw DamagedFile(fmt::format("{} is not a Fathom file; expected {} {}.", path, article(kind), kind),
                      "Text becomes a token store by fathom data prepare.");
  }
  if (got < sizeof(raw)) {
    throw DamagedFile(fmt::format("{} is truncated: its header takes {} bytes, and the file has {}.", path,
                                  kH5UserBlockSize, actual),
                      "Copy it again or make it anew.");
  }
  if (raw.block_checksum != checksum_of(raw)) {
    throw DamagedFile(fmt::format("the header of {} is damaged (checksum {}, expected {}).", path,
                                  to_hex(checksum_of(raw)), to_hex(raw.block_checksum)),
                      "Copy it again or make it anew.");
  }
  if (raw.version > kH5FormatVersion) {
    throw UserError(fmt::format("{} has format version {}; this program reads versions up to {}.", path,
                                raw.version, kH5FormatVersion),
                    "It was written by a newer Fathom: update this one.");
  }
  if (raw.version != kH5FormatVersion) {
    throw UserError(fmt::format("{} has the unknown format version {}.", path, raw.version));
  }
  const std::string found(raw.kind, ::strnlen(raw.kind, kKindBytes));
  if (found != kind) {
    throw UserError(
        fmt::format("{} is {} {}, expected {} {}.", path, article(found), found, article(kind), kind));
  }
  const std::uint64_t expected = kH5UserBlockSize + raw.payload_bytes;
  if (actual < expected) {
    throw DamagedFile(fmt::format("{} is truncated: expected {} bytes, it has {}.", path, expected, actual),
                      "Copy it again or make it anew.");
  }
  if (actual > expected) {
    throw DamagedFile(
        fmt::format("{} has trailing bytes: expected {} bytes, it has {}.", path, expected, actual),
        "Copy it again or make it anew.");
  }
  const std::uint64_t checksum = checksum_file(fd, kH5UserBlockSize, raw.payload_bytes, path);
  if (checksum != raw.payload_checksum) {
    throw DamagedFile(fmt::format("{} is damaged: its checksum is {}, expected {}.", path, to_hex(checksum),
                                  to_hex(raw.payload_checksum)),
                      "Bytes were changed on the disk or in a transfer: copy it again or make it anew.");
  }
  return UserBlock{found, raw.payload_bytes, raw.payload_checksum};
}

}  // namespace fathom
