#include "serve/http/server.h"

#include <algorithm>
#include <condition_variable>
#include <csignal>
#include <thread>
#include <vector>

#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/signal_set.hpp>
#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <sys/resource.h>

#include "kernels/error.h"
#include "serve/http/session.h"
#include "serve/http/tls.h"

namespace fathom::serve {

void Sessions::add(const std::shared_ptr<Session>& session) {
  const std::lock_guard lock(mutex_);
  open_[session.get()] = {session, std::nullopt};
  handler_.connections(static_cast<std::int64_t>(open_.size()));
}

void Sessions::remove(Session* session) {
  const std::lock_guard lock(mutex_);
  const auto found = open_.find(session);
  if (found == open_.end()) return;
  if (found->second.idle) idle_.erase(*found->second.idle);
  if (found->second.is_going) --going_;
  open_.erase(found);
  handler_.connections(static_cast<std::int64_t>(open_.size()));
}

void Sessions::set_idle(Session* session, bool idle) {
  const std::lock_guard lock(mutex_);
  const auto found = open_.find(session);
  if (found == open_.end() || found->second.is_going) return;
  auto& place = found->second.idle;
  if (place) idle_.erase(*place);
  place.reset();
  if (idle) place = idle_.insert(idle_.end(), session);
}

std::shared_ptr<Session> Sessions::surplus(std::int64_t most) {
  const std::lock_guard lock(mutex_);
  if (static_cast<std::int64_t>(open_.size()) - going_ <= most || idle_.empty()) return nullptr;
  Entry& entry = open_.at(idle_.front());
  idle_.pop_front();
  entry.idle.reset();
  entry.is_going = true;
  ++going_;
  return entry.session.lock();
}

std::vector<std::shared_ptr<Session>> Sessions::all() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<Session>> sessions;
  for (const auto& [key, entry] : open_) {
    if (auto session = entry.session.lock()) sessions.push_back(std::move(session));
  }
  return sessions;
}

std::int64_t Sessions::count() const {
  const std::lock_guard lock(mutex_);
  return static_cast<std::int64_t>(open_.size());
}

void Sessions::take_turn(const asio::any_io_executor& executor, std::function<void()> work) {
  const std::lock_guard lock(mutex_);
  if (turns_ == 0) {
    waiting_.emplace_back(executor, std::move(work));
    return;
  }
  asio::post(executor, std::move(work));
  --turns_;
}

void Sessions::end_turn() {
  std::unique_lock lock(mutex_);
  if (waiting_.empty()) {
    ++turns_;
    return;
  }
  auto [executor, work] = std::move(waiting_.front());
  waiting_.pop_front();
  lock.unlock();  // a session that goes with its work asks for it
  asio::post(executor, std::move(work));
}

void Sessions::forget_turns() {
  std::unique_lock lock(mutex_);
  const auto waiting = std::exchange(waiting_, {});
  lock.unlock();
}

namespace {

// For connections that are closed to say what became of them.
constexpr std::chrono::milliseconds kLastReports{2000};

// Each connection is a file, and the usual limit of a shell is 1024 of them.
void raise_file_limit() {
  rlimit files{};
  if (::getrlimit(RLIMIT_NOFILE, &files) != 0) return;
  files.rlim_cur = files.rlim_max;
  if (::setrlimit(RLIMIT_NOFILE, &files) != 0) spdlog::debug("The limit of open files stays as it is.");
}

}  // namespace

// Connections have their sockets in the context, so the context goes before what they use.
struct HttpServer::Impl {
  HttpOptions options;
  HttpHandler& handler;
  Sessions sessions;
  std::function<void(int)> on_signal;
  int signals = 0;
  std::unique_ptr<asio::ssl::context> tls;
  std::vector<std::thread> threads;
  std::string url;
  std::uint16_t port = 0;
  asio::io_context context;
  asio::strand<asio::io_context::executor_type> control{context.get_executor()};  // of what follows
  tcp::acceptor acceptor{control};
  asio::steady_timer pause{control};
  asio::signal_set signal_set{control};

  Impl(const HttpOptions& o, HttpHandler& h)
      : options(o),
        handler(h),
        sessions(h, std::max(1, o.threads - 1)),
        tls(tls_context(o.tls_certificate, o.tls_key)) {}

