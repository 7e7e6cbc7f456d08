// One text, by speculative decoding: the levels that an option names, and a chain over them. Its
// tokens are distributed as plain decoding's; at temperature 0, and under shared noise, they are the target's
// whatever the draft, in the row-invariant mode to the bit.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "infer/engine.h"
#include "infer/speculate/level_chain.h"

namespace fathom {

/// What a level of a run was, and did.
struct LevelReport {
  std::string name;
  LevelCounts counts;
  std::int64_t gatherings = 0;
};

struct SpeculationReport {
  std::vector<LevelReport> levels;  // from the first draft to the target
  double seconds = 0;               // of all cycles; the prompt's passes do not count
  std::int64_t tokens = 0;          // that were chosen, a stop token included, those behind the end not
  /// Against passes of the target over nothing that was proposed: tokens * their mean seconds / seconds; 0:
  /// unknown.
  double speedup() const;
  double tokens_a_pass() const;  // of the target
};

class Speculation {
 public:
  /// All arguments outlive it; the caches are given back with it. `draft`: a small model, where one is asked
  /// for; its ids are the target's. UserError: what check_request() and check_speculation() say; the request
  /// wants log-probabilities. `chance`: who draws, instead of numbers of the request's seed.
  Speculation(const CachedModel& target, const CachedModel* draft, const SpeculationOptions& options,
              Request request, Chance* chance = nullptr);

  struct Step {
    std::vector<std::int32_t> tokens;  // at least one, but where a stop token came first
    Finish finish = Finish::None;
  };
  /// A cycle; the first one reads the prompt before. UserError: the cache is full, or logits are not finite;
  /// then the text is at its end.
  Step step();

  /// The text ends with so many of the new tokens, those behind a stop text left out: they count no more.
  void end(std::int64_t tokens);

  /// By routed layer the share of the text's tokens that it computed.
  std::vector<double> routed_fraction() const;
  /// Of all passes of the model, proposals that were not taken included.
  const ExpertCounts& experts() const { return counts_.experts; }
  SpeculationReport report() const;

 private:
  CachedModel& counted();
  void check(const CachedModel* draft) const;

  PassCounts counts_;
  CachedModel target_;
  SpeculationOptions options_;
  Request request_;
  std::vector<std::int32_t> ids_;
  std::unique_ptr<LevelChain> levels_;
  bool begun_ = false;
  double seconds_ = 0;
  std::int64_t behind_the_end_ = 0;  // tokens that were chosen, and left out
};

}  // namespace fathom
