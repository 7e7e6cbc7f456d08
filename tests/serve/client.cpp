#include "tests/serve/client.h"

#include <algorithm>
#include <sstream>

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "src/core/stopwatch.h"

namespace fathom::serve {

std::vector<nlohmann::json> Response::events() const {
  std::vector<nlohmann::json> all;
  std::size_t at = 0;
  bool done = false;
  while (at < body.size()) {
    const std::size_t end = body.find("\n\n", at);
    if (end == std::string::npos || body.compare(at, 6, "data: ") != 0 || done) {
      ADD_FAILURE() << "no event at byte " << at << " of " << body;
      return all;
    }
    const std::string data = body.substr(at + 6, end - at - 6);
    done = data == "[DONE]";
    if (!done) all.push_back(nlohmann::json::parse(data));
    at = end + 2;
  }
  EXPECT_TRUE(done) << "the stream does not end in [DONE]: " << body;
  return all;
}

Connection::Connection(std::uint16_t port) : socket_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const int at_once = 1;  // bytes leave as they are sent
  ::setsockopt(socket_, IPPROTO_TCP, TCP_NODELAY, &at_once, sizeof at_once);
  EXPECT_EQ(::connect(socket_, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
}

bool Connection::send(const std::string& bytes) const {
  std::size_t sent = 0;
  while (sent < bytes.size()) {
    const ssize_t n = ::send(socket_, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (n <= 0) return false;
    sent += static_cast<std::size_t>(n);
  }
  return true;
}

std::string Connection::read_some(double seconds) const {
  pollfd waits{socket_, POLLIN, 0};
  if (::poll(&waits, 1, static_cast<int>(seconds * 1000)) <= 0) {
    ADD_FAILURE() << "the server said nothing for " << seconds << " s";
    return "";
  }
  std::string bytes(65536, '\0');
  const ssize_t n = ::recv(socket_, bytes.data(), bytes.size(), 0);
  bytes.resize(n > 0 ? static_cast<std::size_t>(n) : 0);
  return bytes;
}

Response Connection::read(double seconds) {
  Response r;
  const auto more = [&] {
    const std::string bytes = read_some(seconds);
    buffer_ += bytes;
    return !bytes.empty();
  };
  std::size_t head = 0;
  while ((head = buffer_.find("\r\n\r\n")) == std::string::npos) {
    if (!more()) return r;
  }
  std::istringstream lines(buffer_.substr(0, head + 2));
  buffer_.erase(0, head + 4);
  std::string line;
  std::getline(lines, line);
  r.status = std::stoi(line.substr(9, 3));
  while (std::getline(lines, line)) {
    const std::size_t colon = line.find(':');
    std::string name = line.substr(0, colon);
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
    r.headers[name] = line.substr(colon + 2, line.size() - colon - 3);
  }
  if (r.status == 100) return read(seconds);
  if (const auto how = r.headers.find("transfer-encoding");
      how != r.headers.end() && how->second == "chunked") {
    for (;;) {
      std::size_t end = 0;
      while ((end = buffer_.find("\r\n")) == std::string::npos) {
        if (!more()) return r;
      }
      const std::size_t size = std::stoul(buffer_.substr(0, end), nullptr, 16);
      while (buffer_.size() < end + size + 4) {
        if (!more()) return r;
      }
      r.body += buffer_.substr(end + 2, size);
      buffer_.erase(0, end + size + 4);
      if (size == 0) break;
    }
  } else if (r.headers.contains("content-length")) {
    const std::size_t size = std::stoul(r.headers["content-length"]);
    while (buffer_.size() < size) {
      if (!more()) return r;
    }
    r.body = buffer_.substr(0, size);
    buffer_.erase(0, size);
  } else {
    while (more()) {
    }
    r.body = std::exchange(buffer_, "");
  }
  r.is_complete = true;
  return r;
}

void Connection::keep_little(int little) const {
  ::setsockopt(socket_, SOL_SOCKET, SO_RCVBUF, &little, sizeof little);
  const linger reset{1, 0};
  ::setsockopt(socket_, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
}

void Connection::close_sending() const { ::shutdown(socket_, SHUT_WR); }

void Connection::close() {
  if (socket_ >= 0) ::close(socket_);
  socket_ = -1;
}

std::string request_text(const std::string& method, const std::string& path, const std::string& body,
                         const std::string& more_headers) {
  return method + " " + path + " HTTP/1.1\r\nHost: localhost\r\n" + more_headers +
         (method == "POST" ? "Content-Length: " + std::to_string(body.size()) + "\r\n" : "") + "\r\n" + body;
}

Response get(std::uint16_t port, const std::string& path, const std::string& more_headers) {
  Connection c(port);
  c.send(request_text("GET", path, "", more_headers));
  return c.read();
}

Response post(std::uint16_t port, const std::string& path, const nlohmann::json& body,
              const std::string& more_headers) {
  Connection c(port);
  c.send(request_text("POST", path, body.dump(), more_headers));
  return c.read();
}

}  // namespace fathom::serve
