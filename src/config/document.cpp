#include "src/config/document.h"

#include <algorithm>
#include <map>
#include <sstream>

#include <fmt/format.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include "kernels/error.h"

namespace fathom {
namespace {

constexpr std::size_t kMaxBytes = std::size_t{1} << 20;
constexpr std::size_t kMaxDepth = 6;  // the deepest key, routing.causal.method, is at 3

// The index of the first byte that is not part of well-formed UTF-8 (RFC 3629), or npos.
std::size_t first_bad_utf8(std::string_view s) {
  for (std::size_t i = 0; i < s.size();) {
    const auto lead = static_cast<unsigned char>(s[i]);
    const std::size_t length = lead < 0x80                     ? 1
                               : (lead >= 0xC2 && lead < 0xE0) ? 2
                               : (lead & 0xF0) == 0xE0         ? 3
                               : (lead >= 0xF0 && lead < 0xF5) ? 4
                                                               : 0;
    if (length == 0 || i + length > s.size()) return i;
    for (std::size_t j = 1; j < length; ++j) {
      const auto next = static_cast<unsigned char>(s[i + j]);
      unsigned low = 0x80, high = 0xBF;
      if (j == 1 && lead == 0xE0) low = 0xA0;
      if (j == 1 && lead == 0xED) high = 0x9F;
      if (j == 1 && lead == 0xF0) low = 0x90;
      if (j == 1 && lead == 0xF4) high = 0x8F;
      if (next < low || next > high) return i;
    }
    i += length;
  }
  return std::string_view::npos;
}

std::size_t line_of(std::string_view text, std::size_t offset) {
  return 1 +
         static_cast<std::size_t>(std::count(text.begin(), text.begin() + static_cast<long>(offset), '\n'));
}

void check_bytes(std::string_view text, const std::string& name) {
  if (text.size() > kMaxBytes) {
    throw UsageError(
        fmt::format("{}: the config has {} bytes, and 1 MiB is the most that is read.", name, text.size()),
        "Is it another file?");
  }
  if (const std::size_t bad = first_bad_utf8(text); bad != std::string_view::npos) {
    throw UsageError(fmt::format("{}:{}: byte 0x{:02x} is not UTF-8 text.", name, line_of(text, bad),
                                 static_cast<unsigned char>(text[bad])),
                     "A config is YAML in UTF-8; save the file as such.");
  }
  if (const std::size_t nul = text.find('\0'); nul != std::string_view::npos) {
    throw UsageError(fmt::format("{}:{}: a NUL byte does not belong in YAML.", name, line_of(text, nul)),
                     "Is it another file?");
  }
}

// Turns the parser's events into entries. The stack holds the open maps and, on top, at most one list.
class Reader final : public YAML::EventHandler {
 public:
  Reader(std::string_view text, std::string name) : text_(text), name_(std::move(name)) {
    for (std::size_t i = 0; i < text.size(); ++i) {
      if (text[i] == '\n') line_starts_.push_back(i + 1);
    }
  }

