// What a chain of speculative decoding is made of: models and guesses, from the cheapest to the one whose
// text is wanted.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fathom {

/// What may follow a text.
struct Row {
  std::vector<double> p;   // of every id its probability; empty where `only` says it all
  std::int32_t only = -1;  // the one id that is chosen here: at temperature 0, or under shared noise
  double sure = -1;        // a guess of how likely another model is to choose the same; below 0: p says it
};

class Level {
 public:
  virtual ~Level() = default;
  /// What follows the first text.size() - proposed + i tokens, for i = 0 .. proposed: proposed + 1 rows. The
  /// text may differ from the last call's behind what settle() was told of. False: it has nothing to say, and
  /// `rows` are nothing; the last level always has.
  virtual bool rows(std::span<const std::int32_t> text, std::int64_t proposed, std::vector<Row>& rows) = 0;
  /// The text, with what this level proposed to the next one at its end: all of a pass.
  virtual void handed_on(std::span<const std::int32_t> text) { (void)text; }
  /// The text that is now there for good; levels behind this one were told before. Rows of later calls may be
  /// others than those of earlier ones.
  virtual void settle(std::span<const std::int32_t> text) { (void)text; }
};

}  // namespace fathom
