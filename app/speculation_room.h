// What a text by speculative decoding works on: caches, the draft if it is a model, and steps of one launch
// where the backend has them.
#pragma once

#include <memory>
#include <optional>

#include "app/speculation.h"

namespace fathom::app {

/// What the flags ask for, of a model. UsageError: a draft that it cannot be.
SpeculationOptions speculation_options(const SpeculationFlags& flags, const Transformer& model);

/// What proposes first: self-skip, ngram or --draft's model; empty: no draft.
std::string draft_name(const SpeculationOptions& options, const SpeculationFlags& flags);

class SpeculationRoom {
 public:
  /// Opens the draft, and takes the memory. All arguments outlive it. UserError: no such draft, or one of
  /// another tokenizer.
  SpeculationRoom(const SpeculationFlags& flags, const SpeculativeText& text, const Globals& globals);

  const SpeculationOptions& options() const { return options_; }
  const CachedModel& target() const { return *target_; }
  /// Null: the draft is no model of its own.
  const CachedModel* draft() const { return draft_ ? &*draft_->cached : nullptr; }

 private:
  /// A draft that is a model, and its cache.
  struct SmallModel {
    SmallModel(const SpeculationFlags& flags, const SpeculativeText& text, std::int64_t chunk,
               const Globals& globals);

    TrainedModel trained;
    Causal rule;
    std::optional<KvCache> cache;
    std::unique_ptr<WholeStep> whole;
    std::unique_ptr<ShortPasses> passes;
    std::optional<CachedModel> cached;
  };

  SpeculationOptions options_;
  std::optional<SmallModel> draft_;
  std::optional<KvCache> cache_;
  std::unique_ptr<WholeStep> whole_;
  std::unique_ptr<ShortPasses> passes_;
  std::optional<CachedModel> target_;
};

/// Steps of one launch for the sequences of one text. Null: there are none, or no memory for them.
std::unique_ptr<WholeStep> open_steps(Context& c, const Transformer& model, const Causal& rule,
                                      KvCache& cache, std::int64_t vocab);

/// A cache for a draft's window, before it moves and after.
KvCacheOptions window_cache(const Context& c, const Transformer& model, const Window& window,
                            std::int64_t block);

}  // namespace fathom::app
