// fathom bench load: requests to a server, by clients that wait for each answer (closed loop) or as they
// come, whatever the server does (open loop).
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <deque>
#include <iostream>
#include <map>
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <poll.h>

#include "app/bench_kernels.h"
#include "app/load_client.h"
#include "app/load_work.h"
#include "kernels/error.h"
#include "src/core/splitmix64.h"
#include "src/core/stopwatch.h"

namespace fathom::app {

namespace {

struct FlagsOfLoad {
  std::string url;
  LoadFlags load;
  std::int64_t clients = 64;
  double rate = 0;
  bool whole = false;
  double timeout = 600;
};

// "status 400 (context_length_exceeded)": kinds, of which there are few, and not messages.
std::string refusal_of(int status, const std::string& body) {
  const auto json = nlohmann::json::parse(body, nullptr, false);
  if (!json.is_object() || !json.contains("error") || !json["error"].is_object())
    return fmt::format("status {}", status);
  const auto code = json["error"].find("code");
  return code == json["error"].end() || !code->is_string()
             ? fmt::format("status {}", status)
             : fmt::format("status {} ({})", status, code->get<std::string>());
}

// The whole run, on one thread.
class LoadRun {
 public:
  explicit LoadRun(const FlagsOfLoad& flags)
      : flags_(flags), address_(read_load_address(flags.url)), work_(load_requests(flags.load)) {
    const char* key = std::getenv("FATHOM_API_KEY");
    head_ =
        fmt::format("POST /v1/completions HTTP/1.1\r\nHost: {}\r\n{}Content-Type: application/json\r\n",
                    address_.host, key == nullptr ? "" : fmt::format("Authorization: Bearer {}\r\n", key));
    // When each one comes: of a closed loop at once, of an open one with gaps of an exponential distribution.
    SplitMix64 random(mix64(flags.load.seed));
    double at = 0;
    for (std::size_t i = 0; i < work_.size(); ++i) {
      if (flags.rate > 0)
        at -= std::log((static_cast<double>(random.next() >> 11) + 1) * 0x1p-53) / flags.rate;
      due_.push_back(at);
    }
    if (flags.rate > 0) return;
    for (std::int64_t i = 0; i < flags.clients; ++i) connect();
  }

  void run() {
    const double cpu = cpu_seconds();
    watch_.restart();
    while (ended_ < work_.size()) {
      begin_those_due();
      wait();
      for (auto& client : clients_) step(*client);
      if (watch_.seconds() > due_.back() + flags_.timeout)
        throw UserError(fmt::format("{} of {} requests had no answer within {:.0f} s.", work_.size() - ended_,
                                    work_.size(), flags_.timeout));
    }
    seconds_ = watch_.seconds();
    cpu_ = cpu_seconds() - cpu;
  }

  nlohmann::json json() {
    std::int64_t failed = 0;
    for (const auto& [what, count] : errors_) failed += count;
    return {{"bench", "load"},
            {"url", flags_.url},
            {"loop", flags_.rate > 0 ? "open" : "closed"},
            {"clients", flags_.rate > 0 ? most_clients_ : static_cast<std::size_t>(flags_.clients)},
            {"rate", flags_.rate > 0 ? nlohmann::json(flags_.rate) : nlohmann::json()},
            {"stream", !flags_.whole},
            {"requests", work_.size()},
            {"failed", failed},
            {"errors", errors_},
            {"seconds", seconds_},
            {"prompt_tokens", prompt_tokens_},
            {"new_tokens", new_tokens_},
            {"new_tok_s", static_cast<double>(new_tokens_) / seconds_},
            {"request_s", static_cast<double>(work_.size() - static_cast<std::size_t>(failed)) / seconds_},
            {"first_token", flags_.whole ? nlohmann::json() : times_json(first_)},
            {"inter_token", flags_.whole ? nlohmann::json() : times_json(between_)},
            {"request", times_json(whole_)},
            {"late_p99_ms", 1e3 * percentile(late_, 0.99)},
            {"cpu_seconds", cpu_}};
  }

