#include "src/io/byte_source.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <string_view>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
#include <lzma.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include "kernels/error.h"

namespace fathom {

namespace {

constexpr std::size_t kBufferBytes = std::size_t{1} << 17;

class PlainSource final : public ByteSource {
 public:
  explicit PlainSource(std::string path)
      : path_(std::move(path)), fd_(::open(path_.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0) throw UserError(fmt::format("cannot open the text {}: {}.", path_, std::strerror(errno)));
    struct stat status {};
    if (::fstat(fd_, &status) == 0 && S_ISDIR(status.st_mode)) {
      ::close(fd_);
      throw UserError(fmt::format("{} is a folder.", path_),
                      "Give the files in it, for example FOLDER/*.txt.");
    }
  }
  ~PlainSource() override { ::close(fd_); }
  PlainSource(const PlainSource&) = delete;
  PlainSource& operator=(const PlainSource&) = delete;

  std::size_t read(std::span<char> out) override {
    std::size_t done = 0;
    // What `peek` looked at comes first.
    if (!peeked_.empty()) {
      done = std::min(out.size(), peeked_.size());
      std::copy_n(peeked_.begin(), done, out.begin());
      peeked_.erase(0, done);
    }
    while (done < out.size()) {
      const ssize_t n = ::read(fd_, out.data() + done, out.size() - done);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) throw UserError(fmt::format("cannot read the text {}: {}.", path_, std::strerror(errno)));
      if (n == 0) break;
      done += static_cast<std::size_t>(n);
    }
    consumed_ += static_cast<std::int64_t>(done);
    return done;
  }
  std::int64_t consumed() const override { return consumed_; }

  // The first bytes, without consuming them.
  std::string_view peek(std::size_t size) {
    std::string start(size, '\0');
    start.resize(read(start));
    consumed_ -= static_cast<std::int64_t>(start.size());
    peeked_ = std::move(start);
    return peeked_;
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  int fd_;
  std::string peeked_;
  std::int64_t consumed_ = 0;
};

// What the decompressors share: a buffer of compressed bytes that is refilled, and their errors.
class Decompressor : public ByteSource {
 public:
  Decompressor(std::unique_ptr<PlainSource> in, const char* format)
      : in_(std::move(in)), format_(format), buffer_(kBufferBytes) {}
  std::int64_t consumed() const override { return in_->consumed(); }

 protected:
  // Replaces the buffer's content by the file's next bytes; false at the end.
  bool refill() {
    size_ = in_->read(buffer_);
    return size_ > 0;
  }
  const char* data() const { return buffer_.data(); }
  std::size_t size() const { return size_; }

  [[noreturn]] void truncated() const {
    throw UserError(fmt::format("{} is truncated: its {} stream ends too early, after {} bytes of the file.",
                                in_->path(), format_, in_->consumed()),
                    "Copy or download it again.");
  }
  [[noreturn]] void corrupt(std::string_view why) const {
    throw UserError(
        fmt::format("{} is damaged: its {} stream cannot be decompressed ({}), near byte {} of the file.",
                    in_->path(), format_, why, in_->consumed()),
        "Copy or download it again.");
  }

 private:
  std::unique_ptr<PlainSource> in_;
  const char* format_;
  std::vector<char> buffer_;
  std::size_t size_ = 0;
};

class GzipSource final : public Decompressor {
 public:
  explicit GzipSource(std::unique_ptr<PlainSource> in) : Decompressor(std::move(in), "gzip") {
    if (inflateInit2(&stream_, 15 + 16) != Z_OK) throw std::bad_alloc();
  }
  ~GzipSource() override { inflateEnd(&stream_); }

  std::size_t read(std::span<char> out) override {
    stream_.next_out = reinterpret_cast<Bytef*>(out.data());
    stream_.avail_out = static_cast<uInt>(out.size());
    while (stream_.avail_out > 0) {
      if (stream_.avail_in == 0) {
        if (!refill()) {
          if (in_member_) truncated();
          break;
        }
        stream_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(data()));  // zlib's API predates const
        stream_.avail_in = static_cast<uInt>(size());
      }
      if (!in_member_) {
        inflateReset(&stream_);
        in_member_ = true;
      }
      const int status = inflate(&stream_, Z_NO_FLUSH);
      if (status == Z_STREAM_END) {
        in_member_ = false;
      } else if (status != Z_OK && status != Z_BUF_ERROR) {
        corrupt(stream_.msg != nullptr ? stream_.msg : "zlib error");
      }
    }
    return out.size() - stream_.avail_out;
  }

