// What pages in a browser on the server's own machine can have of it.
#include <gmock/gmock.h>

#include "kernels/error.h"
#include "serve/origins.h"
#include "tests/serve/tiny_server.h"

namespace fathom::serve {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

std::string with_host(const std::string& method, const std::string& path, const std::string& host,
                      const std::string& more = "") {
  const std::string body = method == "POST" ? R"({"prompt": "a", "max_tokens": 1})" : "";
  return method + " " + path + " HTTP/1.1\r\nHost: " + host + "\r\n" + more +
         (body.empty() ? "" : "Content-Length: " + std::to_string(body.size()) + "\r\n") + "\r\n" + body;
}

Response ask(const TinyServer& server, const std::string& request) {
  Connection c(server.port());
  c.send(request);
  return c.read();
}

// A page anywhere can send a form or a fetch without asking: the browser says whose page it is.
TEST(Origins, APageOfAnotherOriginGetsNothingComputed) {
  TinyServer server;
  server.open();
  const std::string simple = "Content-Type: text/plain\r\n";
  for (const std::string origin :
       {"http://evil.example", "https://localhost.evil.example", "null", "http://localhost:1", "file://"}) {
    const Response r = ask(server, with_host("POST", "/v1/completions", "localhost:8000",
                                             simple + "Origin: " + origin + "\r\n"));
    EXPECT_EQ(r.status, 403) << origin;
    EXPECT_EQ(r.json()["error"]["code"], "origin_not_allowed");
    EXPECT_THAT(r.body, HasSubstr("--cors-origin"));
  }
  EXPECT_EQ(server.metric("fathom_generated_tokens_total"), 0);
  // Its own page, and programs, which say nothing of pages.
  EXPECT_EQ(
      ask(server, with_host("POST", "/v1/completions", "localhost:8000", "Origin: http://localhost:8000\r\n"))
          .status,
      200);
  EXPECT_EQ(ask(server, with_host("POST", "/v1/completions", "localhost:8000")).status, 200);
}

// DNS rebinding: a name of the page's own that leads here, which makes it the page's own origin.
TEST(Origins, NamesThatAreNotThisMachinesLeadNowhere) {
  TinyOptions o;
  o.service.api.origins.hosts = {"models.lan"};
  TinyServer server(o);
  server.open();
  for (const std::string host : {"evil.example", "evil.example:8000", "127.0.0.1.evil.example",
                                 "localhost.evil.example:80", "", "127.1", "[evil]"}) {
    const Response r =
        ask(server, with_host("POST", "/v1/completions", host, "Origin: http://" + host + "\r\n"));
    EXPECT_EQ(r.status, 403) << host;
    EXPECT_EQ(r.json()["error"]["code"], "host_not_allowed") << host;
    EXPECT_EQ(ask(server, with_host("GET", "/v1/models", host)).status, 403);
    EXPECT_EQ(ask(server, with_host("GET", "/health", host)).status, 200);  // for whoever watches it
  }
  EXPECT_EQ(ask(server, with_host("GET", "http://evil.example/v1/models", "localhost")).status, 403);
  for (const std::string host : {"localhost", "LocalHost:8000", "a.localhost:1", "127.0.0.1:8000",
                                 "[::1]:8000", "192.168.1.7", "models.lan:8000", "Models.LAN"})
    EXPECT_EQ(ask(server, with_host("GET", "/v1/models", host)).status, 200) << host;
  EXPECT_EQ(ask(server, "GET /v1/models HTTP/1.0\r\n\r\n").status, 200);  // a browser names a host
}

// A key is what no page has.
TEST(Origins, WithKeysTheKeyDecides) {
  TinyOptions o;
  o.service.api.keys = ApiKeys({"secret"});
  TinyServer server(o);
  server.open();
  const std::string key = "Authorization: Bearer secret\r\n";
  EXPECT_EQ(ask(server, with_host("GET", "/v1/models", "models.lan", key)).status, 200);
  EXPECT_EQ(
      ask(server, with_host("POST", "/v1/completions", "models.lan", key + "Origin: http://a\r\n")).status,
      200);
  EXPECT_EQ(ask(server, with_host("POST", "/v1/completions", "models.lan", "Origin: http://a\r\n")).status,
            401);
}

TEST(Origins, ThoseThatAreNamedMayAsk) {
  TinyOptions o;
  o.service.api.origins.cors = "http://a";
  TinyServer server(o);
  server.open();
  const auto answer = [&](const std::string& more) {
    return ask(server, with_host("POST", "/v1/completions", "localhost", more));
  };
  const Response named = answer("Origin: http://a\r\n");
  EXPECT_EQ(named.status, 200);
  EXPECT_EQ(named.headers.at("access-control-allow-origin"), "http://a");
  EXPECT_THAT(named.headers.at("access-control-expose-headers"), HasSubstr("Retry-After"));
  // A cache may not give one origin's answer to another one.
  EXPECT_EQ(named.headers.at("vary"), "Origin");
  EXPECT_EQ(answer("").headers.at("vary"), "Origin");
  const Response other = answer("Origin: http://b\r\n");
  EXPECT_EQ(other.status, 403);
  EXPECT_EQ(other.headers.at("vary"), "Origin");
  EXPECT_FALSE(other.headers.contains("access-control-allow-origin"));
}

TEST(Origins, OfAnyThereIsNoVariety) {
  TinyOptions o;
  o.service.api.origins.cors = "*";
  TinyServer server(o);
  server.open();
  const Response r = ask(server, with_host("POST", "/v1/completions", "localhost", "Origin: null\r\n"));
  EXPECT_EQ(r.status, 200);
  EXPECT_EQ(r.headers.at("access-control-allow-origin"), "*");
  EXPECT_FALSE(r.headers.contains("vary"));
}

// What OpenAI's own package for JavaScript asks leave for.
TEST(Origins, OpenAisHeadersMayCome) {
  TinyOptions o;
  o.service.api.origins.cors = "http://a";
  TinyServer server(o);
  server.open();
  const std::string asked =
      "authorization,content-type,openai-organization,x-stainless-arch,X-Stainless-Retry-Count,x-stainless-"
      "timeout";
  const auto preflight = [&](const std::string& origin, const std::string& headers) {
    return ask(server, with_host("OPTIONS", "/v1/chat/completions", "localhost",
                                 "Origin: " + origin +
                                     "\r\nAccess-Control-Request-Method: POST\r\n"
                                     "Access-Control-Request-Headers: " +
                                     headers + "\r\n"));
  };
  const Response r = preflight("http://a", asked + ", x-other, x-stainless-a b, ");
  EXPECT_EQ(r.status, 204);
  EXPECT_EQ(r.headers.at("access-control-allow-origin"), "http://a");
  const std::string allowed = r.headers.at("access-control-allow-headers");
  for (const char* name : {"authorization", "content-type", "openai-organization", "x-stainless-arch",
                           "x-stainless-retry-count", "x-stainless-timeout"})
    EXPECT_THAT(allowed, HasSubstr(name));
  EXPECT_EQ(allowed.find("x-other"), std::string::npos);
  EXPECT_EQ(allowed.find("a b"), std::string::npos);
  EXPECT_THAT(r.headers.at("vary"), HasSubstr("Access-Control-Request-Headers"));
  EXPECT_FALSE(preflight("http://b", asked).headers.contains("access-control-allow-headers"));
}

// What no browser ever says would let nobody in, and say nothing of it.
TEST(Origins, AreWhatABrowserSays) {
  for (const char* good :
       {"", "*", "null", "https://app.example", "http://localhost:3000", "http://[::1]:80"})
    EXPECT_NO_THROW(Origins({.cors = good, .hosts = {"app.example"}})) << good;
  for (const char* bad : {"app.example", "https://app.example/", "https://", "://app.example",
                          "https://a.example,https://b.example", "https://a@b.example"})
    EXPECT_THROW(Origins({.cors = bad, .hosts = {}}), UsageError) << bad;
  for (const char* bad : {"", "http://app.example", "app.example:8000", "a/b", "a b"})
    EXPECT_THROW(Origins({.cors = "", .hosts = {bad}}), UsageError) << bad;
}

}  // namespace
}  // namespace fathom::serve
