#include "app/load_client.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>

#include <arpa/inet.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include "kernels/error.h"

namespace fathom::app {

namespace {

constexpr std::string_view kScheme = "http://";

bool would_wait() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return out;
}

}  // namespace

LoadAddress read_load_address(const std::string& url) {
  LoadAddress address;
  std::string_view rest = url;
  const bool has_scheme = rest.substr(0, kScheme.size()) == kScheme;
  if (has_scheme) rest.remove_prefix(kScheme.size());
  address.host = rest.substr(0, rest.find('/'));
  const std::size_t colon = address.host.find(':');
  const std::string name =
      address.host.substr(0, colon) == "localhost" ? "127.0.0.1" : address.host.substr(0, colon);
  in_addr ip{};
  unsigned port = 80;
  bool is_good = has_scheme && ::inet_pton(AF_INET, name.c_str(), &ip) == 1;
  if (is_good && colon != std::string::npos) {
    const char* end = address.host.data() + address.host.size();
    const auto read = std::from_chars(address.host.data() + colon + 1, end, port);
    is_good = read.ec == std::errc() && read.ptr == end && port > 0 && port <= UINT16_MAX;
  }
  if (!is_good)
    throw UsageError(fmt::format("{} is no address of a server.", url),
                     "Give one such as http://127.0.0.1:8000.");
  address.ip = ip.s_addr;
  address.port = static_cast<std::uint16_t>(port);
  return address;
}

LoadConnection::LoadConnection(const LoadAddress& address)
    : socket_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(address.port);
  to.sin_addr.s_addr = address.ip;
  if (socket_ < 0 || ::connect(socket_, reinterpret_cast<const sockaddr*>(&to), sizeof to) != 0) {
    const std::string why = std::strerror(errno);
    if (socket_ >= 0) ::close(socket_);
    throw UserError(fmt::format("Cannot connect to {}: {}.", address.host, why),
                    "fathom serve MODEL makes a server.");
  }
  const int on = 1;
  ::setsockopt(socket_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  ::fcntl(socket_, F_SETFL, ::fcntl(socket_, F_GETFL) | O_NONBLOCK);
}

LoadConnection::~LoadConnection() { ::close(socket_); }

void LoadConnection::ask(std::string request) {
  out_ = std::move(request);
  sent_ = 0;
  body_.clear();
  status_ = 0;
  state_ = State::Head;
  write();
}

void LoadConnection::write() {
  while (wants_to_write()) {
    const ssize_t n = ::send(socket_, out_.data() + sent_, out_.size() - sent_, MSG_NOSIGNAL);
    if (n <= 0) {
      if (!would_wait()) state_ = State::Lost;
      return;
    }
    sent_ += static_cast<std::size_t>(n);
  }
}

void LoadConnection::read() {
  char some[65536];
  for (;;) {
    const ssize_t n = ::recv(socket_, some, sizeof some, 0);
    if (n < 0 && would_wait()) return;
    if (n <= 0) {
      state_ = State::Lost;
      return;
    }
    in_.append(some, static_cast<std::size_t>(n));
    while (parse()) {
    }
    in_.erase(0, used_);
    used_ = 0;
    if (is_done() || static_cast<std::size_t>(n) < sizeof some) return;
  }
}

bool LoadConnection::take_line(std::string_view& line) {
  const std::size_t end = in_.find("\r\n", used_);
  if (end == std::string::npos) return false;
  line = std::string_view(in_).substr(used_, end - used_);
  used_ = end + 2;
  return true;
}

// One more part of the answer; false when it is not all there.
bool LoadConnection::parse() {
  std::string_view line;
  switch (state_) {
    case State::Head:
      if (!take_line(line)) return false;
      if (status_ == 0) {
        chunked_ = false;
        left_ = 0;
        status_ = line.size() < 12 ? -1 : std::atoi(std::string(line.substr(9, 3)).c_str());
      } else if (line.empty()) {
        state_ = chunked_ ? State::ChunkSize : State::Body;
        if (status_ == 100) {  // and then the answer
          state_ = State::Head;
          status_ = 0;
        }
      } else if (const std::string field = lower(line); field.rfind("content-length: ", 0) == 0) {
        left_ = std::strtoull(field.c_str() + 16, nullptr, 10);
      } else if (field == "transfer-encoding: chunked") {
        chunked_ = true;
      }
      return true;
    case State::ChunkSize:
      if (!take_line(line)) return false;
      left_ = std::strtoull(std::string(line).c_str(), nullptr, 16) + 2;
      state_ = State::Chunk;
      return true;
    case State::Chunk: {
      if (in_.size() - used_ < left_) return false;
      body_.append(in_, used_, left_ - 2);
      used_ += left_;
      state_ = left_ == 2 ? State::Done : State::ChunkSize;
      return !is_done();
    }
    case State::Body: {
      const std::size_t n = std::min(left_, in_.size() - used_);
      body_.append(in_, used_, n);
      used_ += n;
      left_ -= n;
      if (left_ == 0) state_ = State::Done;
      return false;
    }
    default:
      return false;
  }
}

}  // namespace fathom::app
