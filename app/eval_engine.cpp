#include "app/eval_engine.h"

#include <algorithm>

#include "kernels/error.h"

namespace fathom::app {

EngineLoss engine_loss(Context& c, const Transformer& model, const EngineOptions& options,
                       const DataLoader& data, std::int64_t tokens) {
  const std::int64_t seq = data.seq_len();
  const std::int64_t count =
      tokens == 0 ? data.sequences() : std::min(data.sequences(), std::max<std::int64_t>(1, tokens / seq));
  Engine engine(c, model, options);
  EngineLoss result;
  std::int64_t next = 0, open = 0;
  const auto submit = [&] {
    const Batch batch = data.in_order(c, next++, 1);
    Request r;
    r.prompt = to_host<std::int32_t>(c.backend(), batch.tokens);
    r.prompt.push_back(to_host<std::int32_t>(c.backend(), batch.targets).back());
    r.max_tokens = 0;
    r.prompt_logprobs = true;
    engine.submit(std::move(r));
    ++open;
  };
  while (next < count || open > 0) {
    while (next < count && open < options.max_sequences) submit();
    for (const Event& event : engine.step()) {
      if (event.finish == Finish::Error) throw UserError(event.error);
      for (const double logprob : event.prompt_logprobs) result.loss -= logprob;
      result.tokens += static_cast<std::int64_t>(event.prompt_logprobs.size());
      if (event.finish != Finish::None) --open;
    }
  }
  result.loss /= static_cast<double>(result.tokens);
  result.stats = engine.stats();
  for (const std::int64_t rows : result.stats.routed_rows)
    result.routed_fraction.push_back(static_cast<double>(rows) / static_cast<double>(result.stats.rows));
  return result;
}

}  // namespace fathom::app
