// The target's own weights over fewer keys and values: some of the target's entries, chosen at times, and all
// of the tokens since. Keys lie in the cache as they are rotated for their true places, so a row attends over
// what is there and no more has to be known of it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "infer/speculate/target_level.h"

namespace fathom {

class GatheredLevel : public Level {
 public:
  /// `rule` of its rows. `wants_sureness`: somebody reads Row::sure, as of a draft whose pace goes by it.
  GatheredLevel(const TargetLevel& target, const Causal& rule, const RowRule& rows, bool wants_sureness);

  /// False: nothing was gathered yet, or there is no room beside what the target may still take.
  bool rows(std::span<const std::int32_t> text, std::int64_t proposed, std::vector<Row>& rows) override;
  void handed_on(std::span<const std::int32_t> text) override;
  /// Takes over what the target has of the tokens that are new, or gathers anew.
  void settle(std::span<const std::int32_t> text) override;
  /// Gives its blocks back, for as long as it does without gathering anew.
  void release();
  bool holds_blocks() const { return sequence_.exists(); }

  std::int64_t gatherings() const { return gatherings_; }

 protected:
  const CachedModel& cached() const { return m_; }
  SequenceId target() const { return target_.sequence(); }
  /// Puts what is chosen of the target's first `tokens` tokens into a new sequence. False: there is no room.
  virtual bool gather(SequenceId into, std::int64_t tokens) = 0;
  /// Tokens behind which what was gathered is to be chosen anew.
  virtual std::int64_t most_tail() const = 0;
  virtual KvCache::Layers layers() const { return KvCache::Layers::All; }
  /// Whether falling acceptance is a reason to gather, too.
  virtual bool ages() const { return false; }
  /// Groups that it leaves to the target.
  std::int64_t target_needs() const;

 private:
  void gather_anew(std::int64_t tokens);
  void judge(std::span<const std::int32_t> text);
  bool has_fallen() const;

  const TargetLevel& target_;
  CachedModel m_;
  const RowRule& rule_;
  bool wants_sureness_;
  std::unique_ptr<ShortPasses> own_passes_;  // by another rule than the target's, where nobody has them
  OwnSequence sequence_;
  bool waits_ = false;                 // there was no room: it gathers when it would anyhow
  std::int64_t base_ = 0;              // tokens that the sequence has for the text's first settled_ ones
  std::int64_t settled_ = 0;           // tokens of the text that the target has computed
  std::int64_t gathered_ = 0;          // of them, how many there were at the last gathering
  std::vector<std::int32_t> drafted_;  // tokens behind them that this level has computed itself
  std::vector<std::int32_t> offered_;  // behind settled_, with what it last proposed
  std::int64_t gatherings_ = 0;
  double fresh_ = 0, recent_ = 0;  // share of its tokens that stayed: soon after a gathering, and now
  std::int64_t judged_ = 0;        // tokens since then
};

/// TriForce's middle: of each layer and key/value head the first chunk, the latest, and those whose mean key
/// suits the target's newest query best, up to a budget. A layer that has no more entries is taken whole.
class RetrievalLevel final : public GatheredLevel {
 public:
  struct Options {
    std::int64_t budget = 4096;  // entries, at least 4 chunks
    std::int64_t chunk = 8;
  };
  RetrievalLevel(const TargetLevel& target, const RowRule& rows, bool wants_sureness, const Options& options);

 protected:
  bool gather(SequenceId into, std::int64_t tokens) override;
  std::int64_t most_tail() const override;
  bool ages() const override { return true; }

 private:
  KvCache::Chosen choose(std::int64_t layer, std::int64_t entries) const;
  Options options_;
};

/// Which places a streaming window (StreamingLLM: Xiao et al. 2023) keeps: the first ones and the latest.
struct Window {
  std::int64_t sinks = 16;
  std::int64_t recent = 256;  // and up to as many more, before the window moves
};

/// The target as its own draft: routed blocks are skipped, and the dense ones see a window.
class SelfSkipLevel final : public GatheredLevel {
 public:
  SelfSkipLevel(const TargetLevel& target, const RowRule& rows, bool wants_sureness, const Window& window);

 protected:
  bool gather(SequenceId into, std::int64_t tokens) override;
  std::int64_t most_tail() const override { return window_.recent; }
  KvCache::Layers layers() const override { return KvCache::Layers::Dense; }

 private:
  Window window_;
};

}  // namespace fathom
