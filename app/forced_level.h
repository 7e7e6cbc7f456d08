// A level that computes as it does, and takes proposals by chance.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "infer/speculate/level.h"
#include "src/core/splitmix64.h"

namespace fathom::app {

class ForcedLevel final : public Level {
 public:
  /// `acceptance`: the probability with which it takes what it is proposed. The tokens that it chooses are
  /// any of `vocab`.
  ForcedLevel(Level& level, double acceptance, std::int64_t vocab, std::uint64_t seed)
      : level_(level), acceptance_(acceptance), vocab_(vocab), random_(seed) {}

  bool rows(std::span<const std::int32_t> text, std::int64_t proposed, std::vector<Row>& rows) override {
    if (!level_.rows(text, proposed, rows)) return false;
    if (rows.front().held != nullptr) ask(rows, text);
    const std::size_t first = text.size() - static_cast<std::size_t>(proposed);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      auto id = static_cast<std::int32_t>(random_.below(static_cast<std::size_t>(vocab_)));
      if (first + i < text.size()) {
        const std::int32_t other = text[first + i];
        const bool takes = static_cast<double>(random_.next() >> 11) * 0x1p-53 < acceptance_;
        if (takes) id = other;
        if (!takes && id == other) id = static_cast<std::int32_t>((other + 1) % vocab_);
      }
      rows[i] = Row{.p = {}, .only = id, .sure = 1};
    }
    return true;
  }
  void handed_on(std::span<const std::int32_t> text) override { level_.handed_on(text); }
  void settle(std::span<const std::int32_t> text) override { level_.settle(text); }

 private:
  /// What a chain asks of rows that lie elsewhere, for the time that it takes: their shares of what is
  /// proposed, and a token of what one row leaves of another; of a row alone a token.
  static void ask(const std::vector<Row>& rows, std::span<const std::int32_t> text) {
    const std::size_t proposed = rows.size() - 1;
    std::vector<ShareQuestion> questions(rows.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
      questions[i].p = rows[i].held->row(rows[i].number);
      if (i < proposed) questions[i].id = text[text.size() - proposed + i];
    }
    if (proposed == 0) questions[0].uniform = 0.5;
    rows.front().held->ask(questions);
    if (proposed == 0) return;
    ShareQuestion other;
    other.p = questions.back().p;
    other.q = questions.front().p;
    other.uniform = 0.5;
    rows.front().held->ask({&other, 1});
  }

  Level& level_;
  double acceptance_;
  std::int64_t vocab_;
  SplitMix64 random_;
};

}  // namespace fathom::app
