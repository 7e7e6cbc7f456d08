#include "serve/serve_metrics.h"

#include <algorithm>

#include "src/core/build_info.h"

namespace fathom::serve {

namespace {

void add_cycles(MetricsText& out, const CycleStats& s) {
  const auto family = [&](std::string_view name, std::string_view help, std::int64_t CycleStats::Level::*of) {
    out.family(name, "counter", help);
    for (const CycleStats::Level& level : s.levels)
      out.sample(static_cast<double>(level.*of), {{"level", level.name}});
  };
  using Level = CycleStats::Level;
  family("fathom_speculative_passes_total",
         "Passes of a level of speculation: those of the target are verifications.", &Level::passes);
  family("fathom_speculative_proposed_tokens_total", "Tokens that were proposed to a level.",
         &Level::proposed);
  family("fathom_speculative_accepted_tokens_total", "Of the tokens proposed to a level, those that it took.",
         &Level::accepted);
  family("fathom_speculative_tokens_total",
         "Tokens that a level handed on, proposals taken and its own: those of the target are of the text.",
         &Level::tokens);
  out.family("fathom_speculative_plain_texts_total", "counter",
             "Texts that went on plainly, though few were being written, by reason.");
  for (const char* reason : {"seed", "failed"}) {
    const auto found = s.plain_texts.find(reason);
    out.sample(found != s.plain_texts.end() ? static_cast<double>(found->second) : 0, {{"reason", reason}});
  }
  out.counter("fathom_speculative_given_up_total",
              "Times that speculation gave its blocks back to the texts.", static_cast<double>(s.given_up));
}

void add_engine(MetricsText& out, const EngineStats& s, const std::vector<std::int64_t>& layers) {
  const auto number = [](std::int64_t n) { return static_cast<double>(n); };
  out.gauge("fathom_requests_running", "Texts that the engine is writing.", number(s.running));
  out.gauge("fathom_requests_waiting", "Texts that wait for room in the engine.", number(s.waiting));
  out.gauge("fathom_kv_cache_usage_ratio", "Share of the blocks of keys and values that are in use.",
            s.blocks > 0 ? number(s.blocks - s.free_blocks) / number(s.blocks) : 0);
  out.gauge("fathom_kv_cache_blocks", "Blocks of keys and values, free ones too.", number(s.blocks));
  out.gauge("fathom_kv_cache_free_blocks",
            "Blocks of keys and values that are free, or have only beginnings for later texts.",
            number(s.free_blocks));
  out.gauge("fathom_prefix_cache_blocks", "Blocks that have only beginnings for later texts.",
            number(s.prefix_blocks));
  out.gauge("fathom_kv_cache_block_bytes", "Bytes of a block.", number(s.block_bytes));
  out.counter("fathom_prompt_tokens_total",
              "Tokens of prompts that were computed, again after a preemption too.", number(s.prompt_tokens));
  out.counter("fathom_prefix_cache_hit_tokens_total",
              "Tokens that were in the cache when a text began, and were not computed.",
              number(s.prefix_hit_tokens));
  out.counter("fathom_generated_tokens_total", "Tokens that were chosen.", number(s.decoded_tokens));
  out.counter("fathom_engine_steps_total", "Steps of the engine.", number(s.steps));
  out.counter("fathom_preemptions_total", "Texts that gave their blocks away and were computed again.",
              number(s.preemptions));
  out.counter("fathom_rows_total", "Tokens that went through the model.", number(s.rows));
  if (!s.cycles.levels.empty()) add_cycles(out, s.cycles);
  if (layers.empty()) return;
  out.family("fathom_routed_rows_total", "counter",
             "Tokens that a routed layer computed, of fathom_rows_total.");
  for (std::size_t i = 0; i < layers.size() && i < s.routed_rows.size(); ++i)
    out.sample(number(s.routed_rows[i]), {{"layer", std::to_string(layers[i])}});
  out.family("fathom_routed_fraction", "gauge",
             "Share of all tokens since the start that a routed layer computed.");
  for (std::size_t i = 0; i < layers.size() && i < s.routed_rows.size(); ++i)
    out.sample(number(s.routed_rows[i]) / number(std::max<std::int64_t>(1, s.rows)),
               {{"layer", std::to_string(layers[i])}});
}

}  // namespace

void ServeMetrics::observe_first_token(double seconds) {
  const std::lock_guard lock(mutex_);
  first_token_.observe(seconds);
}

void ServeMetrics::observe_inter_token(double seconds) {
  const std::lock_guard lock(mutex_);
  inter_token_.observe(seconds);
}

void ServeMetrics::observe_request(double seconds) {
  const std::lock_guard lock(mutex_);
  request_.observe(seconds);
}

void ServeMetrics::count_cancelled() {
  const std::lock_guard lock(mutex_);
  ++cancelled_;
}

void ServeMetrics::count_http(const std::string& route, int status) {
  const std::lock_guard lock(mutex_);
  ++http_[{route, status}];
}

void ServeMetrics::set_connections(std::int64_t open) {
  const std::lock_guard lock(mutex_);
  connections_ = open;
}

std::string ServeMetrics::text(const EngineStats& stats, const std::vector<std::int64_t>& layers) const {
  MetricsText out;
  out.family("fathom_build_info", "gauge", "1; what runs is in the labels.");
  out.sample(1, {{"version", build_info().version}, {"commit", build_info().git_sha}});
  add_engine(out, stats, layers);
  const std::lock_guard lock(mutex_);
  out.histogram("fathom_time_to_first_token_seconds", "From a request's arrival to its first token.",
                first_token_);
  out.histogram("fathom_inter_token_seconds", "From a token of a text to the next.", inter_token_);
  out.histogram("fathom_request_seconds", "From a request's arrival to its last token.", request_);
  out.counter("fathom_requests_cancelled_total", "Requests whose client left, or did not read.",
              static_cast<double>(cancelled_));
  out.family("fathom_http_requests_total", "counter", "HTTP requests that were answered.");
  for (const auto& [key, count] : http_)
    out.sample(static_cast<double>(count), {{"route", key.first}, {"status", std::to_string(key.second)}});
  out.gauge("fathom_http_connections", "Connections that are open.", static_cast<double>(connections_));
  return out.text();
}

}  // namespace fathom::serve
