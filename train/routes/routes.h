// The way of each token of a text through a model: which routed blocks computed it and by what score, which
// experts took it. What Raposo et al. 2024 (arXiv 2404.02258) show in figure 5, as numbers on the host.
//
// Shapes: N tokens of the text, E experts of a block.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/io/token_store.h"
#include "src/model/transformer.h"

namespace fathom::routes {

/// The tokens to follow. A model routes sequences: of seq_len tokens each, the last one as long as it is.
struct Excerpt {
  std::vector<std::int32_t> tokens;     // N
  std::vector<std::int32_t> documents;  // the number of each token's document; empty: no document masks
  std::int64_t seq_len = 0;
};

/// `tokens` tokens of a store from token `first` on, or as many as there are.
Excerpt excerpt_of(const TokenStore& store, std::int64_t first, std::int64_t tokens, std::int64_t seq_len,
                   bool document_mask);

/// A block that computes some of the tokens.
struct RoutedTokens {
  std::int64_t layer = 0;
  std::vector<double> scores;      // r [N]
  std::vector<double> predicted;   // the predictor's logits [N]; empty without one
  std::vector<std::uint8_t> kept;  // [N]: 1 where the block computed the token
};

/// A block whose MLP is one of experts.
struct ExpertTokens {
  std::int64_t layer = 0;
  std::int64_t experts = 0;           // E
  std::int64_t noops = 0;             // choices after the experts, which compute nothing
  std::vector<std::uint8_t> reached;  // [N]: 1 where the block computed the token at all
  std::vector<double> affinity;       // [E + no-ops, N]; NaN where not reached
  std::vector<std::uint8_t> taken;    // [E, N]: 1 where the expert computed the token
  std::vector<std::uint8_t> chosen;   // [E + no-ops, N]: what each token chose; empty under expert choice

  /// The experts that computed token `i`.
  std::int64_t experts_of(std::size_t i) const;
};

struct Routes {
  std::int64_t blocks = 0;
  std::int64_t seq_len = 0;
  std::vector<std::int32_t> tokens;   // N
  std::vector<RoutedTokens> routed;   // by layer
  std::vector<ExpertTokens> experts;  // by layer
  std::int64_t sequences() const {
    return (static_cast<std::int64_t>(tokens.size()) + seq_len - 1) / seq_len;
  }

  /// How deep each token went [N]: the routed blocks that computed it; in a model without such blocks, the
  /// experts that computed it, of all layers together.
  std::vector<std::int64_t> depths() const;
  /// The depth that `depths` are a share of: the number of routed blocks, or the largest depth there is.
  std::int64_t deepest() const;
};

/// UserError, about `name`, when the model routes nothing.
void require_routing(const Transformer& model, const std::string& name);

/// Runs the model over the excerpt, one sequence after the other, and keeps what its forward pass says of
/// its routing (ForwardResult). UserError: an excerpt without tokens.
Routes trace(Context& c, const Transformer& model, const Excerpt& excerpt, const SelectionRule& rule);

}  // namespace fathom::routes