  void listen() {
    error_code e;
    const std::string host = options.host == "localhost" ? "127.0.0.1" : options.host;
    const auto address = asio::ip::make_address(host, e);
    if (e)
      throw UsageError(fmt::format("--host {} is not an address.", options.host),
                       "127.0.0.1 is this machine alone, 0.0.0.0 (or ::) everybody who can reach it.");
    const tcp::endpoint end(address, options.port);
    acceptor.open(end.protocol(), e);
    if (!e) acceptor.set_option(tcp::acceptor::reuse_address(true), e);
    if (!e) acceptor.bind(end, e);
    if (!e) acceptor.listen(4096, e);
    if (!e) {
      port = acceptor.local_endpoint().port();
      url = fmt::format("{}://{}:{}", tls ? "https" : "http",
                        address.is_v6() ? "[" + address.to_string() + "]" : address.to_string(), port);
      return;
    }
    const bool taken = e == asio::error::address_in_use;
    throw UserError(fmt::format("Cannot listen on {} port {}: {}.", options.host, options.port, e.message()),
                    taken ? "Another program has it. Give another --port, or 0 for any free one."
                          : "Give another --host or --port.");
  }

  void accept() {
    acceptor.async_accept(asio::make_strand(context), [this](error_code e, tcp::socket socket) {
      if (!acceptor.is_open()) return;
      if (!e) {
        begin(std::move(socket));
        return accept();
      }
      if (e == asio::error::no_descriptors || e == asio::error::no_buffer_space ||
          e == asio::error::no_memory) {
        close_idle(sessions.count() - 1);
        pause.expires_after(std::chrono::milliseconds(20));
        pause.async_wait([this](error_code) { accept(); });
        return;
      }
      accept();  // that client has left already
    });
  }

  void begin(tcp::socket socket) {
    try {
      const auto session =
          std::make_shared<Session>(std::move(socket), tls.get(), options, handler, sessions);
      sessions.add(session);
      session->start();
      close_idle(options.connections);
    } catch (const std::exception& fault) {
      spdlog::error("A connection could not be begun: {}", fault.what());
    }
  }

  // A fault of one connection ends neither the others nor the thread.
  void run() {
    for (;;) {
      try {
        context.run();
        return;
      } catch (const std::exception& fault) {
        spdlog::error("A connection has failed: {}", fault.what());
      }
    }
  }

  // Those that are left after `until` are closed, each on its own strand, so that what they answered is
  // reported.
  void wait_for_sessions(std::chrono::steady_clock::time_point until) const {
    const auto wait = [&](std::chrono::steady_clock::time_point end) {
      while (sessions.count() > 0 && std::chrono::steady_clock::now() < end)
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    };
    wait(until);
    for (const auto& session : sessions.all())
      asio::post(session->executor(), [session] { session->close_now(); });
    wait(std::chrono::steady_clock::now() + kLastReports);
  }

  void close_idle(std::int64_t most) {
    while (const auto session = sessions.surplus(most))
      asio::post(session->executor(), [session] { session->close_when_idle(); });
  }

  void wait_for_signal() {
    signal_set.async_wait([this](error_code e, int) {
      if (e) return;
      ++signals;
      if (on_signal) on_signal(signals);
      wait_for_signal();
    });
  }
};

bool is_loopback(const std::string& host) {
  error_code e;
  const auto address = asio::ip::make_address(host, e);
  return host == "localhost" || (!e && address.is_loopback());
}

HttpServer::HttpServer(const HttpOptions& options, HttpHandler& handler)
    : impl_(std::make_unique<Impl>(options, handler)) {
  raise_file_limit();
  impl_->listen();
}

HttpServer::~HttpServer() { stop(std::chrono::steady_clock::now()); }

std::uint16_t HttpServer::port() const { return impl_->port; }

std::string HttpServer::url() const { return impl_->url; }

void HttpServer::on_signal(std::function<void(int)> handle) {
  asio::post(impl_->control, [impl = impl_.get(), handle = std::move(handle)]() mutable {
    impl->on_signal = std::move(handle);
    impl->signal_set.add(SIGINT);
    impl->signal_set.add(SIGTERM);
    impl->wait_for_signal();
  });
}

void HttpServer::start() {
  asio::post(impl_->control, [impl = impl_.get()] { impl->accept(); });
  for (int i = 0; i < impl_->options.threads; ++i) impl_->threads.emplace_back([this] { impl_->run(); });
}

void HttpServer::close() {
  asio::post(impl_->control, [impl = impl_.get()] {
    error_code e;
    impl->acceptor.close(e);
    for (const auto& session : impl->sessions.all())
      asio::post(session->executor(), [session] { session->close_when_idle(); });
  });
}

void HttpServer::stop(std::chrono::steady_clock::time_point until) {
  if (!impl_->threads.empty()) impl_->wait_for_sessions(until);
  impl_->context.stop();
  for (std::thread& thread : impl_->threads) thread.join();
  impl_->threads.clear();
  impl_->sessions.forget_turns();
}

}  // namespace fathom::serve
