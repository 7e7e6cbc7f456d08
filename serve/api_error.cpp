#include "serve/api_error.h"

#include <nlohmann/json.hpp>

namespace fathom::serve {

namespace {

nlohmann::json text_or_null(const std::string& text) {
  return text.empty() ? nlohmann::json() : nlohmann::json(text);
}

}  // namespace

std::string ApiError::json() const {
  const nlohmann::json error = {{"message", what()},
                                {"type", parts_.type},
                                {"param", text_or_null(parts_.param)},
                                {"code", text_or_null(parts_.code)}};
  return nlohmann::json{{"error", error}}.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

ApiError bad_field(const std::string& param, const std::string& message, const std::string& code) {
  return {message, {.param = param, .code = code}};
}

ApiError unavailable(const std::string& message, int retry_after) {
  return {message,
          {.status = 503, .type = "server_error", .code = "unavailable", .retry_after = retry_after}};
}

ApiError server_error(const std::string& message) {
  return {message, {.status = 500, .type = "server_error"}};
}

}  // namespace fathom::serve
