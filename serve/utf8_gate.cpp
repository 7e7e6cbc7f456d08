#include "serve/utf8_gate.h"

#include "src/io/utf8.h"

namespace fathom::serve {

namespace {

// Whether further bytes can make a character of these, which are none yet.
bool has_begun(std::string_view bytes) {
  if (bytes.size() > 3) return false;
  // The second byte's range depends on the first (E0, ED, F0, F4); one of these is in each.
  for (const char* more : {"\x80\x80\x80", "\x90\x80\x80", "\xA0\x80\x80"}) {
    if (utf8_prefix(std::string(bytes) + more) > bytes.size()) return true;
  }
  return false;
}

}  // namespace

std::string Utf8Gate::pass(std::string_view bytes) {
  held_ += bytes;
  std::string_view left = held_;
  std::string out;
  while (!left.empty()) {
    const std::size_t valid = utf8_prefix(left);
    out += left.substr(0, valid);
    left.remove_prefix(valid);
    if (valid > 0) in_run_ = false;
    if (left.empty() || has_begun(left)) break;
    if (!in_run_) out += "\xEF\xBF\xBD";
    in_run_ = true;
    left.remove_prefix(1);
  }
  held_ = std::string(left);
  return out;
}

std::string Utf8Gate::rest() {
  const bool lost = !held_.empty() && !in_run_;
  held_.clear();
  in_run_ = false;
  return lost ? "\xEF\xBF\xBD" : "";
}

}  // namespace fathom::serve