  std::vector<Entry> take() { return std::move(entries_); }

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++documents_ > 1) fail(mark, "a second YAML document starts here, and a config is one document.");
  }
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    refuse_anchor(mark, anchor);
    if (open_.empty()) return;  // an empty file: every key keeps its default
    if (open_.back().is_list) return push_item(mark, "");
    if (!open_.back().key_read) fail(mark, "a key is missing before ':'.");
    add(Entry::Form::Null);
  }

  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    fail(mark, "YAML aliases (*name) are not used in a config; write the value out.");
  }

  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    refuse_anchor(mark, anchor);
    refuse_tag(mark, tag);
    if (tag == "!") require_end_of_quote(mark);
    if (open_.empty())
      fail(mark, fmt::format("found {}, expected sections such as 'model:'.", show_text(value)));
    if (open_.back().is_list) return push_item(mark, value);
    if (!open_.back().key_read) {
      open_.back().key = value;
      open_.back().key_line = mark.line + 1;
      open_.back().key_read = true;
      return;
    }
    add(tag == "!" ? Entry::Form::Quoted : Entry::Form::Plain).text = value;
  }

  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    refuse_anchor(mark, anchor);
    refuse_tag(mark, tag);
    expect_value(mark, "a list");
    add(Entry::Form::List);
    open_.push_back({.is_list = true, .prefix = "", .key = "", .key_line = 0, .key_read = false});
  }
  void OnSequenceEnd() override { open_.pop_back(); }

  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    refuse_anchor(mark, anchor);
    refuse_tag(mark, tag);
    std::string prefix;
    if (!open_.empty()) {
      expect_value(mark, "a map");
      prefix = add(Entry::Form::Section).path + ".";
    }
    if (open_.size() >= kMaxDepth) fail(mark, fmt::format("nested deeper than {} levels.", kMaxDepth));
    open_.push_back({.is_list = false, .prefix = prefix, .key = "", .key_line = 0, .key_read = false});
  }
  void OnMapEnd() override { open_.pop_back(); }

 private:
  struct Open {
    bool is_list;
    std::string prefix;
    std::string key;
    int key_line;
    bool key_read;  // the key of a pair is known and its value comes next
  };

  [[noreturn]] void fail(const YAML::Mark& mark, const std::string& problem) const {
    throw UsageError(fmt::format("{}:{}: {}", name_, mark.line + 1, problem));
  }
  void refuse_anchor(const YAML::Mark& mark, YAML::anchor_t anchor) const {
    if (anchor != YAML::NullAnchor)
      fail(mark, "YAML anchors (&name) are not used in a config; write the value out.");
  }
  void refuse_tag(const YAML::Mark& mark, const std::string& tag) const {
    if (!tag.empty() && tag != "?" && tag != "!") {
      fail(mark, fmt::format("YAML tags are not used in a config; found {}.", show_text(tag)));
    }
  }
  // yaml-cpp lets the end of the file end a quoted text, so a forgotten quote would swallow every key below
  // it.
  void require_end_of_quote(const YAML::Mark& mark) const {
    const std::size_t start =
        line_starts_.at(static_cast<std::size_t>(mark.line)) + static_cast<std::size_t>(mark.column);
    const char quote = start < text_.size() ? text_[start] : '\0';
    if (quote != '"' && quote != '\'') return;
    for (std::size_t i = start + 1; i < text_.size() && text_[i] != '\n'; ++i) {
      if (text_[i] == quote) return;
      if (text_[i] == '\\' && quote == '"') ++i;
    }
    fail(mark, "not valid YAML: the quote that begins here does not end on its line.");
  }
  void expect_value(const YAML::Mark& mark, const char* what) const {
    if (open_.empty()) fail(mark, fmt::format("found {}, expected sections such as 'model:'.", what));
    if (open_.back().is_list)
      fail(mark, fmt::format("{} inside the list {}; a list holds numbers (is a closing bracket missing?).",
                             what, show_text(entries_.back().path)));
    if (!open_.back().key_read) fail(mark, fmt::format("{} where a key is expected.", what));
  }

  // An entry for the value of the pending key.
  Entry& add(Entry::Form form) {
    Open& map = open_.back();
    map.key_read = false;
    const std::string path = map.prefix + map.key;
    const auto [first, fresh] = lines_.emplace(path, map.key_line);
    if (!fresh) {
      throw UsageError(
          fmt::format("{}:{}: the key {} stands here a second time; it is already given in line {}.", name_,
                      map.key_line, show_text(path), first->second));
    }
    entries_.push_back({.path = path,
                        .form = form,
                        .text = "",
                        .items = {},
                        .where = fmt::format("{}:{}", name_, map.key_line)});
    return entries_.back();
  }

  void push_item(const YAML::Mark& mark, const std::string& value) {
    Entry& list = entries_.back();
    if (list.items.size() >= 64)
      fail(mark, fmt::format("the list {} has more than 64 items.", show_text(list.path)));
    list.items.push_back(value);
  }

  std::string_view text_;
  std::string name_;
  std::vector<std::size_t> line_starts_{0};
  int documents_ = 0;
  std::vector<Open> open_;
  std::vector<Entry> entries_;
  std::map<std::string, int> lines_;
};

}  // namespace

std::string show_text(std::string_view text) {
  constexpr std::size_t kMost = 80;
  std::string shown;
  for (const char c : text.substr(0, kMost))
    shown += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? ' ' : c;
  if (text.size() <= kMost) return shown;
  // Cut between characters, never inside one.
  while (!shown.empty() && first_bad_utf8(shown) != std::string_view::npos) shown.pop_back();
  return shown + "...";
}

std::string show_value(const Entry& entry) {
  switch (entry.form) {
    case Entry::Form::Plain:
      return show_text(entry.text);
    case Entry::Form::Quoted:
      return fmt::format("\"{}\"", show_text(entry.text));
    case Entry::Form::Null:
      return "empty";
    case Entry::Form::List:
      return show_text(fmt::format("[{}]", fmt::join(entry.items, ", ")));
    case Entry::Form::Section:
      return "a section";
  }
  return "";
}

std::vector<Entry> read_document(std::string_view text, const std::string& name) {
  check_bytes(text, name);
  std::istringstream stream{std::string(text)};
  Reader reader(text, name);
  try {
    YAML::Parser parser(stream);
    while (parser.HandleNextDocument(reader)) {
    }
  } catch (const YAML::Exception& e) {
    // Newer versions of yaml-cpp repeat the name of an anchor, however long.
    const std::string reason = e.msg.size() <= 100 ? e.msg : show_text(e.msg);
    throw UsageError(fmt::format("{}:{}: not valid YAML: {} (column {}).", name, e.mark.line + 1, reason,
                                 e.mark.column + 1),
                     "Sections are indented by two spaces, and a key is followed by ': '.");
  }
  return reader.take();
}

Entry read_override(std::string_view override_text) {
  const std::string where = fmt::format("--set {}", show_text(override_text));
  check_bytes(override_text, where);
  const std::size_t equals = override_text.find('=');
  if (equals == std::string_view::npos || equals == 0) {
    throw UsageError(fmt::format("{}: expected KEY=VALUE, such as --set model.depth=12.", where));
  }
  const std::string_view value = override_text.substr(equals + 1);
  Entry entry{.path = std::string(override_text.substr(0, equals)),
              .form = Entry::Form::Plain,
              .text = std::string(value),
              .items = {},
              .where = where};
  // A path such as "a: b.h5" is not YAML's to interpret: only quotes and lists are read as YAML.
  if (!value.empty() && std::string_view("\"'[").find(value.front()) != std::string_view::npos) {
    std::vector<Entry> parsed = read_document(fmt::format("value: {}", value), where);
    if (parsed.size() != 1) throw UsageError(fmt::format("{}: expected one value after '='.", where));
    parsed.front().path = entry.path;
    parsed.front().where = where;
    return parsed.front();
  }
  if (value.empty() || value == "null" || value == "~") {
    entry.form = Entry::Form::Null;
    entry.text.clear();
  }
  return entry;
}

}  // namespace fathom
