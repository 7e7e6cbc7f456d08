// How many proposals a level gets: fixed, or what pays by the acceptance and the costs that were measured.
//
// A pace may look at all that happened before, proposals that were dropped included, and at nothing that is
// still to be drawn: so the text's distribution does not depend on it.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace fathom {

/// What a chain tells a pace, and asks it. Levels count from 0, the first draft.
class Pace {
 public:
  virtual ~Pace() = default;
  /// How many proposals of level - 1 the level's next pass is to be over, at most.
  virtual std::int64_t proposals(std::int64_t level) = 0;
  /// After n of them, the last of which had the probability `sure` where it came from: whether one more pays.
  virtual bool one_more(std::int64_t level, std::int64_t n, double sure) = 0;
  /// A proposal with that probability was tested by the level.
  virtual void tested(std::int64_t level, double sure, bool accepted) = 0;
  /// A pass of the level over n proposals, beside the row behind them.
  virtual void passed(std::int64_t level, std::int64_t n, double seconds) = 0;
  /// So long the levels before the last one took, before they propose, to take over what the text has become:
  /// plain passes do without.
  virtual void settled(double seconds) { (void)seconds; }
};

class FixedPace final : public Pace {
 public:
  /// By level, from the second on. The first `plain` passes of the last level get none: they show what such a
  /// one costs.
  explicit FixedPace(std::vector<std::int64_t> proposals, std::int64_t plain = 0)
      : proposals_(std::move(proposals)), plain_(plain) {}
  std::int64_t proposals(std::int64_t level) override {
    if (level == static_cast<std::int64_t>(proposals_.size()) && plain_ > 0) return --plain_, 0;
    return proposals_.at(static_cast<std::size_t>(level - 1));
  }
  bool one_more(std::int64_t, std::int64_t, double) override { return true; }
  void tested(std::int64_t, double, bool) override {}
  void passed(std::int64_t, std::int64_t, double) override {}

 private:
  std::vector<std::int64_t> proposals_;
  std::int64_t plain_;
};

/// Plain passes of the last level at the beginning, by which others are measured.
inline constexpr std::int64_t kPlainFirst = 4;

/// A level's tokens cost (what its proposals cost + its pass) / (tokens that come of it), which is least at
/// some number of proposals; for the last level that may be 0: then the text goes on plainly, and every so
/// often a few proposals are tried again. Within that number, one more has to bring what it costs at this
/// rate, by how sure its forerunners were (so SpecDec++, Huang et al. 2024, whose threshold is this with
/// costs that are guessed).
class AdaptivePace final : public Pace {
 public:
  struct Limits {
    std::int64_t levels = 2;
    std::int64_t most = 12;         // proposals for the last level
    std::int64_t most_between = 4;  // for a level between
  };
  explicit AdaptivePace(const Limits& limits);

  std::int64_t proposals(std::int64_t level) override;
  bool one_more(std::int64_t level, std::int64_t n, double sure) override;
  void tested(std::int64_t level, double sure, bool accepted) override;
  void passed(std::int64_t level, std::int64_t n, double seconds) override;
  void settled(double seconds) override;

  /// Whether the last level goes on plainly, as proposals would lose.
  bool is_off() const { return off_; }

 private:
  static constexpr std::size_t kBins = 8;  // of how sure a proposal was
  /// A mean that forgets, with a guess to begin with.
  struct Mean {
    double sum = 0, weight = 0;
    void add(double x, double forget) {
      sum = sum * forget + x;
      weight = weight * forget + 1;
    }
    double value() const { return weight > 0 ? sum / weight : 0; }
  };
  /// Seconds of passes over proposals, as a line over their number: on a GPU the first one costs more than
  /// those that follow, as a step of one launch has to give way to a pass.
  struct Line {
    double weight = 0, n = 0, nn = 0, seconds = 0, n_seconds = 0;
    void add(double proposals, double s, double forget);
    double slope(double single) const;
    double at(double proposals, double single) const;
  };
  struct Of {  // a level
    std::array<Mean, kBins> by_sureness;
    Mean accepted;
    Mean single;  // seconds of a pass over nothing that was proposed
    Line several;
    bool began = false;   // its first pass is over, which is slower than others
    double rate = 0;      // tokens a second, at its best number of proposals
    double all_pass = 1;  // of the proposals at hand
    double next_cost = 0;
    bool tries = false;  // at the beginning: all proposals are made, to see what they do
    std::int64_t plain_in_a_row = 0;
  };
  struct Best {
    std::int64_t n = 0;
    double seconds = 0;  // a token
  };

  static std::size_t bin_of(double sure);
  double acceptance(const Of& o) const;
  Best best(std::int64_t level) const;
  Of& at(std::int64_t level) { return levels_.at(static_cast<std::size_t>(level)); }
  const Of& at(std::int64_t level) const { return levels_.at(static_cast<std::size_t>(level)); }

  Limits limits_;
  std::vector<Of> levels_;
  Mean settling_;  // seconds, of a cycle with proposals
  std::int64_t cycles_ = 0, tries_ = 0;
  bool off_ = false;
};

}  // namespace fathom
