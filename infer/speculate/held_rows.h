// Rows of probabilities that stay where a pass left its logits: on a GPU a row is the most of what would come
// to the host, which wants to know a number or two of it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "src/autograd/context.h"

namespace fathom {

class HeldRows {
 public:
  /// softmax(logits / temperature) over the first `choices` ids of each row of logits [rows, vocab]. A row
  /// that is not finite says so to whoever asks.
  HeldRows(Context& c, ConstView logits, std::int64_t vocab, std::int64_t choices, double temperature);

  ConstView row(std::size_t i) const;
  std::int64_t choices() const { return shares_.dim(1); }
  /// Row i on the host, [choices].
  std::vector<double> on_host(std::size_t i) const;
  /// Questions about rows of this backend, each [choices].
  void ask(std::span<ShareQuestion> questions) const { backend_.ask_shares(questions, choices()); }
  /// Whether both are rows of the same device and of as many ids, so that one can be taken off the other.
  bool goes_with(const HeldRows& other) const {
    return &backend_ == &other.backend_ && choices() == other.choices();
  }

 private:
  Backend& backend_;
  Tensor shares_;  // fp64 [rows, choices]
};

}  // namespace fathom
