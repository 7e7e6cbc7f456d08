#include "src/io/text_reader.h"

#include <algorithm>
#include <filesystem>
#include <span>
#include <string_view>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "src/io/byte_source.h"
#include "src/io/utf8.h"

namespace fathom {

namespace {

// The library's words without its number, its line (each line is parsed alone) and what it read, which can
// be a whole book.
std::string reason_of(const nlohmann::json::exception& e) {
  std::string_view text = e.what();
  for (const std::string_view before : {"] ", "parse error at line 1, "}) {
    if (const std::size_t at = text.find(before); at != text.npos) text.remove_prefix(at + before.size());
  }
  return std::string(text.substr(0, std::min(text.find("; last read:"), std::size_t{200})));
}

constexpr std::size_t kReadBytes = std::size_t{1} << 18;
constexpr std::size_t kSoftDocumentBytes = std::size_t{1} << 14;
constexpr std::size_t kHardDocumentBytes = std::size_t{1} << 20;
constexpr std::size_t kMaxLineBytes = std::size_t{1} << 30;
constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

bool is_json_lines(std::string_view path) {
  for (const std::string_view packed : {".gz", ".xz", ".zst"}) {
    if (ends_with(path, packed)) path.remove_suffix(packed.size());
  }
  return ends_with(path, ".jsonl") || ends_with(path, ".ndjson");
}

// Where the first document of `text` ends, if `text` is long enough to tell; `at_end` says that nothing
// follows it. 0: more text is needed.
std::size_t document_length(std::string_view text, bool at_end) {
  if (at_end && text.size() <= kSoftDocumentBytes) return text.size();
  if (text.size() <= kSoftDocumentBytes) return 0;
  const std::string_view window = text.substr(0, kHardDocumentBytes);
  for (const std::string_view blank : {std::string_view("\n\n"), std::string_view("\n\r\n")}) {
    std::size_t end = window.find(blank, kSoftDocumentBytes);
    if (end == std::string_view::npos) continue;
    end += blank.size();
    // Further blank lines belong to the paragraph that they end.
    while (end < window.size() && (window[end] == '\n' || window[end] == '\r')) ++end;
    if (end == text.size() && !at_end && end < kHardDocumentBytes) return 0;
    return end;
  }
  if (text.size() <= kHardDocumentBytes) return at_end ? text.size() : 0;
  // No paragraph ends within 1 MiB: the last line, else the last space, else the last whole character.
  for (const char c : {'\n', ' '}) {
    const std::size_t last = window.rfind(c);
    if (last != std::string_view::npos && last >= kSoftDocumentBytes) return last + 1;
  }
  return utf8_boundary(text, kHardDocumentBytes);
}

}  // namespace

InvalidUtf8 parse_invalid_utf8(const std::string& name) {
  if (name == "error") return InvalidUtf8::Error;
  if (name == "replace") return InvalidUtf8::Replace;
  if (name == "skip") return InvalidUtf8::Skip;
  throw UsageError(fmt::format("--invalid-utf8 {} is unknown.", name), "Use error, replace or skip.");
}

struct TextReader::Impl {
  std::vector<std::string> paths;
  TextReaderOptions options;
  std::int64_t bytes_total = 0;
  std::int64_t bytes_before = 0;  // of the files that are done
  std::int64_t skipped = 0;

  std::size_t next_path = 0;
  std::unique_ptr<ByteSource> source;
  bool json = false;
  bool at_end = false;  // the source has no more bytes
  std::string buffer;   // bytes read and not used yet, from `position` on
  std::size_t position = 0;
  std::size_t searched = 0;  // JSON: no line end before this place of the buffer
  std::int64_t line = 0;     // JSON: of the current document, from 1
  std::int64_t offset = 0;   // plain: of the buffer's position in the text

  const std::string& path() const { return paths[next_path - 1]; }

  bool open_next() {
    if (source) bytes_before += source->consumed();
    source.reset();
    if (next_path == paths.size()) return false;
    source = open_bytes(paths[next_path]);
    ++next_path;
    json = is_json_lines(path());
    at_end = false;
    buffer.clear();
    position = searched = 0;
    line = offset = 0;
    refill();
    if (ends_with(std::string_view(buffer).substr(0, kByteOrderMark.size()), kByteOrderMark)) {
      position = searched = kByteOrderMark.size();
      offset = static_cast<std::int64_t>(position);
    }
    return true;
  }

  void refill() {
    buffer.erase(0, position);
    searched -= std::min(searched, position);
    position = 0;
    const std::size_t size = buffer.size();
    buffer.resize(size + kReadBytes);
    const std::size_t got = source->read(std::span(buffer).subspan(size));
    buffer.resize(size + got);
    at_end = got < kReadBytes;
  }

