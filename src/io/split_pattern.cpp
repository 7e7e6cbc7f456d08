#include "src/io/split_pattern.h"

#include <array>
#include <utility>

#include <fmt/format.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "kernels/error.h"

namespace fathom {

namespace {

// Unicode's White_Space; PCRE2's \s has U+180E besides. It ends in a range, so that a '-' behind it begins
// none.
constexpr std::string_view kWhiteSpace =
    R"(\x09-\x0d\x20\x{85}\x{a0}\x{1680}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{2000}-\x{200a})";

// Steps of the matcher for one match; a pattern that goes through all ways to split a text takes more.
constexpr std::uint32_t kMostSteps = 200'000'000;

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

class Translator {
 public:
  Translator(std::string_view pattern, const std::string& origin) : in_(pattern), origin_(origin) {}

  std::string run() {
    while (at_ < in_.size()) {
      const char c = in_[at_];
      if (c == '\\') {
        escape(false);
      } else if (c == '[') {
        set();
      } else if (c == '(') {
        group();
      } else if (c == '.' || c == '^' || c == '$') {
        refuse(std::string(1, c));
      } else if (c == '?' || c == '*' || c == '+' || c == '{') {
        quantifier();
      } else {
        take(1);
      }
    }
    return out_;
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw UserError(fmt::format("{}: its pattern {} has {}, which Fathom does not read in a pattern.",
                                origin_, in_, what));
  }

  void take(std::size_t count) {
    out_ += in_.substr(at_, count);
    at_ = std::min(in_.size(), at_ + count);
  }

  void escape(bool in_set) {
    const char c = at_ + 1 < in_.size() ? in_[at_ + 1] : '\0';
    if (c == 's') {
      out_ += in_set ? std::string(kWhiteSpace) : fmt::format("[{}]", kWhiteSpace);
      at_ += 2;
    } else if (c == 'S' && !in_set) {
      out_ += fmt::format("[^{}]", kWhiteSpace);
      at_ += 2;
    } else if (c == 'p' || c == 'P') {
      property();
    } else if (c == 'r' || c == 'n' || c == 't' || (c != '\0' && !is_digit(c) && !is_letter(c))) {
      take(2);
    } else {
      refuse(c == '\0' ? "a backslash at its end" : fmt::format("\\{}", c));
    }
  }

  // \p{L}, \p{Lu}: general categories, which all agree on.
  void property() {
    const std::size_t end = in_.find('}', at_);
    const std::string_view name =
        end == in_.npos || end < at_ + 4 || in_[at_ + 2] != '{' ? "" : in_.substr(at_ + 3, end - at_ - 3);
    constexpr std::string_view kGroups = "LMNPSZC";
    const bool is_category = (name.size() == 1 || (name.size() == 2 && name[1] >= 'a' && name[1] <= 'z')) &&
                             kGroups.find(name[0]) != kGroups.npos;
    if (!is_category) refuse(std::string(in_.substr(at_, end == in_.npos ? in_.npos : end + 1 - at_)));
    take(end + 1 - at_);
  }

  void set() {
    take(1);
    if (at_ < in_.size() && in_[at_] == '^') take(1);
    for (bool first = true;; first = false) {
      if (at_ >= in_.size()) refuse("a set without an end");
      const char c = in_[at_];
      if (c == ']') {
        if (first) refuse("an empty set");
        take(1);
        return;
      }
      if (c == '[' || in_.substr(at_, 2) == "&&") refuse("a set within a set");
      if (c == '\\') {
        escape(true);
      } else {
        take(1);
      }
    }
  }

