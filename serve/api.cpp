#include "serve/api.h"

#include <array>
#include <ctime>
#include <random>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>

#include "kernels/error.h"
#include "serve/chat_request.h"
#include "serve/json_fields.h"
#include "serve/page.h"
#include "serve/tokenizer_routes.h"
#include "src/core/build_info.h"
#include "src/core/splitmix64.h"
#include "src/io/utf8.h"

namespace fathom::serve {

namespace {

using nlohmann::json;

constexpr std::int64_t kDefaultMaxTokens = 16;  // OpenAI's, of /v1/completions

json model_json(const ServedModel& model) {
  json out = {{"id", model.name},
              {"object", "model"},
              {"created", model.created},
              {"owned_by", "fathom"},
              {"max_model_len", model.limits.context}};
  if (model.limits.max_threshold > 0)
    out["routing"] = {{"layers", model.routed_layers},
                      {"min_threshold", model.limits.min_threshold},
                      {"max_threshold", model.limits.max_threshold}};
  return out;
}

}  // namespace

enum class Page : std::uint8_t {
  Root,
  Health,
  Version,
  Metrics,
  Models,
  TokenizerInfo,
  Tokenize,
  Detokenize,
  Completions,
  Chat
};

struct Api::Route {
  std::string_view path;
  std::string_view method;
  Page page;
  bool needs_model;
  bool is_prefix = false;  // a path that goes on
};

const Api::Route* Api::find_route(std::string_view path) {
  static constexpr std::array kRoutes = {
      Route{"/", "GET", Page::Root, false},
      Route{"/health", "GET", Page::Health, false},
      Route{"/version", "GET", Page::Version, false},
      Route{"/metrics", "GET", Page::Metrics, false},
      Route{"/v1/models", "GET", Page::Models, true},
      Route{"/v1/models/", "GET", Page::Models, true, true},
      Route{"/tokenizer_info", "GET", Page::TokenizerInfo, true},
      Route{"/tokenize", "POST", Page::Tokenize, true},
      Route{"/detokenize", "POST", Page::Detokenize, true},
      Route{"/v1/completions", "POST", Page::Completions, true},
      Route{"/v1/chat/completions", "POST", Page::Chat, true},
  };
  for (const Route& route : kRoutes) {
    if (route.is_prefix ? path.substr(0, route.path.size()) == route.path && path.size() > route.path.size()
                        : path == route.path)
      return &route;
  }
  return nullptr;
}

Api::Api(ApiOptions options, ServeMetrics& metrics, AccessLog* log)
    : options_(std::move(options)),
      origins_(options_.origins),
      metrics_(metrics),
      log_(log),
      ids_(std::random_device()()) {
  ids_ = ids_ * kGoldenGamma + std::random_device()();
}

void Api::open(const ServedModel& model, Scheduler& scheduler) {
  const std::lock_guard lock(mutex_);
  opened_ = {&model, &scheduler};
}

void Api::close() {
  const std::lock_guard lock(mutex_);
  opened_ = {};
}

Api::Opened Api::opened() const {
  const std::lock_guard lock(mutex_);
  return opened_;
}

bool Api::admit(const HttpRequest& head, HttpReply& refusal) {
  try {
    if (head.method != "OPTIONS" || !origins_.answers_preflights()) {
      admit_or_throw(head);
      return true;
    }
    refusal = origins_.preflight(head);
  } catch (const ApiError& e) {
    refusal = reply_of(e);
    if (e.status() == 405) refusal.headers.emplace_back("Allow", find_route(head.path)->method);
  }
  for (auto& header : origins_.headers(head)) refusal.headers.push_back(std::move(header));
  return false;
}

void Api::admit_or_throw(const HttpRequest& head) const {
  const Route* route = find_route(head.path);
  if (options_.keys.empty()) {
    // Whoever watches a server may know it by any name.
    if (route == nullptr || route->page != Page::Health) origins_.check_host(head);
    origins_.check_origin(head);
  }
  const bool is_open = route != nullptr && (route->page == Page::Health || route->page == Page::Root);
  if (!is_open && !options_.keys.admit(head.authorization))
    throw ApiError("An API key is needed, as the header 'Authorization: Bearer KEY', and this is none.",
                   {.status = 401, .code = "invalid_api_key"});
  if (route == nullptr)
    throw ApiError(fmt::format("Unknown request URL: {} {}", head.method, head.path.substr(0, 200)),
                   {.status = 404, .code = "unknown_url"});
  if (head.method != route->method)
    throw ApiError(
        fmt::format("{} takes {}, and this was {}.", head.path.substr(0, 200), route->method, head.method),
        {.status = 405, .code = "method_not_allowed"});
  if (route->needs_model && opened().model == nullptr) throw unavailable("The model is being loaded.", 5);
}

HttpReply Api::refusal(int status, const std::string& why) {
  const bool ours = status >= 500;
  return reply_of(ApiError(why, {.status = status, .type = ours ? "server_error" : "invalid_request_error"}));
}

void Api::answered(const HttpRequest& request, const AnswerRecord& record, int status, std::int64_t bytes,
                   double seconds) {
  const Route* route = find_route(request.path);
  // A client that has left before the answer began: the status that other servers log for it.
  const int shown = status == 0 ? 499 : status;
  metrics_.count_http(route == nullptr ? "other" : std::string(route->path), shown);
  if (log_ != nullptr) log_->add(request, record, shown, bytes, seconds);
}

void Api::handle(std::shared_ptr<HttpExchange> exchange) {
  for (auto& header : origins_.headers(exchange->request())) exchange->add_header(std::move(header));
  try {
    answer(exchange);
  } catch (const ApiError& e) {
    exchange->reply(reply_of(e));
  } catch (const UserError& e) {
    exchange->reply(reply_of(ApiError(e.what(), {})));
  }
}

void Api::answer(const std::shared_ptr<HttpExchange>& exchange) {
  const HttpRequest& request = exchange->request();
  const Route& route = *find_route(request.path);
  const Opened to = opened();
  if (route.needs_model && to.model == nullptr) throw unavailable("The server is stopping.", 10);
  switch (route.page) {
    case Page::Root:
      return exchange->reply(page_reply());
    case Page::Health:
      return exchange->reply(health());
    case Page::Version:
      return exchange->reply(version());
    case Page::Metrics:
      return exchange->reply(metrics());
    case Page::Models:
      return exchange->reply(models(request, *to.model));
    case Page::TokenizerInfo:
      return exchange->reply(tokenizer_info(*to.model));
    case Page::Tokenize:
      return exchange->reply(tokenize(request, *to.model));
    case Page::Detokenize:
      return exchange->reply(detokenize(request, *to.model));
    case Page::Completions:
      return complete(exchange, to);
    case Page::Chat:
      return chat(exchange, to);
  }
}

HttpReply Api::health() const {
  if (opened().model == nullptr) throw unavailable("The model is being loaded.", 5);
  return json_reply({{"status", "ok"}});
}

HttpReply Api::version() const {
  return json_reply({{"version", build_info().version}, {"commit", build_info().git_sha}});
}

HttpReply Api::metrics() const {
  const Opened to = opened();
  return {.content_type = "text/plain; version=0.0.4; charset=utf-8",
          .body = to.model == nullptr ? metrics_.text({}, {})
                                      : metrics_.text(to.scheduler->stats(), to.model->routed_layers)};
}

HttpReply Api::models(const HttpRequest& request, const ServedModel& model) {
  constexpr std::string_view kPrefix = "/v1/models/";
  if (request.path.size() > kPrefix.size()) {
    check_model(request.path.substr(kPrefix.size()), model);
    return json_reply(model_json(model));
  }
  return json_reply({{"object", "list"}, {"data", json::array({model_json(model)})}});
}

AnswerPlan Api::new_plan(const char* prefix, const AnswerOptions& options, const ServedModel& model) const {
  AnswerPlan plan;
  plan.head = {fmt::format("{}-{:016x}", prefix, mix64(ids_.fetch_add(kGoldenGamma))),
               static_cast<std::int64_t>(std::time(nullptr)), model.name};
  plan.n = options.n;
  plan.stream = options.stream;
  plan.include_usage = options.include_usage;
  plan.logprobs = options.logprobs >= 0;
  plan.routing = options.routing;
  return plan;
}

void Api::complete(const std::shared_ptr<HttpExchange>& exchange, const Opened& to) {
  const ServedModel& model = *to.model;
  const CompletionRequest request = parse_completion(exchange->request().body, model.limits);
  const AnswerOptions& o = request.options;
  check_model(o.model, model);
  AnswerPlan plan = new_plan("cmpl", o, model);
  plan.format = completion_format(o.logprobs, model.token_texts);
  plan.prompts = prepare_prompts(request, model, o.max_tokens.value_or(0));
  plan.echo = request.echo;
  // What nobody asked for does not make a prompt too long: the engine ends a text where the context does.
  const std::int64_t max_tokens = o.max_tokens.value_or(kDefaultMaxTokens);
  std::vector<TextRequest> texts = texts_of(plan.prompts, o, max_tokens, request.echo, model);
  start(exchange, std::move(plan), std::move(texts), to);
}

void Api::chat(const std::shared_ptr<HttpExchange>& exchange, const Opened& to) {
  const ServedModel& model = *to.model;
  ChatRequest request = parse_chat(exchange->request().body, model.limits);
  AnswerOptions& o = request.options;
  check_model(o.model, model);
  o.stops.emplace_back(kChatStop);
  AnswerPlan plan = new_plan("chatcmpl", o, model);
  plan.format = chat_format(plan.logprobs, model.token_texts);
  CompletionRequest as_text;
  as_text.prompts = {{.text = chat_prompt(request.messages)}};
  try {
    plan.prompts = prepare_prompts(as_text, model, o.max_tokens.value_or(1));
  } catch (const ApiError& e) {
    throw bad_field("messages", e.what(), e.parts().code);
  }
  const std::int64_t room = model.limits.context - static_cast<std::int64_t>(plan.prompts[0].ids.size());
  std::vector<TextRequest> texts = texts_of(plan.prompts, o, o.max_tokens.value_or(room), false, model);
  for (TextRequest& text : texts) text.trims = true;
  start(exchange, std::move(plan), std::move(texts), to);
}

void Api::start(const std::shared_ptr<HttpExchange>& exchange, AnswerPlan plan,
                std::vector<TextRequest> texts, const Opened& to) {
  Job job;
  job.texts = std::move(texts);
  job.listener = std::make_shared<Answer>(exchange, std::move(plan), *to.model);
  if (options_.deadline.count() > 0) job.deadline = Clock::now() + options_.deadline;
  Scheduler& scheduler = *to.scheduler;
  const JobId id = scheduler.submit(std::move(job));
  exchange->on_gone([&scheduler, id] { scheduler.cancel(id); });
}

}  // namespace fathom::serve