 private:
  struct Client {
    explicit Client(const LoadAddress& address) : connection(address) {}
    LoadConnection connection;
    std::size_t request = 0;
    bool is_busy = false;
    double due = 0, last = 0;  // last: of the piece before
    bool has_piece = false;
    std::string error;
  };

  Client& connect() {
    clients_.push_back(std::make_unique<Client>(address_));
    most_clients_ = std::max(most_clients_, clients_.size());
    return *clients_.back();
  }

  void begin_those_due() {
    while (next_ < work_.size() && due_[next_] <= watch_.seconds()) {
      const auto idle =
          std::find_if(clients_.begin(), clients_.end(), [](const auto& c) { return !c->is_busy; });
      if (idle == clients_.end() && flags_.rate <= 0) return;
      Client& client = idle == clients_.end() ? connect() : **idle;
      const LoadRequest& r = work_[next_];
      nlohmann::json body = {{"prompt", r.prompt},
                             {"max_tokens", r.max_tokens},
                             {"temperature", flags_.load.temperature},
                             {"seed", r.seed},
                             {"ignore_eos", true}};
      if (!flags_.whole) {
        body["stream"] = true;
        body["stream_options"] = {{"include_usage", true}};
      }
      const std::string text = body.dump();
      client.request = next_;
      client.is_busy = true;
      client.has_piece = false;
      client.error.clear();
      const double now = watch_.seconds();
      // In an open loop a request's time begins when it was to come: what waits for the client waits.
      client.due = flags_.rate > 0 ? due_[next_] : now;
      late_.push_back(now - client.due);
      client.connection.ask(fmt::format("{}Content-Length: {}\r\n\r\n{}", head_, text.size(), text));
      ++next_;
    }
  }

  void wait() {
    polls_.clear();
    for (const auto& client : clients_) {
      const LoadConnection& c = client->connection;
      polls_.push_back({c.socket(), static_cast<short>(c.wants_to_write() ? POLLIN | POLLOUT : POLLIN), 0});
    }
    double seconds = 0.1;
    if (flags_.rate > 0 && next_ < work_.size())
      seconds = std::clamp(due_[next_] - watch_.seconds(), 0.0, 0.1);
    timespec limit{};
    limit.tv_nsec = static_cast<long>(seconds * 1e9);
    ::ppoll(polls_.data(), polls_.size(), &limit, nullptr);
    for (std::size_t i = 0; i < polls_.size(); ++i) {
      if ((polls_[i].revents & POLLOUT) != 0) clients_[i]->connection.write();
      if ((polls_[i].revents & ~POLLOUT) != 0) clients_[i]->connection.read();
    }
  }

  void step(Client& client) {
    LoadConnection& c = client.connection;
    if (!client.is_busy) return;
    if (c.status() == 200 && !flags_.whole) take_events(client);
    if (!c.is_done() && !c.is_lost()) return;
    const double now = watch_.seconds();
    if (c.is_lost()) {
      client.error = "connection lost";
    } else if (c.status() != 200) {
      client.error = refusal_of(c.status(), c.body());
    } else if (flags_.whole) {
      count_usage(nlohmann::json::parse(c.body(), nullptr, false), client);
    }
    if (client.error.empty()) {
      whole_.push_back(now - client.due);
    } else {
      ++errors_[client.error];
    }
    ++ended_;
    client.is_busy = false;
    if (!c.is_lost()) return;
    // Another one in its place.
    for (auto& slot : clients_) {
      if (slot.get() == &client) {
        slot = std::make_unique<Client>(address_);
        return;
      }
    }
  }

  // A piece of a stream is a token, but where a character has several.
  void take_events(Client& client) {
    std::string& body = client.connection.body();
    std::size_t at = 0;
    for (std::size_t end = 0; (end = body.find("\n\n", at)) != std::string::npos; at = end + 2) {
      const std::string_view event = std::string_view(body).substr(at, end - at);
      const double now = watch_.seconds();
      if (event.find("\"usage\":{") != std::string_view::npos || event.rfind("data: {\"error\"", 0) == 0) {
        count_usage(nlohmann::json::parse(event.substr(6), nullptr, false), client);
      } else if (event.find("\"choices\":[{") != std::string_view::npos) {
        if (client.has_piece) {
          between_.push_back(now - client.last);
        } else {
          first_.push_back(now - client.due);
        }
        client.has_piece = true;
        client.last = now;
      }
    }
    body.erase(0, at);
  }

