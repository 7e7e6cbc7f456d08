#include "serve/http/session.h"

#include <algorithm>
#include <ctime>

#include <boost/asio/dispatch.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/read.hpp>
#include <fmt/format.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <spdlog/spdlog.h>
#include <sys/socket.h>

#include "serve/http/target.h"

namespace fathom::serve {

namespace http = beast::http;

namespace {

constexpr std::size_t kPiece = 4096;            // of a read between requests
constexpr std::size_t kMostLingered = 8 << 20;  // of a body that nobody wanted
constexpr std::chrono::milliseconds kLinger{2000};
constexpr std::size_t kAhead = 64 << 10;   // that may be read beyond a header: of a body, or further requests
constexpr std::size_t kHeavy = 64 << 10;   // a body that takes its time to be read and made tokens
constexpr std::size_t kWrite = 128 << 10;  // of an answer, for which a client has the time of one write
// What a piece counts of what a client leaves unread, at most: the first one of a text may hold its prompt,
// and is then as large as the client wanted it to be.
constexpr std::size_t kCounted = 8 << 10;

std::string now_in_http() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  ::gmtime_r(&now, &parts);
  char text[40];
  return {text, std::strftime(text, sizeof text, "%a, %d %b %Y %H:%M:%S GMT", &parts)};
}

struct Unreadable {
  int status;
  std::string why;
};

// A body in a coding that nobody here undoes: where it ends only who undoes it knows, and what is in it is no
// request. Nor is it told which of two hosts was meant.
std::optional<Unreadable> unreadable(const http::fields& fields) {
  for (const auto& field : fields) {
    const std::string value(field.value().data(), std::min<std::size_t>(field.value().size(), 100));
    switch (field.name()) {
      case http::field::transfer_encoding:
        if (fields.count(http::field::transfer_encoding) == 1 && beast::iequals(field.value(), "chunked"))
          break;
        return Unreadable{400,
                          fmt::format("The request's Transfer-Encoding is '{}': expected 'chunked' alone, or "
                                      "a Content-Length.",
                                      value)};
      case http::field::content_encoding:
        if (beast::iequals(field.value(), "identity")) break;
        return Unreadable{
            415, fmt::format("The request's Content-Encoding is '{}': expected JSON as it is.", value)};
      case http::field::host:
        if (fields.count(http::field::host) == 1) break;
        return Unreadable{400, "The request has more than one Host."};
      default:
        break;
    }
  }
  return std::nullopt;
}

}  // namespace

Session::Session(tcp::socket socket, asio::ssl::context* tls, const HttpOptions& options,
                 HttpHandler& handler, Sessions& sessions)
    : stream_(std::move(socket), tls),
      options_(options),
      handler_(handler),
      sessions_(sessions),
      read_timer_(stream_.get_executor()),
      write_timer_(stream_.get_executor()),
      buffer_(options.header_bytes + kAhead) {
  error_code e;
  const auto end = stream_.socket().remote_endpoint(e);
  if (!e) peer_ = fmt::format("{}:{}", end.address().to_string(), end.port());
  stream_.socket().set_option(tcp::no_delay(true), e);
  // The system would take megabytes and say nothing of them for minutes; so a write's end says that the
  // client has read. Without it, all but a slow client's time is the same.
  const int unsent = kWrite;
  if (::setsockopt(stream_.socket().native_handle(), IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent,
                   sizeof unsent) != 0)
    spdlog::debug("The system holds as much of an answer as it likes.");
}

Session::~Session() { sessions_.remove(this); }

void Session::start() {
  asio::dispatch(executor(), [self = shared_from_this()] {
    if (!self->stream_.is_tls()) return self->next_request();
    self->sessions_.set_idle(self.get(), true);
    self->arm(self->read_timer_, self->options_.header, "");
    self->stream_.async_handshake([self](error_code e) {
      if (e) return self->lost("");
      self->next_request();
    });
  });
}

void Session::next_request() {
  next_is_posted_ = false;
  if (closed_) return;
  in_request_ = false;
  sessions_.set_idle(this, true);
  if (buffer_.size() > 0) {
    if (!reading_) return read_header();
    error_code e;
    stream_.socket().cancel(e);  // two reads would share the buffer; on_some goes on
    return;
  }
  if (closes_ || input_ended_) return lost("");
  arm(read_timer_, options_.idle, "");
  watch();
}

