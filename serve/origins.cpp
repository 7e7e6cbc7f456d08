#include "serve/origins.h"

#include <algorithm>
#include <array>

#include <arpa/inet.h>
#include <fmt/format.h>

#include "kernels/error.h"
#include "serve/api_error.h"

namespace fathom::serve {

namespace {

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return out;
}

// "[::1]:8000" is "[::1]", "a:80" is "a".
std::string_view without_port(std::string_view host) {
  const std::size_t colon = host.rfind(':');
  const std::size_t bracket = host.rfind(']');
  const bool has_port = colon != std::string_view::npos &&
                        (bracket == std::string_view::npos || colon > bracket) &&
                        host.find_first_not_of("0123456789", colon + 1) == std::string_view::npos;
  return has_port ? host.substr(0, colon) : host;
}

bool is_address(const std::string& name) {
  in6_addr parsed{};
  if (::inet_pton(AF_INET, name.c_str(), &parsed) == 1) return true;
  return name.size() > 2 && name.front() == '[' && name.back() == ']' &&
         ::inet_pton(AF_INET6, name.substr(1, name.size() - 2).c_str(), &parsed) == 1;
}

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

// Of a header's value, as errors repeat it.
std::string shown(const std::string& value) { return value.substr(0, 100); }

// What a page may send, beside what OpenAI's package for JavaScript says of itself (x-stainless-...).
constexpr std::array<std::string_view, 5> kAllowed = {"authorization", "content-type", "openai-organization",
                                                      "openai-project", "openai-beta"};
constexpr std::string_view kClientPrefix = "x-stainless-";
constexpr std::size_t kMostAsked = 64;

bool may_come(std::string_view header) {
  if (std::find(kAllowed.begin(), kAllowed.end(), header) != kAllowed.end()) return true;
  return header.substr(0, kClientPrefix.size()) == kClientPrefix &&
         std::all_of(header.begin(), header.end(),
                     [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-'; });
}

// Those that every client sends, and of those that this one asks for what may come.
std::string allowed_headers(std::string_view asked) {
  std::string out = "authorization, content-type";
  for (std::size_t i = 0; i < kMostAsked && !asked.empty(); ++i) {
    const std::size_t comma = std::min(asked.find(','), asked.size());
    std::string_view one = asked.substr(0, comma);
    asked.remove_prefix(std::min(comma + 1, asked.size()));
    one.remove_prefix(std::min(one.find_first_not_of(" \t"), one.size()));
    one = one.substr(0, one.find_last_not_of(" \t") + 1);
    const std::string name = lower(one);
    if (may_come(name) && name != kAllowed[0] && name != kAllowed[1]) out += ", " + name;
  }
  return out;
}

}  // namespace

Origins::Origins(OriginOptions options) : options_(std::move(options)) {
  const std::string cors = lower(options_.cors);  // as browsers write it
  const std::size_t scheme = cors.find("://");
  const bool is_origin = scheme != std::string::npos && scheme > 0 && scheme + 3 < cors.size() &&
                         cors.find_first_of("/?#@, \t", scheme + 3) == std::string::npos;
  if (!cors.empty() && cors != "*" && cors != "null" && !is_origin)
    throw UsageError(fmt::format("--cors-origin {} is no origin.", options_.cors),
                     "It is what a browser says of a page, without a path: https://app.example, or "
                     "http://localhost:3000; * is any.");
  options_.cors = cors;
  for (const std::string& host : options_.hosts) {
    if (host.empty() || host.find_first_of("/: \t") != std::string::npos)
      throw UsageError(fmt::format("--allow-host {} is no name.", host),
                       "It is the name alone, without a scheme or a port: fathom.example");
  }
}

bool is_own_name(std::string_view host) {
  const std::string name = lower(without_port(host));
  return name == "localhost" || ends_with(name, ".localhost") || is_address(name);
}

void Origins::check_host(const HttpRequest& head) const {
  if (!options_.is_local || !head.has_host || is_own_name(head.host)) return;
  const std::string name = lower(without_port(head.host));
  for (const std::string& own : options_.hosts) {
    if (lower(own) == name) return;
  }
  throw ApiError(
      fmt::format("This server answers for this machine alone, and '{}' is not known as one of its names. "
                  "--allow-host makes it one, and with an API key any name will do.",
                  shown(head.host)),
      {.status = 403, .type = "permission_error", .code = "host_not_allowed"});
}

// A page's own origin is what the browser was led here by.
void Origins::check_origin(const HttpRequest& head) const {
  if (head.origin.empty() || is_named(head.origin)) return;
  const std::size_t scheme = head.origin.find("://");
  const bool is_own = scheme != std::string::npos && !head.host.empty() &&
                      lower(head.origin.substr(scheme + 3)) == lower(head.host);
  if (is_own) return;
  throw ApiError(
      fmt::format("Pages of '{}' have no leave to ask this server. --cors-origin gives it, and with an "
                  "API key it is not needed.",
                  shown(head.origin)),
      {.status = 403, .type = "permission_error", .code = "origin_not_allowed"});
}

bool Origins::is_named(const std::string& origin) const {
  return !options_.cors.empty() && (options_.cors == "*" || options_.cors == origin);
}

HttpReply Origins::preflight(const HttpRequest& head) const {
  HttpReply reply{.status = 204};
  if (!is_named(head.origin)) return reply;
  reply.headers = {{"Access-Control-Allow-Methods", "GET, POST"},
                   {"Access-Control-Allow-Headers", allowed_headers(head.asks_for_headers)},
                   {"Access-Control-Max-Age", "600"}};
  return reply;
}

std::vector<HttpHeader> Origins::headers(const HttpRequest& head) const {
  if (options_.cors.empty()) return {};
  std::vector<HttpHeader> out;
  if (!head.origin.empty() && is_named(head.origin))
    out = {{"Access-Control-Allow-Origin", options_.cors}, {"Access-Control-Expose-Headers", "Retry-After"}};
  // A cache may not give one origin what was said to another.
  const bool varies = options_.cors != "*";
  const bool is_preflight = head.method == "OPTIONS";
  if (varies || is_preflight)
    out.emplace_back("Vary", fmt::format("{}{}{}", varies ? "Origin" : "", varies && is_preflight ? ", " : "",
                                         is_preflight ? "Access-Control-Request-Headers" : ""));
  return out;
}

}  // namespace fathom::serve
