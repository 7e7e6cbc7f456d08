#include "serve/http/session.h"

#include <ctime>

#include <boost/asio/dispatch.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/read.hpp>
#include <fmt/format.h>
#include <spdlog/spdlog.h>

namespace fathom::serve {

namespace http = beast::http;

namespace {

constexpr std::size_t kPiece = 4096;            // of a read between requests
constexpr std::size_t kMostLingered = 8 << 20;  // of a body that nobody wanted
constexpr std::chrono::milliseconds kLinger{2000};
constexpr std::size_t kSlowest = 16 << 10;  // bytes a second that a client of long answers has to take

std::string now_in_http() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  ::gmtime_r(&now, &parts);
  char text[40];
  return {text, std::strftime(text, sizeof text, "%a, %d %b %Y %H:%M:%S GMT", &parts)};
}

}  // namespace

Session::Session(tcp::socket socket, const HttpOptions& options, HttpHandler& handler, Sessions& sessions)
    : socket_(std::move(socket)),
      options_(options),
      handler_(handler),
      sessions_(sessions),
      read_timer_(socket_.get_executor()),
      write_timer_(socket_.get_executor()) {
  error_code e;
  const auto end = socket_.remote_endpoint(e);
  if (!e) peer_ = fmt::format("{}:{}", end.address().to_string(), end.port());
  socket_.set_option(tcp::no_delay(true), e);
}

Session::~Session() { sessions_.remove(this); }

void Session::start() {
  asio::dispatch(executor(), [self = shared_from_this()] { self->next_request(); });
}

void Session::next_request() {
  if (closed_) return;
  in_request_ = false;
  sessions_.set_idle(this, true);
  if (buffer_.size() > 0) return read_header();
  if (closes_) return lost("");
  arm(read_timer_, options_.idle, "");
  watch();
}

void Session::watch() {
  if (reading_ || closed_) return;
  reading_ = true;
  socket_.async_read_some(buffer_.prepare(kPiece),
                          [self = shared_from_this()](error_code e, std::size_t n) { self->on_some(e, n); });
}

void Session::on_some(error_code e, std::size_t n) {
  reading_ = false;
  if (closed_) return;
  if (e) return lost("left");
  if (lingers_) {
    lingered_ += n;
    if (lingered_ > kMostLingered) return lost("");
    return watch();
  }
  buffer_.commit(n);
  if (!current_) read_header();
}

void Session::read_header() {
  in_request_ = true;
  sessions_.set_idle(this, false);
  parser_.emplace();
  parser_->header_limit(static_cast<std::uint32_t>(options_.header_bytes));
  parser_->body_limit(options_.body_bytes);
  arm(read_timer_, options_.header, "slow");
  http::async_read_header(socket_, buffer_, *parser_,
                          [self = shared_from_this()](error_code e, std::size_t) { self->on_header(e); });
}

HttpRequest Session::head() const {
  const auto& message = parser_->get();
  const auto text = [](beast::string_view s) { return std::string(s.data(), s.size()); };
  HttpRequest r;
  r.method = is_head_ ? "GET" : text(message.method_string());
  r.path = text(message.target());
  r.path = r.path.substr(0, r.path.find_first_of("?#"));
  r.authorization = text(message[http::field::authorization]);
  r.origin = text(message[http::field::origin]);
  r.peer = peer_;
  return r;
}

void Session::on_header(error_code e) {
  disarm(read_timer_);
  if (closed_) return;
  if (e) return refuse(e);
  const auto& message = parser_->get();
  knows_chunks_ = message.version() >= 11;
  is_head_ = message.method() == http::verb::head;
  if (!message.keep_alive()) closes_ = true;
  HttpReply refusal;
  if (HttpRequest request = head(); !handler_.admit(request, refusal)) {
    const bool body_follows = !parser_->is_done();
    closes_ = closes_ || body_follows;  // nobody reads it
    is_unread_ = body_follows;
    current_ = begin_exchange(std::move(request));
    return current_->reply(std::move(refusal));
  }
  if (beast::iequals(message[http::field::expect], "100-continue") && !parser_->is_done())
    send("HTTP/1.1 100 Continue\r\n\r\n");
  read_body();
}

void Session::read_body() {
  arm(read_timer_, options_.body, "slow");
  http::async_read(socket_, buffer_, *parser_,
                   [self = shared_from_this()](error_code e, std::size_t) { self->on_body(e); });
}

