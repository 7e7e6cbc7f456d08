// What a request's first line asks for.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace fathom::serve {

struct Target {
  std::string host;  // with its port, where the target names one ("http://localhost:8000/health"); else empty
  std::string path;  // without the query, its %41 decoded
};

/// "/path?query", "http://host/path" (as proxies are asked, and which any server has to understand), or "*"
/// (RFC 9112, 3.2). None: it is neither, or a % in its path begins no byte.
std::optional<Target> read_target(std::string_view text);

}  // namespace fathom::serve
