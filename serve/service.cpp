#include "serve/service.h"

#include <algorithm>
#include <utility>

#include <spdlog/spdlog.h>

namespace fathom::serve {

namespace {

// For the last bytes of answers to get away, where the drain leaves less.
constexpr std::chrono::milliseconds kLastBytes{5000};

ServiceOptions with_origins(ServiceOptions options) {
  options.api.origins.is_local = is_loopback(options.http.host);
  return options;
}

}  // namespace

Service::Service(ServiceOptions options)
    : options_(with_origins(std::move(options))),
      log_(options_.access_log.empty() ? nullptr : std::make_unique<AccessLog>(options_.access_log)),
      api_(options_.api, metrics_, log_.get()),
      http_(options_.http, api_) {}

void Service::run(Engine& engine, const ServedModel& model) {
  Scheduler scheduler(engine, *model.tokenizer, options_.scheduler, metrics_);
  {
    const std::lock_guard lock(mutex_);
    scheduler_ = &scheduler;
  }
  api_.open(model, scheduler);
  // Whatever happens, nobody may come to the scheduler any more when it goes.
  const auto stop = [&] {
    Clock::time_point until = Clock::now() + kLastBytes;
    {
      const std::lock_guard lock(mutex_);
      scheduler_ = nullptr;
      until = std::max(until, drained_);
    }
    api_.close();
    http_.close();
    http_.stop(until);
  };
  try {
    scheduler.run();
  } catch (...) {
    stop();
    throw;
  }
  stop();
}

bool Service::shut_down() {
  const std::lock_guard lock(mutex_);
  if (scheduler_ == nullptr) return false;
  const Clock::time_point until = Clock::now() + options_.drain;
  drained_ = std::max(drained_, until);
  scheduler_->drain(until);
  http_.close();
  return true;
}

void Service::shut_down_on_signals(std::function<void(int)> at_once) {
  http_.on_signal([this, at_once = std::move(at_once)](int number) {
    if (number == 1 && shut_down()) {
      spdlog::info("Stopping: no new requests, and those that run have {} s. A second signal ends at once.",
                   std::chrono::duration_cast<std::chrono::seconds>(options_.drain).count());
      return;
    }
    at_once(number);
  });
}

}  // namespace fathom::serve