void Session::on_body(error_code e) {
  disarm(read_timer_);
  if (closed_) return;
  if (e) return refuse(e);
  HttpRequest request = head();
  request.body = std::move(parser_->get().body());
  parser_.reset();
  current_ = begin_exchange(std::move(request));
  if (buffer_.size() == 0) watch();
  const std::shared_ptr<Exchange> exchange = current_;
  try {
    handler_.handle(exchange);
  } catch (const std::exception& fault) {
    spdlog::error("A request could not be answered: {}", fault.what());
    closes_ = true;
    if (status_ == 0)
      exchange->reply(handler_.refusal(500, "The server has failed to answer."));
    else
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
  }
  is_head_ = false;
  HttpRequest request;
  request.method = "-";
  request.path = "-";
  if (parser_ && parser_->is_header_done()) request = head();
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
  send(std::move(text));
}

void Session::send_body(std::string data) {
  if (is_head_ || data.empty()) return;
  bytes_ += static_cast<std::int64_t>(data.size());
  send(chunked_ ? fmt::format("{:x}\r\n{}\r\n", data.size(), data) : std::move(data));
}

void Session::end_answer() {
  if (chunked_ && !is_head_) send("0\r\n\r\n");
  ended_ = true;
  if (!is_writing_ && pending_.empty()) finish_answer();
}

void Session::send(std::string data) {
  if (closed_) return;
  // A whole answer, or a piece, is as large as it is; a stream whose client does not read ends here.
  if (is_stream_ && pending_.size() > options_.unsent_bytes) return lost("unread");
  if (pending_.empty()) {
    pending_ = std::move(data);
  } else {
    pending_ += data;
  }
  flush();
}

void Session::flush() {
  if (is_writing_ || pending_.empty() || closed_) return;
  is_writing_ = true;
  writing_.swap(pending_);
  pending_.clear();
  arm(write_timer_, options_.write + std::chrono::seconds(writing_.size() / kSlowest), "unread");
  asio::async_write(socket_, asio::buffer(writing_),
                    [self = shared_from_this()](error_code e, std::size_t) { self->on_written(e); });
}

void Session::on_written(error_code e) {
  is_writing_ = false;
  disarm(write_timer_);
  if (closed_) return;
  if (e) return lost("left");
  if (!pending_.empty()) return flush();
  if (current_ && ended_) finish_answer();
}

void Session::finish_answer() {
  if (closed_) return;
  report("");
  if (closes_) return is_unread_ || buffer_.size() > 0 ? linger() : lost("");
  if (reading_) {  // the read that watched for the client's leaving waits for its next request
    in_request_ = false;
    sessions_.set_idle(this, true);
    arm(read_timer_, options_.idle, "");
    return;
  }
  // Not from within itself, however many requests came ahead.
  asio::post(executor(), [self = shared_from_this()] { self->next_request(); });
}

// A close with bytes unread would make the client's system forget the answer.
void Session::linger() {
  error_code e;
  socket_.shutdown(tcp::socket::shutdown_send, e);
  lingers_ = true;
  buffer_.consume(buffer_.size());
  arm(read_timer_, kLinger, "");
  watch();
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
  socket_.close(e);
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

void Exchange::post(std::function<void()> what) { asio::post(session_->executor(), std::move(what)); }

void Exchange::reply(HttpReply reply) {
  if (!is_open()) return;
  reply.headers.insert(reply.headers.end(), headers_.begin(), headers_.end());
  session_->send_head(reply, reply.body.size());
  session_->send_body(std::move(reply.body));
  session_->end_answer();
}

void Exchange::begin(HttpReply head) {
  if (!is_open()) return;
  head.headers.insert(head.headers.end(), headers_.begin(), headers_.end());
  session_->send_head(head, std::nullopt);
}

void Exchange::write(std::string data) {
  if (is_open()) session_->send_body(std::move(data));
}

void Exchange::end() {
  if (is_open()) session_->end_answer();
}

void Exchange::on_gone(std::function<void()> gone) {
  if (is_gone_) return gone();
  if (is_open()) gone_ = std::move(gone);
}

void Exchange::set_gone() {
  is_gone_ = true;
  if (const auto gone = std::exchange(gone_, nullptr)) gone();
}

}  // namespace fathom::serve