void Session::watch() {
  if (reading_ || closed_) return;
  if (input_ended_ || buffer_.size() + kPiece > kAhead) return watch_for_reset();
  reading_ = true;
  stream_.async_read_some(buffer_.prepare(kPiece),
                          [self = shared_from_this()](error_code e, std::size_t n) { self->on_some(e, n); });
}

void Session::on_some(error_code e, std::size_t n) {
  reading_ = false;
  if (closed_) return;
  if (lingers_) {
    if (e) lost("");
    return;
  }
  buffer_.commit(n);
  if (e == asio::error::eof) {
    input_ended_ = true;
  } else if (e && e != asio::error::operation_aborted) {
    return lost("left");
  }
  if (current_) return input_ended_ ? end_input() : watch();
  if (next_is_posted_) return;  // it will see these bytes; two readers of a header would share them
  if (buffer_.size() > 0) return read_header();
  lost("");
}

void Session::end_input() {
  if (status_ == 0 && knows_chunks_) send("HTTP/1.1 100 Continue\r\n\r\n");
  watch_for_reset();
}

void Session::watch_for_reset() {
  if (watches_reset_ || closed_) return;
  watches_reset_ = true;
  stream_.socket().async_wait(tcp::socket::wait_error, [self = shared_from_this()](error_code e) {
    self->watches_reset_ = false;
    if (self->closed_ || !self->current_) return;
    if (e) return self->watch_for_reset();  // what was cancelled is a read
    pollfd socket{self->stream_.socket().native_handle(), 0, 0};
    // Urgent data ends the wait too, and would end each further one.
    if (::poll(&socket, 1, 0) == 1 && (socket.revents & (POLLERR | POLLHUP)) != 0) self->lost("left");
  });
}

void Session::read_header() {
  in_request_ = true;
  sessions_.set_idle(this, false);
  parser_.emplace();
  parser_->header_limit(static_cast<std::uint32_t>(options_.header_bytes));
  parser_->body_limit(options_.body_bytes);
  arm(read_timer_, options_.header, "slow");
  http::async_read_header(stream_, buffer_, *parser_,
                          [self = shared_from_this()](error_code e, std::size_t) { self->on_header(e); });
}

bool Session::read_head(HttpRequest& r) const {
  const auto& message = parser_->get();
  const auto text = [](beast::string_view s) { return std::string(s.data(), s.size()); };
  r.method = is_head_ ? "GET" : text(message.method_string());
  r.authorization = text(message[http::field::authorization]);
  r.host = text(message[http::field::host]);
  r.has_host = message.find(http::field::host) != message.end();
  r.origin = text(message[http::field::origin]);
  r.asks_for_headers = text(message[http::field::access_control_request_headers]);
  r.peer = peer_;
  auto target = read_target({message.target().data(), message.target().size()});
  if (!target) {
    r.path = text(message.target());
    return false;
  }
  r.path = std::move(target->path);
  if (!target->host.empty()) {
    r.host = std::move(target->host);
    r.has_host = true;
  }
  return true;
}

void Session::on_header(error_code e) {
  disarm(read_timer_);
  if (closed_) return;
  if (e) return refuse(e);
  const auto& message = parser_->get();
  knows_chunks_ = message.version() >= 11;
  is_head_ = message.method() == http::verb::head;
  if (!message.keep_alive()) closes_ = true;
  const auto cannot = unreadable(message);
  const bool body_follows = cannot || !parser_->is_done();
  HttpReply refusal;
  HttpRequest request;
  bool admitted = read_head(request);
  if (cannot) {
    admitted = false;
    refusal = handler_.refusal(cannot->status, cannot->why);
  } else if (!admitted) {
    refusal = handler_.refusal(
        400, "The request's target is neither a path nor a whole address, or a % in it begins no byte.");
  } else {
    admitted = handler_.admit(request, refusal);
  }
  if (admitted && body_follows && request.method == "GET") {
    admitted = false;
    refusal = handler_.refusal(400, fmt::format("{} takes no body.", is_head_ ? "HEAD" : "GET"));
  }
  if (!admitted) {
    closes_ = closes_ || body_follows;  // nobody reads it
    is_unread_ = body_follows;
    current_ = begin_exchange(std::move(request));
    return current_->reply(std::move(refusal));
  }
  if (beast::iequals(message[http::field::expect], "100-continue") && body_follows)
    send("HTTP/1.1 100 Continue\r\n\r\n");
  read_body();
}

void Session::read_body() {
  arm(read_timer_, options_.body, "slow");
  http::async_read(stream_, buffer_, *parser_,
                   [self = shared_from_this()](error_code e, std::size_t) { self->on_body(e); });
}

