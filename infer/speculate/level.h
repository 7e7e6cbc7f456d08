// What a chain of speculative decoding is made of: models and guesses, from the cheapest to the one whose
// text is wanted.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "infer/speculate/held_rows.h"

namespace fathom {

/// What may follow a text.
struct Row {
  std::vector<double> p;      // of every id its probability; empty where the following say it all
  std::int32_t only = -1;     // the one id that is chosen here: at temperature 0, or under shared noise
  double sure = -1;           // a guess of how likely another model is to choose the same; below 0: p says it
  std::int32_t certain = -1;  // an id whose probability is 1
  /// Not null: p is row `number` of these.
  std::shared_ptr<const HeldRows> held = nullptr;
  std::size_t number = 0;
  // What a chain knows of a held row:
  double share = -1;        // the probability of the token that the text has there
  std::int32_t drawn = -1;  // a token that was drawn from it when it was first asked
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
