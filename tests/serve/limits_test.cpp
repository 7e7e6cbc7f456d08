// What one request, one client or one fault may cost the others.
#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

#include <gmock/gmock.h>

#include "src/core/stopwatch.h"
#include "tests/serve/tiny_server.h"

namespace fathom::serve {
namespace {

using nlohmann::json;
using std::chrono::milliseconds;
using ::testing::HasSubstr;
using ::testing::StartsWith;

/// Answers what a test asks for, and keeps how it ended.
class Handler final : public HttpHandler {
 public:
  static constexpr std::size_t kLarge = 32 << 20;

  bool admit(const HttpRequest& /*head*/, HttpReply& /*refusal*/) override { return true; }
  void handle(std::shared_ptr<HttpExchange> exchange) override {
    const std::string& path = exchange->request().path;
    if (path == "/slow") std::this_thread::sleep_for(milliseconds(700));
    if (path == "/large") return exchange->reply({.body = std::string(kLarge, 'x')});
    if (path == "/some") return exchange->reply({.body = std::string(2 << 20, 'x')});
    if (path == "/begun") exchange->begin({});
    exchange->on_gone([this] { ++gone; });
    if (path == "/fails" || path == "/begun")
      exchange->post([] { throw std::runtime_error("on the strand"); });
    if (path == "/throws") throw std::runtime_error("in the handler");
    if (path == "/fine" || path == "/slow") exchange->reply({.body = "fine"});
  }
  HttpReply refusal(int status, const std::string& why) override { return {.status = status, .body = why}; }
  void answered(const HttpRequest& request, const AnswerRecord& record, int /*status*/,
                std::int64_t /*bytes*/, double /*seconds*/) override {
    const std::lock_guard lock(mutex_);
    ends_[request.path] = record.end;
  }
  void connections(std::int64_t /*open*/) override {}

