// What the server counts, and /metrics.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "infer/engine.h"
#include "serve/metrics.h"

namespace fathom::serve {

/// Any thread.
class ServeMetrics {
 public:
  void observe_first_token(double seconds);
  void observe_inter_token(double seconds);
  void observe_request(double seconds);  // from its arrival to its last token
  void count_cancelled();
  void count_http(const std::string& route, int status);
  void set_connections(std::int64_t open);

  /// `layers`: the model's routed layers, whose rows are EngineStats::routed_rows.
  std::string text(const EngineStats& stats, const std::vector<std::int64_t>& layers) const;

 private:
  mutable std::mutex mutex_;
  Histogram first_token_{{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}};
  Histogram inter_token_{{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5}};
  Histogram request_{{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600}};
  std::map<std::pair<std::string, int>, std::int64_t> http_;
  std::int64_t cancelled_ = 0;
  std::int64_t connections_ = 0;
};

}  // namespace fathom::serve
