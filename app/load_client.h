// A client of HTTP/1.1 for measurements: plain sockets that never wait, one request at a time on each, and
// nothing that the server's own code has a part in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace fathom::app {

/// Where a server listens: "http://127.0.0.1:8000". UsageError: it is no such address.
struct LoadAddress {
  std::string host;  // as the header Host says it
  std::uint32_t ip = 0;
  std::uint16_t port = 0;
};
LoadAddress read_load_address(const std::string& url);

class LoadConnection {
 public:
  /// UserError: nobody listens there.
  explicit LoadConnection(const LoadAddress& address);
  ~LoadConnection();
  LoadConnection(const LoadConnection&) = delete;
  LoadConnection& operator=(const LoadConnection&) = delete;

  int socket() const { return socket_; }
  /// Begins a request, all of it as HTTP writes it, once the one before is done.
  void ask(std::string request);
  bool wants_to_write() const { return sent_ < out_.size(); }
  void write();
  /// Takes what has come. The answer's body goes to body().
  void read();

  std::string& body() { return body_; }  // what was used may be taken out of it
  int status() const { return status_; }
  bool is_done() const { return state_ == State::Done; }
  /// The connection ended before the answer did.
  bool is_lost() const { return state_ == State::Lost; }

 private:
  enum class State : std::uint8_t { Idle, Head, Body, ChunkSize, Chunk, Done, Lost };
  bool parse();
  bool take_line(std::string_view& line);

  int socket_ = -1;
  std::string out_;
  std::size_t sent_ = 0;
  std::string in_;
  std::size_t used_ = 0;  // of in_
  std::string body_;
  State state_ = State::Idle;
  bool chunked_ = false;
  std::size_t left_ = 0;  // bytes of the body or the chunk
  int status_ = 0;
};

}  // namespace fathom::app