void Session::on_body(error_code e) {
  disarm(read_timer_);
  if (closed_) return;
  if (e) return refuse(e);
  HttpRequest request;
  read_head(request);
  request.body = std::move(parser_->get().body());
  parser_.reset();
  current_ = begin_exchange(std::move(request));
  watch();
  if (current_->request().body.size() <= kHeavy) return handle(current_);
  sessions_.take_turn(executor(), [self = shared_from_this(), exchange = current_] {
    try {
      if (self->answers(exchange.get())) self->handle(exchange);
    } catch (...) {
      self->sessions_.end_turn();
      throw;
    }
    self->sessions_.end_turn();
  });
}

void Session::handle(const std::shared_ptr<Exchange>& exchange) {
  try {
    handler_.handle(exchange);
  } catch (const std::exception& fault) {
    failed(*exchange, fault);
  }
}

void Session::failed(Exchange& exchange, const std::exception& fault) {
  spdlog::error("A request could not be answered: {}", fault.what());
  if (!answers(&exchange)) return;
  closes_ = true;
  if (status_ != 0) return lost("failed");
  exchange.record().end = "failed";
  exchange.set_gone();  // whoever works for it may stop
  try {
    exchange.reply(handler_.refusal(500, "The server has failed to answer."));
  } catch (const std::exception&) {
    lost("failed");
  }
}

std::shared_ptr<Exchange> Session::begin_exchange(HttpRequest request) {
  status_ = 0;
  bytes_ = 0;
  is_stream_ = chunked_ = ended_ = false;
  return std::make_shared<Exchange>(shared_from_this(), std::move(request));
}

// What came is no request that can be read, or is too much of one.
void Session::refuse(error_code e) {
  if (e == http::error::end_of_stream || e.category() != make_error_code(http::error::bad_method).category())
    return lost("");
  closes_ = is_unread_ = true;
  if (e == http::error::partial_message) return lost("");
  int status = 400;
  std::string why = fmt::format("The request is not HTTP/1.1: {}.", e.message());
  if (e == http::error::body_limit) {
    status = 413;
    why = fmt::format("The request's body is larger than {} bytes.", options_.body_bytes);
  } else if (e == http::error::header_limit) {
    status = 431;
    why = fmt::format("The request's header is larger than {} bytes.", options_.header_bytes);
  } else if (e == http::error::buffer_overflow) {
    status = 413;
    why = fmt::format(
        "What stands between the chunks of the request's body, or behind them, is larger than {} bytes.",
        buffer_.max_size());
  }
  is_head_ = false;
  HttpRequest request;
  request.method = "-";
  request.path = "-";
  if (parser_ && parser_->is_header_done()) read_head(request);
  request.peer = peer_;
  current_ = begin_exchange(std::move(request));
  current_->reply(handler_.refusal(status, why));
}

void Session::send_head(const HttpReply& head, std::optional<std::size_t> bytes) {
  status_ = head.status;
  const auto reason = http::obsolete_reason(static_cast<http::status>(head.status));
  std::string text =
      fmt::format("HTTP/1.1 {} {}\r\nDate: {}\r\nContent-Type: {}\r\n", head.status,
                  std::string_view(reason.data(), reason.size()), now_in_http(), head.content_type);
  for (const auto& [name, value] : head.headers) text += fmt::format("{}: {}\r\n", name, value);
  // A client of HTTP/1.0 knows no chunks: its answer ends with the connection.
  if (bytes) {
    text += fmt::format("Content-Length: {}\r\n", *bytes);
  } else {
    is_stream_ = true;
    chunked_ = knows_chunks_;
    closes_ = closes_ || !chunked_;
  }
  if (chunked_) {
    text += "Transfer-Encoding: chunked\r\n";
  }
  text += closes_ ? "Connection: close\r\n\r\n" : "Connection: keep-alive\r\n\r\n";
  send(std::move(text), true);
}

void Session::send_body(std::string data) {
  if (is_head_ || data.empty()) return;
  bytes_ += static_cast<std::int64_t>(data.size());
  send(chunked_ ? fmt::format("{:x}\r\n{}\r\n", data.size(), data) : std::move(data));
}

void Session::end_answer() {
  if (chunked_ && !is_head_) send("0\r\n\r\n");
  ended_ = true;
  if (!is_writing_ && unsent_.empty()) finish_answer();
}

