// What a connection may look like: clients that send ahead, close their end, or write paths in other ways.
#include <thread>

#include <gmock/gmock.h>

#include "serve/http/target.h"
#include "tests/serve/tiny_server.h"

namespace fathom::serve {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

std::string long_request(bool stream, std::int64_t n = 1) {
  return request_text("POST", "/v1/completions",
                      json{{"prompt", "go"},
                           {"max_tokens", 4000},
                           {"n", n},
                           {"temperature", 0},
                           {"stream", stream},
                           {"ignore_eos", true}}
                          .dump());
}

TinyOptions long_texts() {
  TinyOptions o;
  o.context = 8192;
  o.cache_texts = 4;
  return o;
}

TEST(Connections, LeavingIsNoticedBehindWhatWasSentAhead) {
  TinyServer server(long_texts());
  server.open();
  int left = 0;
  const std::string next = request_text("GET", "/health");
  for (const std::string& ahead :
       {std::string("\n"), std::string("G"), next + next, std::string(60'000, 'x')}) {
    for (const bool stream : {false, true}) {
      Connection c(server.port());
      c.send(long_request(stream) + ahead);
      EXPECT_TRUE(server.comes_to("fathom_requests_running", 1));
      c.close();
      EXPECT_TRUE(server.comes_to("fathom_requests_cancelled_total", ++left)) << ahead.size();
    }
  }
  EXPECT_TRUE(server.all_blocks_free());
  EXPECT_LT(server.metric("fathom_generated_tokens_total"), 8 * 3000);
}

TEST(Connections, WhatComesDuringAnAnswerIsAnsweredBehindIt) {
  TinyServer server;
  server.open();
  Connection c(server.port());
  const json body = {{"prompt", "go"}, {"max_tokens", 300}, {"ignore_eos", true}};
  c.send(request_text("POST", "/v1/completions", body.dump()));
  EXPECT_TRUE(server.comes_to("fathom_requests_running", 1));
  const std::string next = request_text("GET", "/version");
  for (const char byte : next) {
    c.send(std::string(1, byte));
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  EXPECT_EQ(c.read().json()["usage"]["completion_tokens"], 300);
  EXPECT_TRUE(c.read().json().contains("version"));
  // A body that is larger than what is read ahead waits with the system.
  const std::string large =
      request_text("POST", "/detokenize", json{{"tokens", std::vector<int>(200'000, 65)}}.dump());
  const std::jthread sender(
      [&] { c.send(request_text("POST", "/v1/completions", body.dump()) + large + next); });
  EXPECT_EQ(c.read().json()["usage"]["completion_tokens"], 300);
  EXPECT_EQ(c.read().json()["prompt"].get<std::string>().size(), 200'000u);
  EXPECT_TRUE(c.read().json().contains("version"));
}

// An answer may end while any byte of the next request comes in.
TEST(Connections, AnAnswerMayEndAtAnyByteOfTheNextRequest) {
  TinyServer server;
  server.open();
  Connection c(server.port());
  const std::string next = request_text("GET", "/version");
  for (int i = 0; i < 300; ++i) {
    const json body = {{"prompt", "go"}, {"max_tokens", 1 + i % 5}, {"ignore_eos", true}};
    c.send(request_text("POST", "/v1/completions", body.dump()));
    for (const char byte : next) {
      c.send(std::string(1, byte));
      std::this_thread::sleep_for(std::chrono::microseconds(1 + i % 20));
    }
    ASSERT_EQ(c.read().json()["usage"]["completion_tokens"], 1 + i % 5);
    ASSERT_TRUE(c.read().json().contains("version")) << i;
  }
}

TEST(Connections, WhoSaysNoMoreIsAnswered) {
  TinyServer server;
  server.open();
  for (const bool stream : {false, true}) {
    for (const int requests : {1, 2}) {
      Connection c(server.port());
      const json body = {{"prompt", "go"},
                         {"max_tokens", 200},
                         {"stream", stream},
                         {"ignore_eos", true},
                         {"temperature", 0}};
      for (int i = 0; i < requests; ++i) c.send(request_text("POST", "/v1/completions", body.dump()));
      c.close_sending();
      for (int i = 0; i < requests; ++i) {
        const Response r = c.read();
        EXPECT_EQ(r.status, 200);
        EXPECT_TRUE(r.is_complete);
        if (stream) {
          EXPECT_GT(r.events().size(), 1u);
        }
      }
      EXPECT_EQ(c.read_some(), "");  // and the server closes too
    }
  }
  // HTTP/1.0 as well.
  Connection old(server.port());
  const std::string body = json{{"prompt", "go"}, {"max_tokens", 200}, {"ignore_eos", true}}.dump();
  old.send("POST /v1/completions HTTP/1.0\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" +
           body);
  old.close_sending();
  EXPECT_EQ(old.read().json()["usage"]["completion_tokens"], 200);
  // Half a request is none.
  Connection half(server.port());
  half.send("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{");
  half.close_sending();
  EXPECT_EQ(half.read_some(), "");
  EXPECT_TRUE(server.comes_to("fathom_requests_cancelled_total", 0));
}

TEST(Connections, WhoSaysNoMoreMayLeaveYet) {
  TinyServer server(long_texts());
  server.open();
  int left = 0;
  for (const bool stream : {false, true}) {
    Connection c(server.port());
    c.send(long_request(stream));
    c.close_sending();
    EXPECT_TRUE(server.comes_to("fathom_requests_running", 1));
    c.close();
    EXPECT_TRUE(server.comes_to("fathom_requests_cancelled_total", ++left));
  }
  EXPECT_TRUE(server.all_blocks_free());
  EXPECT_LT(server.metric("fathom_generated_tokens_total"), 2 * 3000);
}

TEST(Targets, AreReadAsTheyAreMeant) {
  const auto read = [](const char* text) {
    const std::optional<Target> t = read_target(text);
    return t ? t->host + "|" + t->path : "none";
  };
  EXPECT_EQ(read("/v1/models"), "|/v1/models");
  EXPECT_EQ(read("/v1/models?x=%zz#y"), "|/v1/models");
  EXPECT_EQ(read("/v1%2Fmodels/a%20b%C3%A9"), "|/v1/models/a b\xc3\xa9");
  EXPECT_EQ(read("http://localhost:8000/health?a"), "localhost:8000|/health");
  EXPECT_EQ(read("HTTPS://Example.org"), "Example.org|/");
  EXPECT_EQ(read("http://[::1]:80?q"), "[::1]:80|/");
  EXPECT_EQ(read("http://user@host/"), "host|/");
  EXPECT_EQ(read("*"), "|*");
  for (const char* bad :
       {"", "health", "/%", "/%4", "/%4g", "ftp://a/", "http://", "http:///x", "localhost:80"})
    EXPECT_EQ(read(bad), "none") << bad;
}

TEST(Connections, TargetsMayBeCodedOrWhole) {
  TinyServer server;
  server.open();
  EXPECT_EQ(get(server.port(), "/v1/models/%74iny").json()["id"], "tiny");
  EXPECT_EQ(get(server.port(), "/%68ealth").status, 200);
  EXPECT_EQ(get(server.port(), "http://localhost:8000/v1/models/tiny?a=b").json()["id"], "tiny");
  EXPECT_EQ(get(server.port(), "http://localhost:8000").status, 200);
  const Response bad = get(server.port(), "/v1/%zz");
  EXPECT_EQ(bad.status, 400);
  EXPECT_THAT(bad.body, HasSubstr("target"));
}

}  // namespace
}  // namespace fathom::serve
