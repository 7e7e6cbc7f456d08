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

/// A draft that is a model of its own, and a cache of its windows.
class DraftModel {
 public:
  /// What stands around it: the model that it drafts for, and how the caches are laid out.
  struct Setting {
    const LoadedModel& target;
    const Tokenizer* tokenizer;        // null: ids alone
    std::shared_ptr<Backend> backend;  // the target's, which the draft computes by, too
    std::string precision;
    std::int64_t block = 64;
    std::int64_t chunk = 0;  // rows of a pass
    std::int64_t texts = 1;  // at the same time
  };
  /// UserError: no such model, or one of another tokenizer.
  DraftModel(const SpeculationFlags& flags, const Setting& setting);

  const CachedModel& cached() const { return *cached_; }

 private:
  TrainedModel trained_;
  Causal rule_;
  std::optional<KvCache> cache_;
  std::unique_ptr<WholeStep> whole_;
  std::unique_ptr<ShortPasses> passes_;
  std::optional<CachedModel> cached_;
};

/// Whether the options want a DraftModel.
bool wants_model(const SpeculationOptions& options);

class SpeculationRoom {
 public:
  /// Opens the draft, and takes the memory. All arguments outlive it. UserError: no such draft, or one of
  /// another tokenizer.
  SpeculationRoom(const SpeculationFlags& flags, const SpeculativeText& text);

  const SpeculationOptions& options() const { return options_; }
  const CachedModel& target() const { return *target_; }
  /// Null: the draft is no model of its own.
  const CachedModel* draft() const { return draft_ ? &draft_->cached() : nullptr; }

 private:
  SpeculationOptions options_;
  std::optional<DraftModel> draft_;
  std::optional<KvCache> cache_;
  std::unique_ptr<WholeStep> whole_;
  std::unique_ptr<ShortPasses> passes_;
  std::optional<CachedModel> target_;
};

/// Steps of one launch for the sequences of so many texts. Null: there are none, or no memory for them.
std::unique_ptr<WholeStep> open_steps(Context& c, const Transformer& model, const Causal& rule,
                                      KvCache& cache, std::int64_t vocab, std::int64_t texts = 1);

/// Bytes that speculation of so many texts takes beside them in the model's cache.
std::int64_t bytes_beside(const Context& c, const Transformer& model, const SpeculationOptions& options,
                          std::int64_t block, std::int64_t texts);

/// A cache for a draft's window, before it moves and after.
KvCacheOptions window_cache(const Context& c, const Transformer& model, const Window& window,
                            std::int64_t block);

}  // namespace fathom::app
