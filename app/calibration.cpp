#include "app/calibration.h"

#include <algorithm>

#include <fmt/format.h>

#include "infer/quant/calibration_size.h"
#include "kernels/error.h"

namespace fathom::app {

namespace {

constexpr std::int64_t kLongest = 2048, kSequences = 128, kHeldOut = 32768, kMore = 4;

}  // namespace

SelectionRule serving_rule(const RoutingConfig& routing) {
  if (routing.kind == RoutingKind::None || routing.needs_future()) return TopK{};
  return causal_rule(routing);
}

CalibrationTokens read_calibration(const std::string& path, const TrainedModel& model, std::int64_t tokens) {
  const TokenStore store = TokenStore::open(path);
  require_same_tokens(store, model.loaded);
  CalibrationTokens c;
  const Config& config = model.loaded.config;
  c.seq = std::min({kLongest, config.train.seq_len, config.model.max_seq_len});
  c.in_store = store.num_tokens();
  c.store = store.content_hash();
  const std::int64_t sequences = (c.in_store - 1) / c.seq;
  if (sequences < 2) {
    throw UserError(
        fmt::format("{} has {} tokens, and a calibration of sequences of {} needs {}: one to calibrate on, "
                    "one to compare by, and a token that follows.",
                    path, c.in_store, c.seq, 2 * c.seq + 1),
        "Give a longer store, such as that of the training.");
  }
  const std::int64_t held_out =
      std::clamp(kHeldOut / c.seq, std::int64_t{1}, std::max<std::int64_t>(1, sequences / 8));
  const std::int64_t available = (sequences - held_out) * c.seq;
  if (tokens > 0 && tokens < c.seq) {
    throw UserError(fmt::format("--calibration-tokens {} is less than one sequence of {}.", tokens, c.seq),
                    "Give at least that many.");
  }
  c.wanted = tokens > 0 ? tokens / c.seq * c.seq : std::min(kSequences * kLongest / c.seq * c.seq, available);
  if (c.wanted > available) {
    throw UserError(
        fmt::format("{} has {} tokens, and --calibration-tokens {} needs {}: {} are held out to compare by.",
                    path, c.in_store, tokens, c.wanted + held_out * c.seq + 1, held_out * c.seq + 1),
        fmt::format("Ask for {} at most, or give a longer store.", available));
  }
  c.most = std::min(available, kMore * c.wanted);
  const auto read = [&](std::vector<std::int32_t>& to, std::int64_t offset, std::int64_t n) {
    to.resize(static_cast<std::size_t>(n));
    store.read(offset, to);
  };
  read(c.tokens, 0, c.wanted);
  const std::int64_t needed =
      calibration_tokens_needed(*model.context, *model.loaded.model,
                                serving_rule(model.loaded.config.routing), c.tokens, c.seq, {.most = c.most});
  if (needed > c.wanted) read(c.tokens, 0, needed);
  const std::int64_t compared = held_out * c.seq + 1;
  read(c.held_out, c.in_store - compared, compared);
  return c;
}

}  // namespace fathom::app
