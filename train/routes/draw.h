// From a trained model and a text to a picture.
#pragma once

#include <cstdint>
#include <string>

#include "src/model/checkpoint.h"
#include "train/routes/picture.h"

namespace fathom::routes {

/// Tokens [first, first + tokens) of a text, or as many as there are.
struct Range {
  std::int64_t first = 0;
  std::int64_t tokens = 0;
};

/// The tokens to follow, where they start, and how many the text has in all.
struct Text {
  Excerpt excerpt;
  std::int64_t first = 0;
  std::int64_t available = 0;
};

/// UserError: the range starts after the end; the store was made with another tokenizer than the model's.
Text part_of(const TokenStore& store, const LoadedModel& model, const Range& range);
Text part_of(const std::string& text, const Tokenizer& tokenizer, const LoadedModel& model,
             const Range& range);

/// Routed by `rule`; `threshold` is what the figures judge routers by. Without a tokenizer tokens are shown
/// as ids. UserError: require_routing, trace.
Picture draw(Context& c, const LoadedModel& model, const Text& text, const Tokenizer* tokenizer,
             const SelectionRule& rule, double threshold);

}  // namespace fathom::routes
