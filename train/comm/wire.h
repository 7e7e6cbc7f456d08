// Short messages over TCP between the ranks' watches: a type, and bytes.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fathom {

/// An open file descriptor.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() { close(); }
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    if (this != &other) {
      close();
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void close() noexcept;

 private:
  int fd_ = -1;
};

enum class MessageType : std::uint32_t {
  Hello,   // the token, and the sender's rank
  Pulse,   // Pulse
  Failed,  // why the sender ends
  Lost,    // of rank 0: what was found of another rank
  Bye      // the sender ends in order
};

struct Message {
  MessageType type = MessageType::Pulse;
  std::string bytes;
};

/// One connection: whole messages in, whole messages out.
class Wire {
 public:
  Wire() = default;
  explicit Wire(Descriptor socket);

  int fd() const { return socket_.get(); }
  explicit operator bool() const { return static_cast<bool>(socket_); }
  void close() { socket_.close(); }
  /// False: the other end is gone, or takes nothing any more. A pulse that does not fit is left out.
  bool send(const Message& message) noexcept;
  /// What has come, without waiting; `open` is false afterwards when the other end is gone.
  std::vector<Message> receive(bool& open);

 private:
  Descriptor socket_;
  std::string arrived_;  // of a message that is not whole yet
};

/// A listening socket at a port of its own.
struct Listener {
  Descriptor socket;
  int port = 0;
};
/// `loopback_only`: of this host's own processes. UserError: the system refuses.
Listener listen_anywhere(bool loopback_only);
/// At a port that others know. UserError: likewise, or it is taken.
Listener listen_at(int port);
Descriptor accept_from(const Listener& listener);
/// Nothing when nobody answers there in that time.
Descriptor connect_to(const std::string& address, int port, std::chrono::milliseconds within);
/// The same of a host by its name.
Descriptor connect_to_host(const std::string& host, int port, std::chrono::milliseconds within);
/// Small messages go at once.
void make_prompt(const Descriptor& socket);

}  // namespace fathom
