// HTTP/1.1 over TCP: many connections on a few threads, each bounded in time and memory.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "serve/http/exchange.h"

namespace fathom::serve {

struct HttpOptions {
  std::string host = "127.0.0.1";        // an address, or "localhost"
  std::uint16_t port = 8000;             // 0: any free one
  std::string tls_certificate, tls_key;  // PEM files; none: plain HTTP
  int threads = 4;
  std::size_t header_bytes = 16 << 10;
  std::size_t body_bytes = 4 << 20;
  std::size_t unsent_bytes =
      1 << 20;                       // of a stream's pieces behind the one that is sent: then it is given up
  std::int64_t connections = 16384;  // above it those go first that have been idle for longest
  std::chrono::milliseconds idle{75'000};    // between requests
  std::chrono::milliseconds header{10'000};  // from a request's first byte to the end of its header,
  std::chrono::milliseconds body{60'000};    // and from there to the end of its body
  std::chrono::milliseconds write{30'000};   // for 128 KiB of an answer to be taken
};

/// Only this machine can reach it.
bool is_loopback(const std::string& host);

class HttpServer {
 public:
  /// Listens at once, and answers from start() on. `handler` outlives it. UserError: the address cannot be
  /// had.
  HttpServer(const HttpOptions& options, HttpHandler& handler);
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  std::uint16_t port() const;
  /// "http://127.0.0.1:8000"
  std::string url() const;

  void start();
  /// On SIGTERM and SIGINT, `number` times so far, on one of the server's threads.
  void on_signal(std::function<void(int number)> handle);
  /// No further connections; those without a request are closed, the others after their answer.
  void close();
  /// Waits until all connections are closed, closes those that are not at `until`, and stops the threads.
  void stop(std::chrono::steady_clock::time_point until);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace fathom::serve