  // Groups that have no number, and what is looked for ahead and behind. The letters of (?i: are the same in
  // both.
  void group() {
    for (const std::string_view open : {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!"}) {
      if (in_.substr(at_, open.size()) != open) continue;
      take(open.size());
      return;
    }
    if (in_.substr(at_, 2) == "(?") refuse(std::string(in_.substr(at_, 4)));
    out_ += "(?:";
    ++at_;
  }

  void quantifier() {
    const std::size_t end = in_[at_] == '{' ? in_.find('}', at_) : at_;
    if (end == in_.npos) refuse("a brace without an end");
    for (std::size_t i = at_ + 1; i < end; ++i) {
      if (!is_digit(in_[i]) && in_[i] != ',') refuse("a brace that counts nothing");
    }
    // "a{,n}" is from none on in one, and text in the other; what follows may make it possessive in one
    // alone.
    if (in_[at_] == '{' && (end == at_ + 1 || in_[at_ + 1] == ',')) refuse("a brace without a least number");
    const bool is_brace = in_[at_] == '{';
    take(end + 1 - at_);
    const char next = at_ < in_.size() ? in_[at_] : '\0';
    if (next == '+' || next == '*' || next == '{' || (is_brace && next == '?')) {
      refuse("a quantifier behind a quantifier");
    }
    if (next == '?') take(1);
  }

  std::string_view in_;
  const std::string& origin_;
  std::size_t at_ = 0;
  std::string out_;
};

std::string message_of(int code) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

template <auto Free>
struct Freed {
  template <typename T>
  void operator()(T* p) const {
    Free(p);
  }
};
using MatchData = std::unique_ptr<pcre2_match_data, Freed<pcre2_match_data_free>>;
using MatchContext = std::unique_ptr<pcre2_match_context, Freed<pcre2_match_context_free>>;

}  // namespace

std::string translate_pattern(std::string_view pattern, const std::string& origin) {
  return Translator(pattern, origin).run();
}

std::string literal_pattern(std::string_view text) {
  std::string pattern;
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 0x80 && !is_letter(c) && !is_digit(c)) {
      pattern += fmt::format("\\x{{{:02x}}}", static_cast<unsigned char>(c));
    } else {
      pattern += c;
    }
  }
  return pattern;
}

struct SplitPattern::Code {
  std::unique_ptr<pcre2_code, Freed<pcre2_code_free>> code;
  MatchContext context;
};

SplitPattern::SplitPattern(const std::string& pattern, std::string origin)
    : code_(std::make_unique<Code>()), origin_(std::move(origin)) {
  int error = 0;
  PCRE2_SIZE place = 0;
  code_->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                  PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &place, nullptr));
  if (code_->code == nullptr) {
    throw UserError(
        fmt::format("{}: its pattern {} is none: {} (at {}).", origin_, pattern, message_of(error), place));
  }
  std::uint32_t may_be_empty = 0;
  pcre2_pattern_info(code_->code.get(), PCRE2_INFO_MATCHEMPTY, &may_be_empty);
  if (may_be_empty != 0) {
    throw UserError(
        fmt::format("{}: its pattern {} may match no character, and so splits nothing.", origin_, pattern));
  }
  // Where there is no such compiler, the pattern is interpreted.
  static_cast<void>(pcre2_jit_compile(code_->code.get(), PCRE2_JIT_COMPLETE));
  code_->context.reset(pcre2_match_context_create(nullptr));
  if (code_->context == nullptr) throw std::bad_alloc();
  pcre2_set_match_limit(code_->context.get(), kMostSteps);
}

SplitPattern::~SplitPattern() = default;
SplitPattern::SplitPattern(SplitPattern&&) noexcept = default;
SplitPattern& SplitPattern::operator=(SplitPattern&&) noexcept = default;

void SplitPattern::split(std::string_view text, const std::function<void(std::string_view)>& piece) const {
  const MatchData match(pcre2_match_data_create(1, nullptr));
  if (match == nullptr) throw std::bad_alloc();
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  std::size_t done = 0;
  while (done < text.size()) {
    int found = 0;
    // What the compiled pattern's stack is too small for, the interpreter does on the heap.
    for (const std::uint32_t how : {0U, PCRE2_NO_JIT}) {
      found = pcre2_match(code_->code.get(), subject, text.size(), done, PCRE2_NO_UTF_CHECK | how,
                          match.get(), code_->context.get());
      if (found != PCRE2_ERROR_JIT_STACKLIMIT) break;
    }
    if (found == PCRE2_ERROR_NOMATCH) break;
    if (found < 0) {
      throw UserError(fmt::format("{}: its pattern fails on a text of {} bytes: {}.", origin_, text.size(),
                                  message_of(found)));
    }
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match.get());
    if (range[1] <= range[0]) throw InternalError("[split_pattern] an empty match");
    if (range[0] > done) piece(text.substr(done, range[0] - done));
    piece(text.substr(range[0], range[1] - range[0]));
    done = range[1];
  }
  if (done < text.size()) piece(text.substr(done));
}

}  // namespace fathom
