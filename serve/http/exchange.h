// HTTP as the API sees it: a request, and how it is answered. No sockets here.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace fathom::serve {

using HttpHeader = std::pair<std::string, std::string>;

struct HttpRequest {
  std::string method;         // "POST"
  std::string path;           // without the query, decoded
  std::string authorization;  // the header's value
  std::string host;           // and that of Host, or what the target says instead of it
  bool has_host = false;
  std::string origin;
  std::string asks_for_headers;  // Access-Control-Request-Headers
  std::string peer;              // "127.0.0.1:41234"
  std::string body;
};

struct HttpReply {
  int status = 200;
  std::string content_type = "application/json";
  std::string body = {};
  std::vector<HttpHeader> headers = {};
};

/// What the access log says of an answered request beside method, path, status, bytes and seconds.
struct AnswerRecord {
  std::string id = {};  // of the completion
  std::int64_t prompt_tokens = -1, completion_tokens = -1;
  std::int64_t verifications = 0,
               verified_tokens = 0;  // by speculation: passes, and tokens that came of them
  std::string end = {};              // "left", "deadline", ... where it did not end well
};

/// One request on its way to its answer. All but post() is called on the exchange's own strand of threads,
/// which handle(), posted functions and on_gone are.
class HttpExchange {
 public:
  virtual ~HttpExchange() = default;

  virtual const HttpRequest& request() const = 0;
  /// Runs it on the strand. From any thread.
  virtual void post(std::function<void()> what) = 0;

  /// The whole answer; or else begin(), any number of write(), and end().
  virtual void reply(HttpReply reply) = 0;
  virtual void begin(HttpReply head) = 0;  // its body is not used
  virtual void write(std::string data) = 0;
  virtual void end() = 0;
  /// `gone` is called at most once, and only before the end of the answer: the client has left, or does not
  /// read what it is sent. Nothing that is written later goes anywhere.
  virtual void on_gone(std::function<void()> gone) = 0;

  AnswerRecord& record() { return record_; }
  /// Of whatever the answer will be.
  void add_header(HttpHeader header) { headers_.push_back(std::move(header)); }

 protected:
  std::vector<HttpHeader> headers_;

 private:
  AnswerRecord record_;
};

class HttpHandler {
 public:
  virtual ~HttpHandler() = default;
  /// Before the body is read, from any thread: true lets it come, false has `refusal` as the answer.
  virtual bool admit(const HttpRequest& head, HttpReply& refusal) = 0;
  virtual void handle(std::shared_ptr<HttpExchange> exchange) = 0;
  /// The answer to what is no request at all: 400, 408, 413, 431.
  virtual HttpReply refusal(int status, const std::string& why) = 0;
  /// A request has been answered with `bytes` of a body.
  virtual void answered(const HttpRequest& request, const AnswerRecord& record, int status,
                        std::int64_t bytes, double seconds) = 0;
  virtual void connections(std::int64_t open) = 0;
};

}  // namespace fathom::serve
