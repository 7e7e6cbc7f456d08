// Limits, and clients that leave, dawdle, or send what is no request.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <thread>

#include <gmock/gmock.h>

#include "kernels/error.h"
#include "src/core/splitmix64.h"
#include "src/core/stopwatch.h"
#include "tests/io/temp.h"
#include "tests/serve/tiny_server.h"

namespace fathom::serve {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

json long_text(bool stream, std::int64_t tokens = 400) {
  return {
      {"prompt", "go"}, {"max_tokens", tokens}, {"temperature", 0}, {"stream", stream}, {"ignore_eos", true}};
}

std::string long_request(bool stream) {
  return request_text("POST", "/v1/completions", long_text(stream).dump());
}

void wait_until_running(const TinyServer& server, double texts) {
  for (int i = 0; i < 5000 && server.metric("fathom_requests_running") < texts; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

TEST(Operations, NothingButHealthAndMetricsBeforeTheModel) {
  TinyServer server;
  const Response health = get(server.port(), "/health");
  EXPECT_EQ(health.status, 503);
  EXPECT_EQ(health.json()["error"]["type"], "server_error");
  EXPECT_EQ(get(server.port(), "/v1/models").status, 503);
  EXPECT_EQ(get(server.port(), "/metrics").status, 200);
  EXPECT_FALSE(server.service().shut_down());
  server.open();
  EXPECT_EQ(get(server.port(), "/health").status, 200);
}

TEST(Operations, APortThatIsTakenIsOneParagraph) {
  TinyServer server;
  ServiceOptions options;
  options.http.port = server.port();
  try {
    const Service second(options);
    FAIL() << "two servers on one port";
  } catch (const UserError& e) {
    EXPECT_THAT(e.what(), HasSubstr(std::to_string(server.port())));
    EXPECT_THAT(e.what(), HasSubstr("Another program has it"));
  }
  options.http.host = "no address";
  EXPECT_THROW(Service{options}, UsageError);
}

TEST(Operations, KeysAreAskedFor) {
  TinyOptions o;
  o.service.api.keys = ApiKeys({"secret"});
  TinyServer server(o);
  server.open();
  const Response none = get(server.port(), "/v1/models");
  EXPECT_EQ(none.status, 401);
  EXPECT_EQ(none.json()["error"]["code"], "invalid_api_key");
  EXPECT_EQ(get(server.port(), "/v1/models", "Authorization: Bearer secres\r\n").status, 401);
  EXPECT_EQ(get(server.port(), "/v1/models", "Authorization: Bearer secret\r\n").status, 200);
  EXPECT_EQ(get(server.port(), "/nowhere").status, 401);
  // A body that nobody will read is not waited for.
  Connection c(server.port());
  c.send("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n{");
  const Response r = c.read();
  EXPECT_EQ(r.status, 401);
  EXPECT_EQ(r.headers.at("connection"), "close");
}

TEST(Operations, BodiesAndHeadersHaveLimits) {
  TinyOptions o;
  o.service.http.body_bytes = 1000;
  TinyServer server(o);
  server.open();
  const json body = {{"prompt", std::string(2000, 'x')}};
  const Response large = post(server.port(), "/v1/completions", body);
  EXPECT_EQ(large.status, 413);
  EXPECT_THAT(large.body, HasSubstr("1000 bytes"));
  EXPECT_EQ(get(server.port(), "/health", "X: " + std::string(20000, 'x') + "\r\n").status, 431);
  Connection chunked(server.port());
  chunked.send("POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n7d0\r\n" +
               std::string(2000, 'x') + "\r\n0\r\n\r\n");
  EXPECT_EQ(chunked.read().status, 413);
}

TEST(Operations, ConnectionsAreKeptAndRequestsMayComeAhead) {
  TinyServer server;
  server.open();
  Connection c(server.port());
  const std::string body = json{{"prompt", "ab"}, {"max_tokens", 3}, {"temperature", 0}}.dump();
  std::string ahead;
  for (int i = 0; i < 20; ++i) ahead += request_text("POST", "/v1/completions", body);
  c.send(ahead);
  const json first = c.read().json()["choices"];
  for (int i = 1; i < 20; ++i) EXPECT_EQ(c.read().json()["choices"], first) << i;
  // An answer to HEAD has the length of what it leaves out.
  c.send(request_text("HEAD", "/health") + request_text("GET", "/version"));
  std::string rest;
  for (std::string more = "-"; !more.empty() && rest.find("commit") == std::string::npos; rest += more)
    more = c.read_some();
  EXPECT_THAT(rest, HasSubstr("Content-Length: 15"));
  EXPECT_EQ(rest.find("\"status\""), std::string::npos);
  // HTTP/1.0 knows no chunks.
  Connection old(server.port());
  const std::string stream = json{{"prompt", "ab"}, {"max_tokens", 3}, {"stream", true}}.dump();
  old.send("POST /v1/completions HTTP/1.0\r\nContent-Length: " + std::to_string(stream.size()) + "\r\n\r\n" +
           stream);
  const Response r = old.read();
  EXPECT_FALSE(r.headers.contains("transfer-encoding"));
  EXPECT_FALSE(r.events().empty());
  // And a client may ask first.
  Connection polite(server.port());
  polite.send("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: " +
              std::to_string(body.size()) + "\r\n\r\n");
  EXPECT_THAT(polite.read_some(), HasSubstr("100 Continue"));
  polite.send(body);
  EXPECT_EQ(polite.read().status, 200);
}

TEST(Operations, ClientsThatLeaveLeaveNoBlock) {
  TinyServer server;
  server.open();
  for (const bool stream : {true, false}) {
    std::vector<std::unique_ptr<Connection>> clients;
    for (int i = 0; i < 30; ++i) {
      clients.push_back(std::make_unique<Connection>(server.port()));
      clients.back()->send(long_request(stream));
    }
    wait_until_running(server, 30);
    for (const auto& c : clients) {
      if (!stream) break;
      EXPECT_THAT(c->read_some(), HasSubstr("200 OK"));
    }
    const double generated = server.metric("fathom_generated_tokens_total");
    clients.clear();
    EXPECT_TRUE(server.all_blocks_free());
    // Most of what they had asked for was never written.
    EXPECT_LT(server.metric("fathom_generated_tokens_total") - generated, 30 * 300);
  }
  EXPECT_TRUE(server.comes_to("fathom_requests_cancelled_total", 60));
}

TEST(Operations, TheQueueHasAnEnd) {
  TinyOptions o;
  o.sequences = 2;
  o.service.scheduler.queue = 3;
  TinyServer server(o);
  server.open();
  std::vector<std::unique_ptr<Connection>> clients;
  for (int i = 0; i < 5; ++i) {
    clients.push_back(std::make_unique<Connection>(server.port()));
    clients.back()->send(long_request(false));
  }
  Response refused;
  for (int i = 0; i < 200 && refused.status != 429; ++i)
    refused = post(server.port(), "/v1/completions", {{"prompt", "a"}, {"n", 4}, {"max_tokens", 1}});
  EXPECT_EQ(refused.status, 429);
  const int after = std::stoi(refused.headers.at("retry-after"));
  EXPECT_TRUE(after >= 1 && after <= RoomEstimate::kMost) << after;
  EXPECT_EQ(refused.json()["error"]["type"], "rate_limit_error");
  for (const auto& c : clients) EXPECT_EQ(c->read().status, 200);
  EXPECT_EQ(post(server.port(), "/v1/completions", {{"prompt", "a"}, {"n", 5}}).status, 200);
}

TEST(Operations, WhenToComeAgainIsAMatterOfHowFastTextsEnd) {
  using std::chrono::milliseconds;
  RoomEstimate room;
  const Clock::time_point begin{};
  room.began(begin);
  EXPECT_EQ(room.seconds_until(1, begin), 1);
  // Nothing has ended yet: as if one did now.
  EXPECT_EQ(room.seconds_until(1, begin + milliseconds(2500)), 3);
  EXPECT_EQ(room.seconds_until(2, begin + milliseconds(2500)), 5);
  for (int i = 1; i <= 1000; ++i) room.ended(begin + milliseconds(500 * i));
  const Clock::time_point now = begin + milliseconds(500 * 1001);
  EXPECT_EQ(room.seconds_until(1, now), 1);
  EXPECT_EQ(room.seconds_until(8, now), 4);
  EXPECT_EQ(room.seconds_until(1000, now), RoomEstimate::kMost);
  // Slower now: the last ones count.
  for (int i = 1; i <= 300; ++i) room.ended(now + std::chrono::seconds(2 * i));
  EXPECT_EQ(room.seconds_until(4, now + std::chrono::seconds(602)), 8);
  // A pause says nothing of how fast they are.
  room.began(now + std::chrono::hours(1));
  EXPECT_EQ(room.seconds_until(8, now + std::chrono::hours(1) + milliseconds(100)), 1);
}

TEST(Operations, RequestsHaveADeadline) {
  TinyOptions o;
  o.service.api.deadline = std::chrono::milliseconds(1);
  TinyServer server(o);
  server.open();
  const Response whole = post(server.port(), "/v1/completions", long_text(false));
  EXPECT_EQ(whole.status, 504);
  EXPECT_EQ(whole.json()["error"]["code"], "deadline_exceeded");
  EXPECT_TRUE(server.all_blocks_free());
}

TEST(Operations, ReadersThatStopAreGivenUp) {
  TinyOptions o;
  o.service.http.unsent_bytes = 64 << 10;
  o.service.http.write = std::chrono::milliseconds(300);
  o.context = 4096;
  o.cache_texts = 8;
  TinyServer server(o);
  server.open();
  Connection c(server.port());
  c.keep_little();
  json body = long_text(true, 4000);
  body["n"] = 6;
  body["logprobs"] = 20;  // long events
  c.send(request_text("POST", "/v1/completions", body.dump()));
  EXPECT_TRUE(server.comes_to("fathom_requests_cancelled_total", 1));
  EXPECT_TRUE(server.all_blocks_free());
  EXPECT_LT(server.metric("fathom_generated_tokens_total"), 20000);
}

TEST(Operations, SlowSendersAreGivenUp) {
  TinyOptions o;
  o.service.http.header = o.service.http.body = o.service.http.idle = std::chrono::milliseconds(150);
  TinyServer server(o);
  server.open();
  const Stopwatch watch;
  Connection idle(server.port()), header(server.port()), body(server.port());
  header.send("GET /hea");
  body.send("POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{");
  for (const Connection* c : {&idle, &header, &body}) EXPECT_EQ(c->read_some(10), "");
  EXPECT_LT(watch.seconds(), 5);
  // A byte now and then does not help.
  Connection drops(server.port());
  bool open = true;
  for (int i = 0; i < 100 && open; ++i) {
    open = drops.send("G");
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  EXPECT_FALSE(open);
}

TEST(Operations, IdleConnectionsGiveWayToNewOnes) {
  TinyOptions o;
  o.service.http.connections = 20;
  TinyServer server(o);
  server.open();
  std::vector<std::unique_ptr<Connection>> idle;
  for (int i = 0; i < 200; ++i) idle.push_back(std::make_unique<Connection>(server.port()));
  EXPECT_EQ(get(server.port(), "/health").status, 200);
  EXPECT_TRUE(server.falls_to("fathom_http_connections", 20));  // one that asks may make another one go
  EXPECT_EQ(idle.front()->read_some(), "");
}

TEST(Operations, WhatRunsIsFinishedBeforeTheEnd) {
  TinyServer server;
  server.open();
  std::vector<std::unique_ptr<Connection>> clients;
  for (int i = 0; i < 8; ++i) {
    clients.push_back(std::make_unique<Connection>(server.port()));
    clients.back()->send(long_request(i % 2 == 0));
  }
  Connection idle(server.port());
  wait_until_running(server, 8);
  EXPECT_TRUE(server.service().shut_down());
  for (std::size_t i = 0; i < clients.size(); ++i) {
    const Response r = clients[i]->read();
    EXPECT_EQ(r.status, 200);
    EXPECT_TRUE(r.is_complete);
    if (i % 2 != 0) continue;
    EXPECT_EQ(r.events().back()["choices"][0]["finish_reason"], "length");
  }
  server.join();
  EXPECT_EQ(idle.read_some(), "");
  EXPECT_EQ(server.stats().free_blocks, server.stats().blocks);
}

TEST(Operations, ADrainHasAnEndToo) {
  TinyOptions o;
  o.service.drain = std::chrono::milliseconds(1);
  o.context = 4096;
  o.cache_texts = 8;
  TinyServer server(o);
  server.open();
  Connection whole(server.port()), stream(server.port());
  whole.send(request_text("POST", "/v1/completions", long_text(false, 4000).dump()));
  stream.send(request_text("POST", "/v1/completions", long_text(true, 4000).dump()));
  wait_until_running(server, 2);
  const std::string begun = stream.read_some();
  EXPECT_TRUE(server.service().shut_down());
  EXPECT_EQ(whole.read().status, 503);
  server.join();
  std::string rest = begun;
  for (std::string more = stream.read_some(); !more.empty(); more = stream.read_some()) rest += more;
  EXPECT_THAT(rest, HasSubstr("\"code\":\"unavailable\""));
  EXPECT_EQ(server.stats().free_blocks, server.stats().blocks);
}

TEST(Operations, TheAccessLogHasALineARequest) {
  const testing::TempFolder folder;
  TinyOptions o;
  o.service.access_log = folder / "access.jsonl";
  {
    TinyServer server(o);
    server.open();
    post(server.port(), "/v1/completions", {{"prompt", "ab"}, {"max_tokens", 3}, {"ignore_eos", true}});
    Connection leaves(server.port());
    leaves.send(long_request(false));
    wait_until_running(server, 1);
    leaves.close();
    server.all_blocks_free();
    Connection nonsense(server.port());
    nonsense.send("nonsense\r\n\r\n");
    EXPECT_EQ(nonsense.read().status, 400);
  }
  std::ifstream in(folder / "access.jsonl");
  int completed = 0, left = 0, refused = 0;
  for (std::string text; std::getline(in, text);) {
    const json line = json::parse(text);
    if (line["path"] == "/v1/completions" && line["status"] == 200) {
      ++completed;
      EXPECT_EQ(line["completion_tokens"], 3);
      EXPECT_EQ(line["id"].get<std::string>().substr(0, 5), "cmpl-");
    }
    left += line["status"] == 499 && line["end"] == "left" ? 1 : 0;
    refused += line["status"] == 400 ? 1 : 0;
  }
  EXPECT_EQ(completed, 1);
  EXPECT_EQ(left, 1);
  EXPECT_EQ(refused, 1);
}

TEST(Operations, PagesOfOtherOriginsNeedLeave) {
  TinyOptions o;
  {
    TinyServer closed;
    closed.open();
    EXPECT_FALSE(get(closed.port(), "/health", "Origin: http://a\r\n")
                     .headers.contains("access-control-allow-origin"));
  }
  o.service.api.origins.cors = "http://a";
  TinyServer server(o);
  server.open();
  EXPECT_EQ(get(server.port(), "/health", "Origin: http://a\r\n").headers.at("access-control-allow-origin"),
            "http://a");
  EXPECT_FALSE(
      get(server.port(), "/health", "Origin: http://b\r\n").headers.contains("access-control-allow-origin"));
  Connection c(server.port());
  c.send(request_text("OPTIONS", "/v1/completions", "", "Origin: http://a\r\n"));
  EXPECT_EQ(c.read().status, 204);
}

/// A good request with some of its bytes changed, repeated, or left out.
std::string spoiled(SplitMix64& random) {
  const json body = {{"prompt", {1, 2, 3}},     {"max_tokens", 2}, {"n", 2},
                     {"stop", {"a", "b"}},      {"logprobs", 1},   {"stream", random.below(2) == 0},
                     {"logit_bias", {{"5", 1}}}};
  const char* paths[] = {"/v1/completions", "/tokenize", "/detokenize", "/health", "/v1/models/x"};
  std::string text = body.dump();
  std::string head = request_text(random.below(4) > 0 ? "POST" : "GET", paths[random.below(5)], "x");
  head.resize(head.size() - 1);
  head.replace(head.find("Content-Length: 1") == std::string::npos ? head.size() : head.find(": 1") + 2,
               std::string::npos,
               head.find(": 1") == std::string::npos ? "" : std::to_string(text.size()) + "\r\n\r\n");
  std::string& spoil = random.below(2) == 0 ? head : text;
  for (std::size_t i = random.below(4) + (random.below(8) > 0 ? 1 : 0); i > 0 && !spoil.empty(); --i) {
    const std::size_t at = random.below(spoil.size());
    switch (random.below(4)) {
      case 0:
        spoil[at] = static_cast<char>(random.below(256));
        break;
      case 1:
        spoil.erase(at, random.below(6));
        break;
      case 2:
        spoil.insert(at, spoil.substr(at, random.below(12)));
        break;
      default:
        spoil.insert(at, 1, "{}[]\",:\r\n0-9"[random.below(12)]);
    }
  }
  return head + text;
}

TEST(Operations, NothingThatASocketSendsBreaksIt) {
  const char* asked = std::getenv("FATHOM_FUZZ_REQUESTS");
  const int count = asked == nullptr ? 3000 : std::atoi(asked);
  TinyOptions o;
  o.service.http.header = o.service.http.body = std::chrono::milliseconds(200);
  o.service.http.idle = std::chrono::milliseconds(500);
  TinyServer server(o);
  server.open();
  std::atomic<int> next{0}, answered{0};
  const auto client = [&] {
    for (int i = next++; i < count; i = next++) {
      SplitMix64 random(static_cast<std::uint64_t>(i));
      Connection c(server.port());
      c.send(spoiled(random));
      // Most leave before an answer, as what they have sent may never be a whole request.
      if (random.below(8) == 0) answered += c.read_some(10).empty() ? 0 : 1;
      if (random.below(16) == 0) c.keep_little();
    }
  };
  std::vector<std::thread> clients;
  for (int i = 0; i < 8; ++i) clients.emplace_back(client);
  for (std::thread& t : clients) t.join();
  EXPECT_GT(answered, count / 32);
  EXPECT_EQ(get(server.port(), "/health").status, 200);
  EXPECT_TRUE(server.all_blocks_free());
  server.stop();
  EXPECT_EQ(server.stats().free_blocks, server.stats().blocks);
}

}  // namespace
}  // namespace fathom::serve
