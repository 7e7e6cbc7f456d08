// Lossless speculative decoding over any number of levels (Leviathan et al. 2023; over three levels TriForce:
// Sun et al. 2024, arXiv 2404.11912): each level proposes tokens to the next one, which passes over all of
// them at once and keeps those from the first on that it might have chosen itself.
//
// Of a proposal x from q, a level with p takes x with the probability min(1, p(x) / q(x)), and otherwise
// chooses from the residual, (p - q)+ scaled to 1: so what it hands on is distributed as p, at every level,
// and the text as plain decoding with the last level's p. Where a level's row is one token (Row::only), a
// proposal is taken if it is that token.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "infer/speculate/chance.h"
#include "infer/speculate/level.h"
#include "infer/speculate/pace.h"

namespace fathom {

/// What a level did so far.
struct LevelCounts {
  std::int64_t passes = 0;    // and the rows beside one a pass are those that it was proposed
  std::int64_t proposed = 0;  // to it
  std::int64_t tested = 0;    // of these, up to the first that it did not take
  std::int64_t accepted = 0;
  std::int64_t tokens = 0;    // that it handed on
  double seconds = 0;         // of passes, and of settling
  double settle_seconds = 0;  // of it
  /// Over nothing that was proposed; without the level's first pass, which is slower for what it meets first.
  std::int64_t plain_passes = 0;
  double plain_seconds = 0;
};

class Chain {
 public:
  /// Levels from the first draft to the one whose text it is; one alone decodes plainly. All arguments
  /// outlive it. Tokens of `stops` end a text: nothing is proposed or chosen behind them.
  Chain(std::vector<Level*> levels, Chance& chance, Pace& pace, std::vector<std::int32_t> stops = {});
  Chain(const Chain&) = delete;
  Chain& operator=(const Chain&) = delete;
  virtual ~Chain() = default;

  /// One pass of the last level: adds 1 to `most` tokens to the text, of which only the last may be a stop.
  /// Returns how many. The levels before are told of them when they are to propose again.
  std::int64_t cycle(std::vector<std::int32_t>& text, std::int64_t most);

  /// Tells all levels of a text, the last one first. A text that begins wants it once.
  void settle(std::span<const std::int32_t> text);

  /// Others went on with the text, or it has begun without this: the levels before the last one are told when
  /// they are to propose, and no pace learns from what that takes.
  void fell_behind() { behind_ = true, is_far_behind_ = true; }

  const std::vector<LevelCounts>& counts() const { return counts_; }
  bool stops(std::int32_t id) const;
  /// What times passes, in seconds from anywhere; default: the steady clock.
  void set_clock(std::function<double()> clock) { clock_ = std::move(clock); }

 protected:
  /// Instead of a proposal from q that was not taken. Virtual for the test that plants a bias here.
  virtual std::int32_t choose_other(Row& p, const Row& q, const Decision& d);
  std::int32_t choose(Row& p, const Decision& d);

 private:
  double settle_level(std::size_t level, std::span<const std::int32_t> text);
  void catch_up(std::span<const std::int32_t> text);
  void propose(std::int64_t level, std::vector<std::int32_t>& text, std::int64_t wanted, std::int64_t most,
               std::vector<Row>& rows);
  bool extend(std::int64_t level, std::vector<std::int32_t>& text, std::int64_t most,
              std::vector<Row>* handed_on);
  bool ask(std::int64_t level, std::span<const std::int32_t> text, std::int64_t proposed, Purpose purpose,
           std::vector<Row>& rows);
  void passed(std::int64_t level, std::int64_t proposed);
  bool look(std::int64_t level, std::span<const std::int32_t> text, std::int64_t proposed, Purpose purpose,
            std::vector<Row>& rows);
  std::int32_t draw_held(Row& p, const Row* q, const Decision& d);
  bool takes(std::int32_t id, const Row& p, const Row& q, const Decision& d);
  static double probability(const Row& row, std::int32_t id);
  static double sureness(const Row& row, std::int32_t id);

  std::vector<Level*> levels_;
  Chance& chance_;
  Pace& pace_;
  std::vector<std::int32_t> stops_;
  std::vector<LevelCounts> counts_;
  std::int64_t passes_ = 0;
  double began_ = 0;            // the pass at hand
  bool behind_ = false;         // the levels before the last one have not been told of the text,
  bool is_far_behind_ = false;  // of more than cycles brought
  std::function<double()> clock_;
};

}  // namespace fathom
