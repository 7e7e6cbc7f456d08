#include "src/io/bin_reader.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <filesystem>
#include <limits>
#include <span>
#include <utility>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/io/byte_source.h"

namespace fathom {

namespace {

constexpr std::size_t kHeaderBytes = 1024;
constexpr std::int32_t kMagicGpt2 = 20240520;    // version 1: uint16
constexpr std::int32_t kMagicLlama3 = 20240801;  // version 7: uint32
constexpr std::size_t kMaxDocument = std::size_t{1} << 20;

}  // namespace

bool is_bin_file(const std::string& path) {
  return path.size() > 4 && path.substr(path.size() - 4) == ".bin";
}

struct BinReader::Impl {
  std::string path;
  std::int32_t end_of_document;
  std::unique_ptr<ByteSource> source;
  std::int64_t bytes_total = 0;
  std::size_t width = 2;   // bytes of an id
  bool end_first = false;  // llm.c: the end-of-document token stands before each document
  std::vector<char> buffer;
  std::vector<std::int32_t> ids;  // decoded and not given out yet, from `position` on
  std::size_t position = 0;

  void open() {
    source = open_bytes(path);
    bytes_total = static_cast<std::int64_t>(std::filesystem::file_size(path));
    buffer.resize(kHeaderBytes);
    const std::size_t got = source->read(buffer);
    std::array<std::int32_t, 3> header{};
    if (got >= sizeof(header)) std::memcpy(header.data(), buffer.data(), sizeof(header));
    std::size_t skip = 0;
    if (header[0] == kMagicGpt2 || header[0] == kMagicLlama3) {
      const std::int32_t version = header[0] == kMagicGpt2 ? 1 : 7;
      if (header[1] != version) {
        throw UserError(
            fmt::format("{} is a token file of llm.c of version {}; expected {}.", path, header[1], version));
      }
      width = header[0] == kMagicGpt2 ? 2 : 4;
      end_first = true;
      skip = kHeaderBytes;
      const std::int64_t expected = static_cast<std::int64_t>(kHeaderBytes) +
                                    std::int64_t{header[2]} * static_cast<std::int64_t>(width);
      if (header[2] < 0 || expected != bytes_total) {
        throw UserError(
            fmt::format(
                "{} is a token file of llm.c whose header says {} tokens ({} bytes); it has {} bytes.", path,
                header[2], expected, bytes_total),
            "Copy or download it again.");
      }
    } else if (bytes_total % 2 != 0) {
      throw UserError(
          fmt::format("{} has {} bytes: neither a token file of llm.c (no such header) nor one of nanoGPT "
                      "(uint16 ids, an even number of bytes).",
                      path, bytes_total));
    }
    if (bytes_total == static_cast<std::int64_t>(skip))
      throw UserError(fmt::format("{} holds no tokens.", path));
    decode(std::span<const char>(buffer).first(got).subspan(std::min(skip, got)));
  }

  void decode(std::span<const char> bytes) {
    ids.erase(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(position));
    position = 0;
    for (std::size_t i = 0; i + width <= bytes.size(); i += width) {
      std::uint32_t id = 0;
      std::memcpy(&id, bytes.data() + i, width);
      // An id beyond int32 is beyond every vocabulary, and is reported as such when it is written.
      ids.push_back(
          static_cast<std::int32_t>(std::min<std::uint32_t>(id, std::numeric_limits<std::int32_t>::max())));
    }
  }

  // The number of ids of the document that starts at `position`; 0: more ids are needed.
  std::size_t length(bool at_end) const {
    const auto begin = ids.begin() + static_cast<std::ptrdiff_t>(position);
    const std::size_t available = std::min(ids.size() - position, kMaxDocument);
    std::size_t size = available;
    if (end_of_document >= 0) {
      const auto limit = begin + static_cast<std::ptrdiff_t>(available);
      const auto found = std::find(begin + (end_first ? 1 : 0), limit, end_of_document);
      if (found != limit) return static_cast<std::size_t>(found - begin) + (end_first ? 0 : 1);
    }
    return size == kMaxDocument || at_end ? size : 0;
  }
};

BinReader::BinReader(const std::string& path, std::int32_t end_of_document)
    : impl_(std::make_unique<Impl>()) {
  impl_->path = path;
  impl_->end_of_document = end_of_document;
  impl_->open();
}

BinReader::~BinReader() = default;

bool BinReader::next(std::vector<std::int32_t>& ids) {
  Impl& i = *impl_;
  bool at_end = false;
  for (;;) {
    if (i.position < i.ids.size()) {
      const std::size_t length = i.length(at_end);
      if (length > 0) {
        const auto begin = i.ids.begin() + static_cast<std::ptrdiff_t>(i.position);
        ids.assign(begin, begin + static_cast<std::ptrdiff_t>(length));
        i.position += length;
        return true;
      }
    }
    if (at_end) return false;
    i.buffer.resize(std::size_t{1} << 20);
    const std::size_t got = i.source->read(i.buffer);
    at_end = got < i.buffer.size();
    i.decode(std::span<const char>(i.buffer).first(got));
  }
}

std::int64_t BinReader::bytes_done() const { return impl_->source->consumed(); }
std::int64_t BinReader::bytes_total() const { return impl_->bytes_total; }

}  // namespace fathom