  void count_usage(const nlohmann::json& json, Client& client) {
    if (!json.is_object() || !json.contains("usage")) {
      client.error = "error in the answer";
      return;
    }
    const auto wanted = work_[client.request].max_tokens;
    const auto got = json["usage"].value("completion_tokens", std::int64_t{0});
    prompt_tokens_ += json["usage"].value("prompt_tokens", std::int64_t{0});
    new_tokens_ += got;
    if (got != wanted) client.error = "fewer tokens than asked for";
  }

  const FlagsOfLoad& flags_;
  LoadAddress address_;
  std::vector<LoadRequest> work_;
  std::string head_;
  std::vector<double> due_;
  std::vector<std::unique_ptr<Client>> clients_;
  std::vector<pollfd> polls_;
  std::size_t next_ = 0, ended_ = 0, most_clients_ = 0;
  Stopwatch watch_;
  double seconds_ = 0, cpu_ = 0;
  std::int64_t prompt_tokens_ = 0, new_tokens_ = 0;
  std::vector<double> first_, between_, whole_, late_;
  std::map<std::string, std::int64_t> errors_;
};

void run(const FlagsOfLoad& flags, const Globals& globals) {
  LoadRun load(flags);
  load.run();
  const nlohmann::json j = load.json();
  if (globals.json) {
    std::cout << j.dump() << "\n";
    return;
  }
  std::cout << fmt::format(
      "{} requests, {} failed, {:.2f} s: {:.1f} requests/s, {:.0f} new tok/s; own CPU {:.2f} s\n",
      j["requests"].get<std::int64_t>(), j["failed"].get<std::int64_t>(), j["seconds"].get<double>(),
      j["request_s"].get<double>(), j["new_tok_s"].get<double>(), j["cpu_seconds"].get<double>());
  for (const char* what : {"first_token", "inter_token", "request"}) {
    const nlohmann::json& t = j[what];
    if (t.is_object())
      std::cout << fmt::format("{:12} p50 {:8.2f}  p90 {:8.2f}  p99 {:8.2f}  max {:8.2f} ms\n", what,
                               t["p50_ms"].get<double>(), t["p90_ms"].get<double>(),
                               t["p99_ms"].get<double>(), t["max_ms"].get<double>());
  }
  for (const auto& [what, count] : j["errors"].items())
    std::cout << fmt::format("{}: {}\n", what, count.get<std::int64_t>());
}

}  // namespace

void add_bench_load(CLI::App& bench, Globals& globals) {
  auto flags = std::make_shared<FlagsOfLoad>();
  CLI::App* sub =
      bench.add_subcommand("load", "Requests to a server: time to first token, between tokens, tok/s");
  sub->add_option("url", flags->url, "Where it listens, http://ADDRESS:PORT; a key is in FATHOM_API_KEY")
      ->required();
  add_load_flags(*sub, flags->load);
  sub->add_option("--clients", flags->clients, "That ask one request after the other")
      ->capture_default_str()
      ->check(number_from_to(1, 1e5));
  sub->add_option("--rate", flags->rate,
                  "Requests a second that come on their own, at random times (Poisson); 0: as --clients ask")
      ->capture_default_str()
      ->check(number_from_to(0, 1e6));
  sub->add_flag("--whole", flags->whole, "Whole answers, not streams");
  sub->add_option("--timeout", flags->timeout, "Seconds behind the last arrival until it fails")
      ->capture_default_str()
      ->check(number_from_to(1, 1e6));
  add_global_flags(*sub, globals);
  sub->footer(
      "Examples:\n"
      "  fathom bench load http://127.0.0.1:8000 --data books.valid.h5\n"
      "  fathom bench load http://127.0.0.1:8000 --data books.valid.h5 --rate 20 --json");
  sub->callback([flags, &globals] { run(*flags, globals); });
}

}  // namespace fathom::app