  std::string_view rest() const { return std::string_view(buffer).substr(position); }

  // The next line of a JSON file without its end; false at the end of the file.
  bool next_line(std::string_view& text) {
    for (;;) {
      const std::size_t end = buffer.find('\n', std::max(searched, position));
      if (end != std::string::npos) {
        text = std::string_view(buffer).substr(position, end - position);
        position = searched = end + 1;
        ++line;
        return true;
      }
      if (at_end) {
        text = rest();
        position = searched = buffer.size();
        if (text.empty()) return false;
        ++line;
        return true;
      }
      searched = buffer.size();
      if (rest().size() > kMaxLineBytes) {
        throw UserError(fmt::format("{}:{}: the line is longer than 1 GiB.", path(), line + 1),
                        "A .jsonl file has one JSON object a line; name it .txt if it is plain text.");
      }
      refill();
    }
  }

  // Applies the policy for invalid UTF-8 to `text`; false when the document is left out. `where` names its
  // place, given the number of valid bytes in front of the bad one.
  template <typename Where>
  bool accept(std::string_view text, std::string& document, Where&& where) {
    const std::size_t valid = utf8_prefix(text);
    if (valid == text.size()) {
      document.assign(text);
      return true;
    }
    switch (options.invalid_utf8) {
      case InvalidUtf8::Replace:
        document = replace_invalid_utf8(text);
        return true;
      case InvalidUtf8::Skip:
        ++skipped;
        return false;
      case InvalidUtf8::Error:
        break;
    }
    throw UserError(
        fmt::format("{}: invalid UTF-8 (byte 0x{:02x}).", where(valid),
                    static_cast<unsigned char>(text[valid])),
        "Convert the file to UTF-8 (iconv), or give --invalid-utf8 replace (U+FFFD in its place) or "
        "--invalid-utf8 skip (leaves the document out).");
  }

  bool next_json(std::string& document) {
    std::string_view text;
    while (next_line(text)) {
      if (text.find_first_not_of(" \t\r") == std::string_view::npos) continue;
      std::string valid;
      if (!accept(text, valid, [&](std::size_t at) {
            return fmt::format("{}:{}: byte {} of the line", path(), line, at);
          })) {
        continue;
      }
      nlohmann::json object;
      try {
        object = nlohmann::json::parse(valid);
      } catch (const nlohmann::json::exception& e) {
        throw UserError(fmt::format("{}:{}: not valid JSON ({}).", path(), line, reason_of(e)),
                        "A .jsonl file has one JSON object a line.");
      }
      const auto field = object.is_object() ? object.find(options.field) : object.end();
      if (field == object.end() || !field->is_string()) {
        throw UserError(fmt::format("{}:{}: the line has no string \"{}\".", path(), line, options.field),
                        "Each line must be an object such as {\"text\": \"...\"}.");
      }
      document = std::move(field->get_ref<std::string&>());
      if (!document.empty()) return true;
    }
    return false;
  }

  bool next_plain(std::string& document) {
    while (!rest().empty() || !at_end) {
      const std::size_t length = document_length(rest(), at_end);
      if (length == 0) {
        if (at_end) return false;
        refill();
        continue;
      }
      const bool accepted = accept(rest().substr(0, length), document, [&](std::size_t at) {
        return fmt::format("{}: byte {}", path(), offset + static_cast<std::int64_t>(at));
      });
      position += length;
      offset += static_cast<std::int64_t>(length);
      if (accepted) return true;
    }
    return false;
  }
};

TextReader::TextReader(std::vector<std::string> paths, TextReaderOptions options)
    : impl_(std::make_unique<Impl>()) {
  impl_->paths = std::move(paths);
  impl_->options = std::move(options);
  for (const std::string& path : impl_->paths) {
    open_bytes(path);  // says early which file is missing, before hours are spent on the others
    std::error_code error;
    const auto size = std::filesystem::file_size(path, error);
    if (!error) impl_->bytes_total += static_cast<std::int64_t>(size);
  }
}

TextReader::~TextReader() = default;

bool TextReader::next(std::string& document) {
  Impl& i = *impl_;
  for (;;) {
    if (!i.source && !i.open_next()) return false;
    if (i.json ? i.next_json(document) : i.next_plain(document)) return true;
    if (!i.open_next()) return false;
  }
}

std::int64_t TextReader::bytes_done() const {
  return impl_->bytes_before + (impl_->source ? impl_->source->consumed() : 0);
}
std::int64_t TextReader::bytes_total() const { return impl_->bytes_total; }
std::int64_t TextReader::skipped() const { return impl_->skipped; }

}  // namespace fathom
