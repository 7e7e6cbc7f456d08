#include "train/routes/draw.h"

#include <algorithm>

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom::routes {

namespace {

const char* name_of(const SelectionRule& rule) {
  if (std::holds_alternative<Causal>(rule)) return "causal";
  return std::holds_alternative<Stochastic>(rule) ? "stochastic" : "topk";
}

void require_start(const Range& range, std::int64_t available) {
  if (range.first == 0 || range.first < available) return;
  throw UserError(fmt::format("The text has {} tokens, and {} were to be skipped.", available, range.first),
                  "Skip fewer.");
}

}  // namespace

Text part_of(const TokenStore& store, const LoadedModel& model, const Range& range) {
  if (store.tokenizer_hash() != model.meta.tokenizer_hash) {
    throw UserError(fmt::format("{} was made with the tokenizer {} ({}), the model was trained with {} ({}).",
                                store.path(), store.tokenizer_hash(), store.info().tokenizer_kind,
                                model.meta.tokenizer_hash, model.meta.tokenizer_kind),
                    "Prepare the text with the model's tokenizer.");
  }
  require_start(range, store.num_tokens());
  return {excerpt_of(store, range.first, range.tokens, model.config.train.seq_len,
                     model.config.data.document_mask),
          range.first, store.num_tokens()};
}

Text part_of(const std::string& text, const Tokenizer& tokenizer, const LoadedModel& model,
             const Range& range) {
  const std::vector<std::int32_t> all = tokenizer.encode(text);
  const auto available = static_cast<std::int64_t>(all.size());
  require_start(range, available);
  const auto begin = all.begin() + range.first;
  return {{{begin, begin + std::min(range.tokens, available - range.first)}, {}, model.config.train.seq_len},
          range.first,
          available};
}

Picture draw(Context& c, const LoadedModel& model, const Text& text, const Tokenizer* tokenizer,
             const SelectionRule& rule, double threshold) {
  const RoutingConfig& routing = model.config.routing;
  Picture p;
  p.checkpoint = model.checkpoint.string();
  p.step = model.meta.state.step;
  p.rule = name_of(rule);
  p.threshold = threshold;
  if (routing.routes_depth()) p.capacity = routing.capacity;
  p.first = text.first;
  p.available = text.available;
  p.routes = trace(c, *model.model, text.excerpt, rule);
  p.pieces = pieces_of(p.routes.tokens, tokenizer);
  return p;
}

}  // namespace fathom::routes
