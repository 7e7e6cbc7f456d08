// One text, by speculative decoding: the levels that an option names, and a chain over them (chain.h). Its
// tokens are distributed as plain decoding's; at temperature 0, and under shared noise, they are the target's
// whatever the draft, in the row-invariant mode to the bit.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "infer/engine.h"
#include "infer/speculate/chain.h"
#include "infer/speculate/gathered_level.h"
#include "infer/speculate/window_level.h"

namespace fathom {

struct SpeculationOptions {
  enum class Method : std::uint8_t {
    Triforce,   // the draft, then the target over retrieved entries, then the target
    Retrieval,  // without the draft
    Draft,      // without what is between
    Ngram,      // what followed the same tokens before
    Plain       // nothing: to compare with
  } method = Method::Triforce;
  enum class Draft : std::uint8_t { Model, SelfSkip, Ngram } draft = Draft::Ngram;
  RetrievalLevel::Options retrieval;
  Window window;
  std::int64_t proposals = 0;              // for the target: 1 to 16; 0: as many as pay, by measure
  std::int64_t proposals_between = 1;      // for the level between: 1 to 8; not read where `proposals` is 0
  std::int64_t plain_first = kPlainFirst;  // passes without proposals, likewise, by which speed is measured
  RowRule::Tokens tokens = RowRule::Tokens::Drawn;
};

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
  /// for; its ids are the target's. UserError: what check_request() says; a draft whose context or vocabulary
  /// is too small; a budget as large as the context, or larger than the cache has room for; no routed blocks
  /// to skip, or no others. `chance`: who draws, instead of numbers of the request's seed.
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
  const ExpertCounts& experts() const { return experts_; }
  SpeculationReport report() const;

 private:
  CachedModel& counted();
  void check(const CachedModel* draft) const;
  void build(const CachedModel* draft);
  std::unique_ptr<Pace> make_pace() const;
  std::int64_t room();

  ExpertCounts experts_;
  CachedModel target_;
  SpeculationOptions options_;
  Request request_;
  std::vector<std::int32_t> ids_;
  RowRule rule_;
  TargetLevel last_;
  std::vector<std::unique_ptr<Level>> before_;
  std::vector<GatheredLevel*> gathered_;  // of them those in the target's cache
  std::vector<std::string> names_;
  SeededChance seeded_;
  std::unique_ptr<Pace> pace_;
  std::unique_ptr<Chain> chain_;
  bool begun_ = false;
  double seconds_ = 0;
  std::int64_t behind_the_end_ = 0;  // tokens that were chosen, and left out
};

/// Groups of a cache, in tokens of the dense layers, that a text of the target takes beside its own: what is
/// retrieved and drafted. For whoever chooses its size.
std::int64_t tokens_beside(const SpeculationOptions& options);

}  // namespace fathom
