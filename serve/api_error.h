// What a request is refused with, in the shape that OpenAI's clients read:
// {"error": {"message", "type", "param", "code"}}.
#pragma once

#include <stdexcept>
#include <string>

namespace fathom::serve {

/// Thrown where a request is read or answered; the API makes an HTTP answer of it.
class ApiError : public std::runtime_error {
 public:
  struct Parts {
    int status = 400;
    std::string type = "invalid_request_error";
    std::string param = {};  // the field that is wrong; empty: null
    std::string code = {};   // for programs; empty: null
    int retry_after = 0;     // seconds, as the header Retry-After; 0: none
  };

  ApiError(const std::string& message, Parts parts) : std::runtime_error(message), parts_(std::move(parts)) {}

  int status() const { return parts_.status; }
  const Parts& parts() const { return parts_; }
  /// The body, JSON.
  std::string json() const;

 private:
  Parts parts_;
};

/// 400: the field `param` cannot be used.
ApiError bad_field(const std::string& param, const std::string& message, const std::string& code = "");
/// 503: nothing is wrong with the request, and later it may do.
ApiError unavailable(const std::string& message, int retry_after);
/// 500: a fault of ours.
ApiError server_error(const std::string& message);

}  // namespace fathom::serve
