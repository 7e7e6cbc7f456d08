#include "serve/api_keys.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <utility>

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom::serve {

namespace {

// As long as `given` is, whatever `key` is.
bool equal_in_constant_time(std::string_view given, std::string_view key) {
  volatile std::uint8_t differs = given.size() == key.size() ? 0 : 1;
  for (std::size_t i = 0; i < given.size(); ++i)
    differs = static_cast<std::uint8_t>(differs | static_cast<std::uint8_t>(given[i] ^ key[i % key.size()]));
  return differs == 0;
}

bool is_bearer(std::string_view scheme) {
  constexpr std::string_view kBearer = "bearer ";
  return std::equal(scheme.begin(), scheme.end(), kBearer.begin(), kBearer.end(),
                    [](char a, char b) { return (a >= 'A' && a <= 'Z' ? a - 'A' + 'a' : a) == b; });
}

}  // namespace

ApiKeys::ApiKeys(std::vector<std::string> keys) : keys_(std::move(keys)) {
  for (const std::string& key : keys_) {
    const bool printable = std::all_of(key.begin(), key.end(), [](char c) { return c > ' ' && c < 127; });
    if (key.empty() || !printable)
      throw UserError("An API key is empty, or has a space or a character that is not ASCII.",
                      "A good one: openssl rand -hex 32");
  }
}

ApiKeys ApiKeys::from_file(const std::string& path) {
  std::ifstream in(path);
  std::vector<std::string> keys;
  for (std::string line; std::getline(in, line);) {
    line.erase(line.find_last_not_of(" \t\r") + 1);
    if (!line.empty() && line[0] != '#') keys.push_back(line);
  }
  if (keys.empty())
    throw UserError(fmt::format("{} holds no API key, or cannot be read.", path),
                    "It has a key a line. A good one: openssl rand -hex 32");
  return ApiKeys(std::move(keys));
}

bool ApiKeys::admit(std::string_view authorization) const {
  if (keys_.empty()) return true;
  constexpr std::size_t kScheme = 7;
  const bool bearer = is_bearer(authorization.substr(0, kScheme));
  const std::string_view given = authorization.substr(std::min(kScheme, authorization.size()));
  bool found = false;
  for (const std::string& key : keys_) found |= equal_in_constant_time(given, key);
  return bearer && found;
}

}  // namespace fathom::serve
