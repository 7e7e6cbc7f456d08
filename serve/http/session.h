// One connection. Private to this folder: nobody else sees Asio and Beast.
#pragma once

#include <array>
#include <deque>
#include <exception>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>

#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>

#include "serve/http/server.h"
#include "serve/http/stream.h"
#include "src/core/stopwatch.h"

namespace fathom::serve {

namespace asio = boost::asio;
namespace beast = boost::beast;
using tcp = asio::ip::tcp;
using boost::system::error_code;

class Session;

/// All connections that are open, and which have been idle for longest.
class Sessions {
 public:
  /// `turns` heavy requests are worked at at the same time, at most.
  Sessions(HttpHandler& handler, int turns) : handler_(handler), turns_(turns) {}

  void add(const std::shared_ptr<Session>& session);
  void remove(Session* session);
  void set_idle(Session* session, bool idle);
  /// Above `most` connections, the one that has been idle for longest, which is to close then and does not
  /// count any more; else null, and also when none is idle.
  std::shared_ptr<Session> surplus(std::int64_t most);
  std::vector<std::shared_ptr<Session>> all() const;
  std::int64_t count() const;

  /// Runs `work` by `executor` when it is its turn; it ends that with end_turn(). So heavy requests leave a
  /// thread to the light ones, however many come.
  void take_turn(const asio::any_io_executor& executor, std::function<void()> work);
  void end_turn();
  /// Nobody runs what waits any more; its sockets have to go before their context.
  void forget_turns();

 private:
  struct Entry {
    std::weak_ptr<Session> session;
    std::optional<std::list<Session*>::iterator> idle;
    bool is_going = false;
  };
  HttpHandler& handler_;
  mutable std::mutex mutex_;
  std::unordered_map<Session*, Entry> open_;
  std::list<Session*> idle_;
  std::int64_t going_ = 0;
  int turns_;  // that are free
  std::deque<std::pair<asio::any_io_executor, std::function<void()>>> waiting_;
};

class Exchange;

/// All functions but the constructor's run on the socket's strand.
///
/// A read is under way between requests, when it waits for the next one, and during an answer, when it sees
/// the client leave. What comes during an answer lies in the buffer until its turn; where that is full, the
/// rest waits with the system, and a reset alone is seen.
///
/// A client that ends its half of the connection may have left, or may have no more to say and wait: the same
/// bytes say both. So it is answered, and sent something at once (100 Continue, which any client of HTTP/1.1
/// has to pass over); the system of one that has left answers that by a reset.
class Session : public std::enable_shared_from_this<Session> {
 public:
  /// `tls`: null for plain HTTP.
  Session(tcp::socket socket, asio::ssl::context* tls, const HttpOptions& options, HttpHandler& handler,
          Sessions& sessions);
  ~Session();

  void start();
  /// No further requests; what is being answered is answered.
  void close_when_idle();
  void close_now() { lost(""); }

  asio::any_io_executor executor() { return stream_.get_executor(); }
  // For the exchange:
  bool answers(const Exchange* exchange) const { return current_.get() == exchange; }
  void send_head(const HttpReply& head, std::optional<std::size_t> bytes);
  void send_body(std::string data);
  void end_answer();
  /// What was sent goes out; a head alone waits for it, so that a small answer is one write.
  void flush();
  /// What answers it has thrown: 500, or the end of the connection where the answer has begun.
  void failed(Exchange& exchange, const std::exception& fault);

 private:
  using Timer = asio::steady_timer;

  void next_request();
  void watch();
  void watch_for_reset();
  void end_input();
  void on_some(error_code e, std::size_t n);
  void read_header();
  void on_header(error_code e);
  void read_body();
  void on_body(error_code e);
  void handle(const std::shared_ptr<Exchange>& exchange);
  void refuse(error_code e);
  /// False: its target is none.
  bool read_head(HttpRequest& head) const;
  std::shared_ptr<Exchange> begin_exchange(HttpRequest request);

  void send(std::string data, bool more_follows = false);
  void on_written(error_code e, std::size_t n);
  void finish_answer();
  void linger();
  void read_to_the_end();
  void lost(const std::string& why);
  void report(const std::string& why);

  void arm(Timer& timer, std::chrono::milliseconds after, const char* why);
  static void disarm(Timer& timer) { timer.expires_at(Timer::time_point::max()); }

  Stream stream_;
  const HttpOptions& options_;
  HttpHandler& handler_;
  Sessions& sessions_;
  std::string peer_;
  Timer read_timer_, write_timer_;
  beast::flat_buffer buffer_;  // with a maximum: what stands between a body's chunks has no limit of its own
  std::optional<beast::http::request_parser<beast::http::string_body>> parser_;
  bool reading_ = false;  // a read of on_some is under way
  bool input_ended_ = false, watches_reset_ = false;
  bool next_is_posted_ = false;  // next_request() is on its way
  bool in_request_ = false;      // between a request's first byte and its end
  bool lingers_ = false;
  std::size_t lingered_ = 0;
  std::array<char, 4096> unwanted_{};
  bool closed_ = false;
  bool closes_ = false;     // after this answer
  bool is_unread_ = false;  // of the request, some is on its way yet

  std::shared_ptr<Exchange> current_;
  bool is_head_ = false, knows_chunks_ = false;  // of the request
  bool is_stream_ = false, chunked_ = false, ended_ = false;
  std::deque<std::string> unsent_;  // pieces behind the write under way, which
  std::size_t counted_ = 0;         // count so many bytes of what a client may leave unread
  std::string writing_;             // of which
  std::size_t written_ = 0;         // are with the system
  bool is_writing_ = false;
  int status_ = 0;
  std::int64_t bytes_ = 0;  // of the answer's body
};

/// One request and its answer. What is called after the answer's end does nothing.
class Exchange final : public HttpExchange, public std::enable_shared_from_this<Exchange> {
 public:
  Exchange(std::shared_ptr<Session> session, HttpRequest request)
      : session_(std::move(session)), request_(std::move(request)) {}

  const HttpRequest& request() const override { return request_; }
  void post(std::function<void()> what) override;
  void reply(HttpReply reply) override;
  void begin(HttpReply head) override;
  void write(std::string data) override;
  void end() override;
  void on_gone(std::function<void()> gone) override;

  /// The session has lost its client.
  void set_gone();
  /// Lets go of what the handler gave.
  void forget() { gone_ = nullptr; }
  const Stopwatch& watch() const { return watch_; }

 private:
  bool is_open() const { return session_->answers(this); }

  const std::shared_ptr<Session> session_;
  HttpRequest request_;
  std::function<void()> gone_;
  bool is_gone_ = false;
  Stopwatch watch_;
};

}  // namespace fathom::serve