void Session::send(std::string data, bool more_follows) {
  if (closed_) return;
  // A whole answer, or a piece, is as large as it is; a stream whose client does not read ends here.
  if (is_stream_ && counted_ > options_.unsent_bytes) return lost("unread");
  counted_ += std::min(data.size(), kCounted);
  unsent_.push_back(std::move(data));
  if (!more_follows) flush();
}

// A part of bounded size at a time, each with its own time: whoever reads nothing is given up as soon from a
// long answer as from a short one.
void Session::flush() {
  if (is_writing_ || closed_) return;
  if (written_ == writing_.size()) {
    writing_.clear();
    written_ = 0;
    if (writing_.capacity() > kWrite) writing_.shrink_to_fit();
    while (!unsent_.empty() && (writing_.empty() || writing_.size() + unsent_.front().size() <= kWrite)) {
      counted_ -= std::min(unsent_.front().size(), kCounted);
      if (writing_.empty()) {
        writing_ = std::move(unsent_.front());
      } else {
        writing_ += unsent_.front();
      }
      unsent_.pop_front();
    }
  } else if (written_ > kWrite && written_ > writing_.size() / 2) {  // nobody needs that any more
    writing_.erase(0, written_);
    writing_.shrink_to_fit();
    written_ = 0;
  }
  if (writing_.empty()) return;
  is_writing_ = true;
  arm(write_timer_, options_.write, "unread");
  asio::async_write(stream_,
                    asio::buffer(writing_.data() + written_, std::min(kWrite, writing_.size() - written_)),
                    [self = shared_from_this()](error_code e, std::size_t n) { self->on_written(e, n); });
}

void Session::on_written(error_code e, std::size_t n) {
  is_writing_ = false;
  disarm(write_timer_);
  if (closed_) return;
  if (e) return lost("left");
  written_ += n;
  flush();
  if (!is_writing_ && current_ && ended_) finish_answer();
}

void Session::finish_answer() {
  if (closed_) return;
  report("");
  if (closes_) return is_unread_ || buffer_.size() > 0 || stream_.is_tls() ? linger() : lost("");
  if (reading_ &&
      buffer_.size() == 0) {  // the read that watched for the client's leaving waits for its next request
    in_request_ = false;
    sessions_.set_idle(this, true);
    arm(read_timer_, options_.idle, "");
    return;
  }
  // Not from within itself, however many requests came ahead.
  next_is_posted_ = true;
  asio::post(executor(), [self = shared_from_this()] { self->next_request(); });
}

// A close with bytes unread would make the client's system forget the answer. In TLS the end of an answer is
// said, so that nobody can cut it short.
void Session::linger() {
  lingers_ = true;
  buffer_.consume(buffer_.size());
  arm(read_timer_, kLinger, "");
  if (!stream_.is_tls()) return read_to_the_end();
  stream_.async_shutdown([self = shared_from_this()](error_code) { self->read_to_the_end(); });
}

void Session::read_to_the_end() {
  if (closed_) return;
  error_code e;
  stream_.socket().shutdown(tcp::socket::shutdown_send, e);
  stream_.socket().async_read_some(asio::buffer(unwanted_),
                                   [self = shared_from_this()](error_code fault, std::size_t n) {
                                     self->lingered_ += n;
                                     if (fault || self->lingered_ > kMostLingered) return self->lost("");
                                     self->read_to_the_end();
                                   });
}

void Session::report(const std::string& why) {
  if (!current_) return;
  const std::shared_ptr<Exchange> exchange = std::move(current_);
  current_ = nullptr;
  if (!why.empty() && exchange->record().end.empty()) exchange->record().end = why;
  handler_.answered(exchange->request(), exchange->record(), status_, bytes_, exchange->watch().seconds());
  if (!why.empty()) exchange->set_gone();
  exchange->forget();
}

void Session::lost(const std::string& why) {
  if (closed_) return;
  closed_ = true;
  disarm(read_timer_);
  disarm(write_timer_);
  error_code e;
  stream_.socket().close(e);
  report(why.empty() ? "closed" : why);
  sessions_.remove(this);
}

void Session::close_when_idle() {
  closes_ = true;
  if (!current_ && !in_request_ && !lingers_) lost("");
}

// The handler of a timer may be on its way while the timer is set anew: its time says whether it is meant.
void Session::arm(Timer& timer, std::chrono::milliseconds after, const char* why) {
  timer.expires_after(after);
  timer.async_wait([self = shared_from_this(), &timer, why](error_code e) {
    if (!e && timer.expiry() <= Timer::clock_type::now()) self->lost(why);
  });
}

}  // namespace fathom::serve
