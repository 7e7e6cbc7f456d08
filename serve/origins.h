// Which pages of a browser may ask, and by which names of this machine.
//
// A browser lets any page send requests to any address, this machine's own too; what the page may not do is
// read the answer, or send a header such as Authorization, without the server's leave (CORS). So a key keeps
// pages out. Without one, the request's headers say whether a page of another origin sends it (Origin), or
// one whose own name leads here (Host: "DNS rebinding").
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "serve/http/exchange.h"

namespace fathom::serve {

struct OriginOptions {
  std::string cors;                // a page of this origin may ask too; "*": of any; empty: of none
  std::vector<std::string> hosts;  // names of this machine, beside localhost and any address
  bool is_local = true;            // listens for this machine alone, which only such names can lead to
};

class Origins {
 public:
  /// UsageError: what is no origin, or no name, and so would never be one that a browser says.
  explicit Origins(OriginOptions options);

  /// For a server without keys. ApiError (403): the request is a page's that has no leave.
  void check_host(const HttpRequest& head) const;
  void check_origin(const HttpRequest& head) const;

  bool answers_preflights() const { return !options_.cors.empty(); }
  /// The answer to a browser that asks whether its page may send a request.
  HttpReply preflight(const HttpRequest& head) const;
  /// Of every answer.
  std::vector<HttpHeader> headers(const HttpRequest& head) const;

 private:
  bool is_named(const std::string& origin) const;

  OriginOptions options_;
};

/// Names that no page can make lead elsewhere: localhost and those below it, and addresses; all with or
/// without a port.
bool is_own_name(std::string_view host);

}  // namespace fathom::serve
