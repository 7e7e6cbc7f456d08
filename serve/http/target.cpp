#include "serve/http/target.h"

#include <algorithm>
#include <charconv>

namespace fathom::serve {

namespace {

char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }

// Takes `prefix`, which is in lower case, from the text's beginning.
bool take(std::string_view& text, std::string_view prefix) {
  const bool begins = text.size() >= prefix.size() &&
                      std::equal(prefix.begin(), prefix.end(), text.begin(),
                                 [](char expected, char given) { return lower(given) == expected; });
  if (begins) text.remove_prefix(prefix.size());
  return begins;
}

std::optional<std::string> decode(std::string_view path) {
  std::string out;
  for (std::size_t i = 0; i < path.size(); ++i) {
    if (path[i] != '%') {
      out += path[i];
      continue;
    }
    const std::string_view digits = path.substr(i + 1, 2);
    unsigned byte = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), byte, 16);
    if (digits.size() < 2 || error != std::errc() || end != digits.data() + 2) return std::nullopt;
    out += static_cast<char>(byte);
    i += 2;
  }
  return out;
}

}  // namespace

std::optional<Target> read_target(std::string_view text) {
  Target target;
  text = text.substr(0, text.find_first_of("?#"));
  if (text == "*") return Target{{}, "*"};
  if (take(text, "http://") || take(text, "https://")) {
    std::string_view host = text.substr(0, text.find('/'));
    text.remove_prefix(host.size());
    host.remove_prefix(host.rfind('@') + 1);  // npos + 1 is 0
    if (host.empty()) return std::nullopt;
    target.host = host;
    if (text.empty()) text = "/";
  }
  if (text.empty() || text[0] != '/') return std::nullopt;
  auto path = decode(text);
  if (!path) return std::nullopt;
  target.path = std::move(*path);
  return target;
}

}  // namespace fathom::serve