 private:
  z_stream stream_{};
  bool in_member_ = true;
};

class XzSource final : public Decompressor {
 public:
  explicit XzSource(std::unique_ptr<PlainSource> in) : Decompressor(std::move(in), "xz") {
    // The limit bounds the dictionary that a file may ask for.
    if (lzma_stream_decoder(&stream_, std::uint64_t{2} << 30, LZMA_CONCATENATED) != LZMA_OK)
      throw std::bad_alloc();
  }
  ~XzSource() override { lzma_end(&stream_); }

  std::size_t read(std::span<char> out) override {
    stream_.next_out = reinterpret_cast<std::uint8_t*>(out.data());
    stream_.avail_out = out.size();
    while (stream_.avail_out > 0 && !ended_) {
      if (stream_.avail_in == 0 && action_ == LZMA_RUN) {
        if (!refill()) action_ = LZMA_FINISH;
        stream_.next_in = reinterpret_cast<const std::uint8_t*>(data());
        stream_.avail_in = size();
      }
      const lzma_ret status = lzma_code(&stream_, action_);
      if (status == LZMA_STREAM_END) {
        ended_ = true;
      } else if (status == LZMA_BUF_ERROR) {
        truncated();
      } else if (status != LZMA_OK) {
        corrupt(status == LZMA_MEMLIMIT_ERROR ? "it needs more than 2 GiB of memory" : "bad data");
      }
    }
    return out.size() - stream_.avail_out;
  }

 private:
  lzma_stream stream_ = LZMA_STREAM_INIT;
  lzma_action action_ = LZMA_RUN;
  bool ended_ = false;
};

class ZstdSource final : public Decompressor {
 public:
  explicit ZstdSource(std::unique_ptr<PlainSource> in)
      : Decompressor(std::move(in), "zstd"), stream_(ZSTD_createDStream()) {
    if (stream_ == nullptr) throw std::bad_alloc();
  }
  ~ZstdSource() override { ZSTD_freeDStream(stream_); }
  ZstdSource(const ZstdSource&) = delete;
  ZstdSource& operator=(const ZstdSource&) = delete;

  std::size_t read(std::span<char> out) override {
    ZSTD_outBuffer output{out.data(), out.size(), 0};
    while (output.pos < output.size) {
      // A full output may leave bytes inside the decoder, so it is asked before the file is.
      if (input_.pos == input_.size && !flushing_) {
        if (!refill()) {
          if (in_frame_) truncated();
          break;
        }
        input_ = {data(), size(), 0};
      }
      const std::size_t before = output.pos;
      const std::size_t status = ZSTD_decompressStream(stream_, &output, &input_);
      if (ZSTD_isError(status) != 0) corrupt(ZSTD_getErrorName(status));
      in_frame_ = status != 0;
      flushing_ =
          output.pos == output.size || (input_.pos == input_.size && output.pos > before && in_frame_);
    }
    return output.pos;
  }

 private:
  ZSTD_DStream* stream_;
  ZSTD_inBuffer input_{nullptr, 0, 0};
  bool in_frame_ = false;
  bool flushing_ = false;
};

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

}  // namespace

std::unique_ptr<ByteSource> open_bytes(const std::string& path) {
  auto plain = std::make_unique<PlainSource>(path);
  const std::string_view start = plain->peek(6);
  const auto starts_with = [&](std::string_view magic) { return start.substr(0, magic.size()) == magic; };
  if (starts_with("\x1f\x8b")) return std::make_unique<GzipSource>(std::move(plain));
  if (starts_with(std::string_view("\xfd"
                                   "7zXZ\0",
                                   6))) {
    return std::make_unique<XzSource>(std::move(plain));
  }
  if (starts_with("\x28\xb5\x2f\xfd")) return std::make_unique<ZstdSource>(std::move(plain));
  for (const char* suffix : {".gz", ".xz", ".zst"}) {
    if (ends_with(path, suffix)) {
      throw UserError(start.empty() ? fmt::format("{} is empty.", path)
                                    : fmt::format("{} is named {} but its content is not.", path, suffix),
                      "Copy or download it again, or rename it.");
    }
  }
  return plain;
}

}  // namespace fathom
