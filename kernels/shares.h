// Rows of shares: what softmax at a temperature makes of rows of logits, kept where these are, and what is
// asked of them there: a token's share, and a token that is drawn. So speculative decoding tests its
// proposals and draws without a row of numbers for the host (Backend::make_shares, ask_shares).
#pragma once

#include <cstdint>
#include <span>

#include "kernels/dtype.h"

namespace fathom {

/// What somebody wants to know of a row of shares, and what he is told.
struct ShareQuestion {
  ConstView p = {};  // fp64 [choices], as make_shares() leaves a row
  ConstView q = {};  // of another row; undefined: there is none
  /// All of the other row is this id's, in place of q; -1: there is none such.
  std::int32_t certain = -1;
  std::int32_t id = -1;  // whose share in p is wanted; -1: the drawn token's
  /// In [0, 1): a token is drawn, the one in which this part of all weights falls, these laid side by side in
  /// the order of their ids: the weights are (p - q)+, or p where there is no other row or that leaves
  /// nothing. Below 0: none.
  double uniform = -1;
  // the answers
  double share = 0;         // of `id`, or of the token
  std::int32_t token = -1;  // that was drawn
  bool finite = true;       // the row; else the others mean nothing
};

/// InternalError "[ask_shares] ...": a question that contradicts rows of `choices` shares.
void check_questions(std::span<const ShareQuestion> questions, std::int64_t choices);

/// The ops on the host, all sums and shares in fp64 from the first id to the last: what other backends are
/// held against.
void make_shares_on_host(View shares, ConstView logits, std::int64_t rows, std::int64_t vocab,
                         std::int64_t choices, double temperature);
void ask_shares_on_host(std::span<ShareQuestion> questions, std::int64_t choices);

}  // namespace fathom
