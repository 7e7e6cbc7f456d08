// The routes: what each of them takes and gives. No sockets, no engine.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "serve/access_log.h"
#include "serve/answer.h"
#include "serve/api_keys.h"
#include "serve/http/exchange.h"
#include "serve/origins.h"
#include "serve/scheduler.h"
#include "serve/serve_metrics.h"
#include "serve/served_model.h"

namespace fathom::serve {

struct ApiOptions {
  ApiKeys keys;                           // none: everybody may
  OriginOptions origins;                  // of pages in browsers
  std::chrono::milliseconds deadline{0};  // of a request; 0: none
};

/// All but the constructor: from any thread.
class Api final : public HttpHandler {
 public:
  /// `log` may be null. All outlive it.
  Api(ApiOptions options, ServeMetrics& metrics, AccessLog* log);

  /// The model is there: until then /health and all that needs it say 503. Both outlive the requests that
  /// come before close().
  void open(const ServedModel& model, Scheduler& scheduler);
  /// It is not any more.
  void close();

  bool admit(const HttpRequest& head, HttpReply& refusal) override;
  void handle(std::shared_ptr<HttpExchange> exchange) override;
  HttpReply refusal(int status, const std::string& why) override;
  void answered(const HttpRequest& request, const AnswerRecord& record, int status, std::int64_t bytes,
                double seconds) override;
  void connections(std::int64_t open) override { metrics_.set_connections(open); }

 private:
  struct Opened {
    const ServedModel* model = nullptr;
    Scheduler* scheduler = nullptr;
  };
  struct Route;
  static const Route* find_route(std::string_view path);

  Opened opened() const;
  void admit_or_throw(const HttpRequest& head) const;
  void answer(const std::shared_ptr<HttpExchange>& exchange);
  AnswerPlan new_plan(const char* prefix, const AnswerOptions& options, const ServedModel& model) const;
  void start(const std::shared_ptr<HttpExchange>& exchange, AnswerPlan plan, std::vector<TextRequest> texts,
             const Opened& to);

  // The routes:
  HttpReply health() const;
  HttpReply version() const;
  HttpReply metrics() const;
  static HttpReply models(const HttpRequest& request, const ServedModel& model);
  void complete(const std::shared_ptr<HttpExchange>& exchange, const Opened& to);
  void chat(const std::shared_ptr<HttpExchange>& exchange, const Opened& to);

  ApiOptions options_;
  Origins origins_;
  ServeMetrics& metrics_;
  AccessLog* log_;
  mutable std::mutex mutex_;
  Opened opened_;
  mutable std::atomic<std::uint64_t> ids_;
};

}  // namespace fathom::serve
