#include "src/config/resolve.h"

#include <algorithm>

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom {
namespace {

constexpr std::int64_t round_up(std::int64_t x, std::int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

}  // namespace

Config resolve(Config c, std::optional<std::int64_t> store_vocab) {
  ModelConfig& m = c.model;
  if (store_vocab) {
    if (m.vocab_size == 0) m.vocab_size = round_up(*store_vocab, 64);
    if (m.vocab_size < *store_vocab) {
      throw UserError(
          fmt::format("model.vocab_size is {}, but the token store has {} ids.", m.vocab_size, *store_vocab),
          "Raise it, or set it to 0 to follow the store.");
    }
  }
  if (m.kv_heads == 0) m.kv_heads = m.heads;
  if (m.own_head_dim * m.heads == m.width) m.own_head_dim = 0;  // says nothing: one model, one config
  if (m.ffn_hidden == 0) m.ffn_hidden = round_up((8 * m.width + 2) / 3, 64);
  if (m.max_seq_len == 0) m.max_seq_len = c.train.seq_len;
  c.routing.causal.method = c.routing.method();
  if (c.routing.causal.predictor_hidden == 0) {
    c.routing.causal.predictor_hidden = std::max<std::int64_t>(1, m.width / 4);
  }
  if (c.train.micro_batch == 0) c.train.micro_batch = c.train.batch_tokens / c.train.seq_len;
  return c;
}

}  // namespace fathom
