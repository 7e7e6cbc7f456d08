#include "train/comm/wire.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>

#include <fcntl.h>
#include <fmt/format.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "kernels/error.h"

namespace fathom {

namespace {

struct Header {
  std::uint32_t type = 0;
  std::uint32_t size = 0;
};

constexpr std::uint32_t kLongest = 4096;  // bytes; longer reasons are cut, and nothing longer comes from us

bool prepare(int fd) {
  const int flags = ::fcntl(fd, F_GETFL);
  return flags >= 0 && ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0 && ::fcntl(fd, F_SETFD, FD_CLOEXEC) == 0;
}

}  // namespace

void Descriptor::close() noexcept {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

void make_prompt(const Descriptor& socket) {
  const int on = 1;
  ::setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

Wire::Wire(Descriptor socket) : socket_(std::move(socket)) {
  make_prompt(socket_);
  if (!prepare(socket_.get())) socket_.close();
}

bool Wire::send(const Message& message) noexcept {
  if (!socket_) return false;
  std::array<char, sizeof(Header) + kLongest> buffer;
  const std::size_t size = std::min<std::size_t>(message.bytes.size(), kLongest);
  const Header header{static_cast<std::uint32_t>(message.type), static_cast<std::uint32_t>(size)};
  std::memcpy(buffer.data(), &header, sizeof header);
  std::memcpy(buffer.data() + sizeof header, message.bytes.data(), size);
  const std::size_t whole = sizeof header + size;
  std::size_t sent = 0;
  while (sent < whole) {
    const ssize_t n = ::send(socket_.get(), buffer.data() + sent, whole - sent, MSG_NOSIGNAL);
    if (n > 0) {
      sent += static_cast<std::size_t>(n);
    } else if (n < 0 && errno == EINTR) {
      continue;
    } else if (n < 0 && errno == EAGAIN && sent == 0) {
      return message.type == MessageType::Pulse;  // the reader sleeps; there will be another one
    } else if (n < 0 && errno == EAGAIN) {
      pollfd waiting{socket_.get(), POLLOUT, 0};
      if (::poll(&waiting, 1, 100) <= 0) return false;
    } else {
      return false;
    }
  }
  return true;
}

std::vector<Message> Wire::receive(bool& open) {
  open = static_cast<bool>(socket_);
  std::array<char, 4096> buffer{};
  while (open) {
    const ssize_t n = ::recv(socket_.get(), buffer.data(), buffer.size(), 0);
    if (n > 0) {
      arrived_.append(buffer.data(), static_cast<std::size_t>(n));
    } else if (n < 0 && errno == EINTR) {
      continue;
    } else {
      open = n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
      break;
    }
  }
  std::vector<Message> messages;
  std::size_t at = 0;
  Header header;
  while (arrived_.size() - at >= sizeof header) {
    std::memcpy(&header, arrived_.data() + at, sizeof header);
    if (header.size > kLongest || header.type > static_cast<std::uint32_t>(MessageType::Bye)) {
      open = false;
      break;
    }
    if (arrived_.size() - at - sizeof header < header.size) break;
    messages.push_back(
        {static_cast<MessageType>(header.type), arrived_.substr(at + sizeof header, header.size)});
    at += sizeof header + header.size;
  }
  arrived_.erase(0, at);
  return messages;
}

namespace {

Listener listen_on(std::uint32_t address, int port) {
  Listener listener;
  listener.socket = Descriptor(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const int on = 1;  // a port that an earlier start has just left
  ::setsockopt(listener.socket.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  sockaddr_in here{};
  here.sin_family = AF_INET;
  here.sin_addr.s_addr = htonl(address);
  here.sin_port = htons(static_cast<std::uint16_t>(port));
  socklen_t size = sizeof here;
  if (!listener.socket || ::bind(listener.socket.get(), reinterpret_cast<sockaddr*>(&here), size) != 0 ||
      ::listen(listener.socket.get(), SOMAXCONN) != 0 ||
      ::getsockname(listener.socket.get(), reinterpret_cast<sockaddr*>(&here), &size) != 0) {
    throw UserError(fmt::format("cannot listen for the other ranks{}: {}.",
                                port > 0 ? fmt::format(" at port {}", port) : "", std::strerror(errno)),
                    port > 0 ? "Set MASTER_PORT to a port that is free."
                             : "The system's limit of open files, or a security policy, may be in the way.");
  }
  listener.port = ntohs(here.sin_port);
  return listener;
}

}  // namespace

Listener listen_anywhere(bool loopback_only) {
  return listen_on(loopback_only ? INADDR_LOOPBACK : INADDR_ANY, 0);
}

Listener listen_at(int port) { return listen_on(INADDR_ANY, port); }

Descriptor accept_from(const Listener& listener) {
  return Descriptor(::accept4(listener.socket.get(), nullptr, nullptr, SOCK_CLOEXEC));
}

namespace {

// A port of the host's own that nobody listens at may be given to the very socket that asks for it, which
// then meets itself.
bool met_itself(int socket) {
  sockaddr_in own{}, peer{};
  socklen_t own_size = sizeof own, peer_size = sizeof peer;
  return ::getsockname(socket, reinterpret_cast<sockaddr*>(&own), &own_size) == 0 &&
         ::getpeername(socket, reinterpret_cast<sockaddr*>(&peer), &peer_size) == 0 &&
         own.sin_port == peer.sin_port && own.sin_addr.s_addr == peer.sin_addr.s_addr;
}

Descriptor connect_by(int flags, const std::string& name, int port, std::chrono::milliseconds within) {
  addrinfo hints{};
  hints.ai_family = AF_INET;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* list = nullptr;
  if (::getaddrinfo(name.c_str(), std::to_string(port).c_str(), &hints, &list) != 0) return Descriptor();
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> all(list, &::freeaddrinfo);
  Descriptor socket(::socket(list->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) return socket;
  if (::connect(socket.get(), list->ai_addr, list->ai_addrlen) == 0)
    return met_itself(socket.get()) ? Descriptor() : std::move(socket);
  if (errno != EINPROGRESS) return Descriptor();
  pollfd waiting{socket.get(), POLLOUT, 0};
  int n = 0;
  do {
    n = ::poll(&waiting, 1, static_cast<int>(within.count()));
  } while (n < 0 && errno == EINTR);
  int error = 0;
  socklen_t size = sizeof error;
  if (n <= 0 || ::getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &error, &size) != 0 || error != 0)
    return Descriptor();
  return met_itself(socket.get()) ? Descriptor() : std::move(socket);
}

}  // namespace

Descriptor connect_to(const std::string& address, int port, std::chrono::milliseconds within) {
  return connect_by(AI_NUMERICHOST, address, port, within);
}

Descriptor connect_to_host(const std::string& host, int port, std::chrono::milliseconds within) {
  return connect_by(0, host, port, within);
}

}  // namespace fathom
