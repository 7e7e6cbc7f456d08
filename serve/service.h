// The server as one object: HTTP, routes, scheduler, metrics. It listens before the model is there, and
// answers requests as long as run() does.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <string>

#include "serve/api.h"
#include "serve/http/server.h"

namespace fathom::serve {

struct ServiceOptions {
  HttpOptions http;
  ApiOptions api;
  SchedulerOptions scheduler;
  std::chrono::milliseconds drain{30'000};  // for what runs to be done, once the server is to stop
  std::string access_log;                   // empty: none; "-": standard error
};

class Service {
 public:
  /// Listens. UserError: the address or the log cannot be had.
  explicit Service(ServiceOptions options);

  std::uint16_t port() const { return http_.port(); }
  std::string url() const { return http_.url(); }

  /// Answers from now on: /health with 503.
  void start() { http_.start(); }
  /// Serves the model, on this thread, until shut_down() and what was running then. Once only. DeviceError:
  /// the device is lost.
  void run(Engine& engine, const ServedModel& model);
  /// From any thread: no new requests, and run() returns when those that run are done or
  /// ServiceOptions::drain has passed. False: run() has not begun, and nothing happens.
  bool shut_down();
  /// SIGTERM and SIGINT: the first shuts down. `at_once` is called for a first one before run(), and for a
  /// second one; it ends the process.
  void shut_down_on_signals(std::function<void(int number)> at_once);

 private:
  ServiceOptions options_;
  ServeMetrics metrics_;
  std::unique_ptr<AccessLog> log_;
  Api api_;
  HttpServer http_;
  std::mutex mutex_;
  Scheduler* scheduler_ = nullptr;
  Clock::time_point drained_ = Clock::time_point::min();  // by then all is to be over, once it shuts down
};

}  // namespace fathom::serve
