// Filling in what a configuration leaves to a default.
#pragma once

#include <cstdint>
#include <optional>

#include "src/config/config.h"

namespace fathom {

/// Replaces every 0 that stands for a default by its value: kv_heads, ffn_hidden, max_seq_len,
/// predictor_hidden and micro_batch; causal.method where it is auto; and vocab_size when `store_vocab`, the
/// token store's number of ids, is given (rounded up to a multiple of 64). Throws UserError if the store has
/// more ids than an explicit vocab_size.
Config resolve(Config config, std::optional<std::int64_t> store_vocab = std::nullopt);

}  // namespace fathom