  /// How the request to `path` ended; "-": not yet.
  /// The server hears of an end behind the client: waits for it, two minutes at the most.
  std::string end_of(const std::string& path) {
    for (int i = 0; i < 12000; ++i) {
      {
        const std::lock_guard lock(mutex_);
        if (const auto found = ends_.find(path); found != ends_.end()) return found->second;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return "-";
  }

  std::atomic<int> gone{0};

 private:
  std::mutex mutex_;
  std::map<std::string, std::string> ends_;
};

constexpr int kSmall = 64 << 10;  // of a client's system, against answers of megabytes

HttpOptions any_port() {
  HttpOptions o;
  o.port = 0;
  return o;
}

TEST(Limits, RoutesThatTakeNoBodyReadNone) {
  TinyServer server;
  server.open();
  for (const char* method : {"GET", "HEAD"}) {
    Connection c(server.port());
    c.send(std::string(method) +
           " /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1;aaaa");
    std::string answer;
    for (std::string more = c.read_some(10); !more.empty(); more = c.read_some(10)) answer += more;
    EXPECT_THAT(answer, HasSubstr("HTTP/1.1 400 "));
    EXPECT_THAT(answer, HasSubstr("Connection: close"));
  }
  EXPECT_EQ(get(server.port(), "/health", "Content-Length: 0\r\n").status, 200);
}

// A body whose end nobody knows: what is in it must never be read as another request.
TEST(Limits, CodingsThatNobodyReadsAreRefused) {
  TinyServer server;
  server.open();
  const std::string hidden = "GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n";
  const struct {
    const char* fields;
    int status;
    const char* why;
  } cases[] = {
      {"Transfer-Encoding: gzip\r\n", 400, "'gzip'"},
      {"Transfer-Encoding: identity\r\n", 400, "'identity'"},
      {"Transfer-Encoding: gzip, chunked\r\n", 400, "'gzip, chunked'"},
      {"Transfer-Encoding: chunked\r\nTransfer-Encoding: gzip\r\n", 400, "Transfer-Encoding"},
      {"Content-Encoding: gzip\r\nContent-Length: 51\r\n", 415, "'gzip'"},
      {"Content-Length: 51\r\nHost: elsewhere\r\n", 400, "Host"},
  };
  for (const char* begin : {"POST /tokenize", "POST /nowhere", "GET /health"}) {
    for (const auto& c : cases) {
      SCOPED_TRACE(std::string(begin) + " " + c.fields);
      Connection connection(server.port());
      connection.send(std::string(begin) + " HTTP/1.1\r\nHost: localhost\r\n" + c.fields + "\r\n" + hidden);
      std::string answers;
      for (std::string more = connection.read_some(10); !more.empty(); more = connection.read_some(10))
        answers += more;
      EXPECT_THAT(answers, StartsWith("HTTP/1.1 " + std::to_string(c.status)));
      EXPECT_THAT(answers, HasSubstr("Connection: close"));
      EXPECT_THAT(answers, HasSubstr(c.why));
      EXPECT_THAT(answers, HasSubstr("{\"error\":{"));
      EXPECT_EQ(answers.find("HTTP/1.1 ", 1), std::string::npos) << answers;
    }
  }
  Connection connection(server.port());
  connection.send(
      "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: identity\r\nTransfer-Encoding: "
      "CHUNKED\r\n\r\nf\r\n{\"prompt\": \"a\"}\r\n0\r\n\r\n");
  EXPECT_EQ(connection.read().status, 200);
}

TEST(Limits, WhatStandsAroundChunksHasAnEnd) {
  TinyOptions o;
  o.service.http.body = milliseconds(3000);
  TinyServer server(o);
  server.open();
  for (const char* begin : {"1;", "1\r\n{\r\n0\r\nX: "}) {
    Connection c(server.port());
    c.send(std::string("POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n") +
           begin + std::string(1 << 20, 'a'));
    Response r = c.read(10);
    EXPECT_EQ(r.status, 413);
    EXPECT_EQ(r.headers["connection"], "close");
    EXPECT_THAT(r.body, HasSubstr("chunks"));
  }
  // As far as it is of use, it may be there.
  Connection c(server.port());
  c.send("POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nf;" +
         std::string(2000, 'a') + "\r\n{\"prompt\": \"a\"}\r\n0\r\nX: " + std::string(2000, 'a') +
         "\r\n\r\n");
  EXPECT_EQ(c.read().status, 200);
}

TEST(Limits, APromptInAStreamIsNotWhatAClientLeavesUnread) {
  TinyOptions o;
  o.service.http.unsent_bytes = 64 << 10;
  TinyServer server(o);
  server.open();
  const json body = {{"prompt", std::string(400, 'a')},
                     {"max_tokens", 20},
                     {"logprobs", 20},
                     {"echo", true},
                     {"stream", true},
                     {"n", 2},
                     {"ignore_eos", true}};
  const Response r = post(server.port(), "/v1/completions", body);
  EXPECT_TRUE(r.is_complete);
  EXPECT_GT(r.body.find("\n\n"), o.service.http.unsent_bytes);
  EXPECT_FALSE(r.events().empty());
}

TEST(Limits, WhatThrowsEndsItsOwnRequest) {
  Handler handler;
  HttpServer server(any_port(), handler);
  server.start();
  EXPECT_EQ(get(server.port(), "/fails").status, 500);
  EXPECT_EQ(handler.gone, 1);  // who worked for it has heard
  EXPECT_EQ(get(server.port(), "/throws").status, 500);
  const Response begun = get(server.port(), "/begun");
  EXPECT_EQ(begun.status, 200);
  EXPECT_FALSE(begun.is_complete);
  EXPECT_EQ(get(server.port(), "/fine").body, "fine");
  EXPECT_EQ(handler.end_of("/fails"), "failed");
  EXPECT_EQ(handler.end_of("/begun"), "failed");
}

TEST(Limits, HeavyRequestsLeaveAThreadToLightOnes) {
  Handler handler;
  HttpOptions o = any_port();
  o.threads = 2;
  HttpServer server(o, handler);
  server.start();
  std::vector<std::unique_ptr<Connection>> heavy;
  for (int i = 0; i < 4; ++i) {
    heavy.push_back(std::make_unique<Connection>(server.port()));
    heavy.back()->send(request_text("POST", "/slow", std::string(100'000, 'x')));
  }
  heavy.back()->close();  // its turn comes to nothing
  heavy.pop_back();
  std::this_thread::sleep_for(milliseconds(100));
  const Stopwatch watch;
  EXPECT_EQ(get(server.port(), "/fine").status, 200);
  EXPECT_LT(watch.seconds(), 0.4);
  for (const auto& c : heavy) EXPECT_EQ(c->read().status, 200);
  EXPECT_EQ(handler.end_of("/fine"), "");
}

struct Listener final : JobListener {
  explicit Listener(bool throws_) : throws(throws_) {}
  void updated(std::vector<TextUpdate> updates) override {
    if (throws) throw std::bad_alloc();
    for (const TextUpdate& u : updates) finished += u.finish != Finish::None ? 1 : 0;
  }
  void failed(const ApiError& /*error*/) override {
    ++failures;
    if (throws) throw std::bad_alloc();
  }
  const bool throws;
  int finished = 0, failures = 0;
};

TEST(Limits, AListenerThatThrowsEndsItsOwnJob) {
  TinyModel model;
  Engine engine = model.engine(8, 8);
  ServeMetrics metrics;
  Scheduler scheduler(engine, model.tokenizer, {}, metrics);
  std::vector<std::shared_ptr<Listener>> listeners;
  for (const bool throws : {true, false, true}) {
    listeners.push_back(std::make_shared<Listener>(throws));
    Job job;
    // One that throws at its only update, and one that has more to come.
    for (int i = 0; i < 2; ++i) {
      TextRequest text;
      text.request.prompt = {1, 2, 3};
      text.request.max_tokens = listeners.size() == 1 ? 1 : 20;
      job.texts.push_back(std::move(text));
    }
    job.listener = listeners.back();
    scheduler.submit(std::move(job));
  }
  scheduler.drain(Clock::now() + std::chrono::minutes(1));
  scheduler.run();
  EXPECT_EQ(listeners[0]->failures, 1);
  EXPECT_EQ(listeners[1]->failures, 0);
  EXPECT_EQ(listeners[1]->finished, 2);
  EXPECT_EQ(listeners[2]->failures, 1);
  EXPECT_EQ(engine.stats().free_blocks, engine.stats().blocks);
}

TEST(Limits, ALongAnswerWaitsForAReaderNoLongerThanAShortOne) {
  Handler handler;
  HttpOptions o = any_port();
  o.write = milliseconds(500);
  HttpServer server(o, handler);
  server.start();
  const Stopwatch watch;
  Connection reads_nothing(server.port());
  reads_nothing.keep_little();
  reads_nothing.send(request_text("GET", "/large"));
  EXPECT_EQ(handler.end_of("/large"), "unread");
  EXPECT_LT(watch.seconds(), 8);
  EXPECT_EQ(get(server.port(), "/large").body.size(), Handler::kLarge);
  // Who reads, if slowly, has the time again for each part.
  const Stopwatch slow_watch;
  Connection slow(server.port());
  slow.keep_little(kSmall);
  slow.send(request_text("GET", "/some"));
  std::size_t bytes = 0;
  while (bytes < 2 << 20) {
    const std::string more = slow.read_some(10);
    if (more.empty()) break;
    bytes += more.size();
    std::this_thread::sleep_for(std::chrono::microseconds(more.size()));  // 1 MB/s, at most
  }
  EXPECT_GE(bytes, 2 << 20);
  EXPECT_GT(slow_watch.seconds(), 1);
}

TEST(Limits, ConnectionsThatTheEndCutsAreReported) {
  Handler handler;
  HttpServer server(any_port(), handler);
  server.start();
  Connection c(server.port());
  c.keep_little();
  c.send(request_text("GET", "/large"));
  EXPECT_FALSE(c.read_some().empty());
  server.close();
  server.stop(std::chrono::steady_clock::now() + milliseconds(100));
  EXPECT_EQ(handler.end_of("/large"), "closed");
}

TEST(Limits, AnswersMayTakeTheWholeDrainToBeRead) {
  TinyOptions o;
  o.service.drain = milliseconds(20'000);
  TinyServer server(o);
  server.open();
  Connection c(server.port());
  c.keep_little(kSmall);
  const json body = {
      {"prompt", "go"}, {"max_tokens", 500}, {"n", 32}, {"logprobs", 20}, {"ignore_eos", true}};
  c.send(request_text("POST", "/v1/completions", body.dump()));
  EXPECT_TRUE(server.comes_to("fathom_generated_tokens_total", 32 * 500));
  EXPECT_TRUE(server.service().shut_down());
  std::this_thread::sleep_for(milliseconds(6000));  // more than the last bytes have without a drain
  const Response r = c.read();
  EXPECT_TRUE(r.is_complete);
  EXPECT_GT(r.body.size(), 8 << 20);  // more than the system holds
  c.close();
  const Stopwatch watch;
  server.join();
  EXPECT_LT(watch.seconds(), 5);
}

TEST(Limits, MoreTextsThanThereIsEverRoomForAreNoMatterOfTime) {
  TinyOptions o;
  o.sequences = 2;
  o.service.scheduler.queue = 3;
  TinyServer server(o);
  server.open();
  const Response r = post(server.port(), "/v1/completions", {{"prompt", "a"}, {"n", 6}, {"max_tokens", 1}});
  EXPECT_EQ(r.status, 400);
  EXPECT_THAT(r.body, HasSubstr("at most 5"));
  EXPECT_EQ(post(server.port(), "/v1/completions", {{"prompt", "a"}, {"n", 5}, {"max_tokens", 1}}).status,
            200);
}

TEST(Limits, TextsBeyondTheContextAreNotMadeTokens) {
  TinyServer server;
  server.open();
  const std::string text(3'000'000, 'a');
  for (const char* path : {"/tokenize", "/v1/completions"}) {
    const Response r = post(server.port(), path, {{"prompt", text}});
    EXPECT_EQ(r.status, 400) << path;
    EXPECT_EQ(r.json()["error"]["code"], "context_length_exceeded");
    EXPECT_THAT(r.body, HasSubstr("3000000 bytes"));
  }
  // As long as that takes no time, documents are: windows of them are a client's matter.
  EXPECT_EQ(post(server.port(), "/tokenize", {{"prompt", std::string(900'000, 'a')}}).json()["count"],
            900'000);
  const Response chat =
      post(server.port(), "/v1/chat/completions", {{"messages", {{{"role", "user"}, {"content", text}}}}});
  EXPECT_EQ(chat.json()["error"]["param"], "messages");
  EXPECT_EQ(chat.json()["error"]["code"], "context_length_exceeded");
}

TEST(Limits, WholeNumbersAreSaidWhole) {
  TinyServer server;
  server.open();
  EXPECT_THAT(post(server.port(), "/v1/completions", {{"max_tokens", -1}}).body,
              HasSubstr("from 0 to 2147483647"));
}

}  // namespace
}  // namespace fathom::serve
