// The levels that options name over a model, and the chain that goes through them (chain.h).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

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

  bool retrieves() const { return method == Method::Triforce || method == Method::Retrieval; }
  bool drafts() const { return method == Method::Triforce || method == Method::Draft; }
};

/// Groups of a cache, in tokens of the dense layers, that a text of the target takes beside its own: what is
/// retrieved and drafted. For whoever chooses its size.
std::int64_t tokens_beside(const SpeculationOptions& options);

/// UserError: the options cannot be had for texts of up to `longest` tokens, `prompt` of which are prompts: a
/// number out of range; a draft (null: none) whose context or vocabulary is too small; a budget as large as
/// the context, or larger than the cache has room for; no routed blocks to skip, or no others.
void check_speculation(const CachedModel& target, const CachedModel* draft, const SpeculationOptions& options,
                       std::int64_t prompt, std::int64_t longest);

class LevelChain {
 public:
  /// check_speculation() has passed. All of the models, and `chance`, outlive it; null: numbers of the seed
  /// of `sampling`. `prompt`: so many tokens of the text are the prompt's.
  LevelChain(const CachedModel& target, const CachedModel* draft, const SpeculationOptions& options,
             const SamplingOptions& sampling, std::int64_t prompt, std::vector<std::int32_t> stops,
             TargetLevel::Sequence whose, Chance* chance = nullptr);
  LevelChain(const LevelChain&) = delete;
  LevelChain& operator=(const LevelChain&) = delete;

  TargetLevel& target() { return last_; }
  const TargetLevel& target() const { return last_; }
  Chain& chain() { return *chain_; }
  const Chain& chain() const { return *chain_; }

  /// How many of `most` tokens the next cycle may add, by the room that there is in the target's cache: where
  /// memory ends, the target has what the others had. 1 at least.
  std::int64_t room(std::int64_t most);
  /// Gives back what levels hold of the target's cache. False: nothing.
  bool release();
  /// Whether a level reads the queries of the target's passes.
  bool watches() const { return watches_; }

  const std::vector<std::string>& names() const { return names_; }  // from the first draft to the target
  std::int64_t gatherings(std::size_t level) const;

 private:
  void build(const CachedModel& target, const CachedModel* draft, const SpeculationOptions& options);

  RowRule rule_;
  TargetLevel last_;
  std::vector<std::unique_ptr<Level>> before_;
  std::vector<GatheredLevel*> gathered_;  // of them those in the target's cache
  std::vector<std::string> names_;
  bool watches_;
  SeededChance seeded_;
  std::unique_ptr<Pace> pace_;
  std::unique_ptr<Chain> chain_;
};

}  // namespace fathom
