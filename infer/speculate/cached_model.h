// A model and a cache of its keys and values, in which speculative decoding keeps its sequences.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "infer/kv_cache.h"
#include "infer/pass_counts.h"
#include "infer/speculate/held_rows.h"
#include "infer/speculate/short_passes.h"
#include "infer/whole_step.h"
#include "src/model/transformer.h"

namespace fathom {

/// What somebody wants to know of a pass's rows. Where it is not the logits these stay on the device, if that
/// can say the rest: they are the most of what a pass would bring to the host.
enum class Wanted : std::uint8_t {
  Logits,
  Likeliest,          // the most likely id, of equal ones the lowest
  LikeliestAndShare,  // and its probability
  Shares              // all probabilities at a temperature, which stay where they are as well
};

struct WantedRows {
  Wanted what = Wanted::Logits;
  double temperature = 1;                                              // of the shares
  WantedRows(Wanted of, double at = 1) : what(of), temperature(at) {}  // NOLINT: mostly that is all of it
};

/// What it is told.
struct PassRows {
  struct Choice {
    std::int32_t id = 0;
    double share = 1;  // where it was wanted
  };
  std::vector<float> logits;    // [rows * vocab]; none where there are
  std::vector<Choice> choices;  // by row
  std::shared_ptr<const HeldRows> shares;
};

struct CachedModel {
  Context& c;
  const Transformer& model;
  Causal rule;
  KvCache& cache;
  std::int64_t vocab = 0;     // ids below are chosen
  std::int64_t max_rows = 0;  // of a pass
  /// Not null: steps over one row at a time (whole_step.h); made for this model and cache, and for the rule's
  /// threshold.
  WholeStep* whole = nullptr;
  PassCounts* counts = nullptr;  // not null: counts what passes compute
  /// Not null: passes over a few rows whose logits are wanted; made for this model, rule and cache.
  ShortPasses* passes = nullptr;
  ShortPasses* skipping = nullptr;  // likewise, without the routed blocks

  /// Adds tokens to a sequence, the first of them at `position` of its text, in passes of at most max_rows,
  /// and of fewer where the cache is nearly full.
  /// Of the last `wanted` rows what is wanted, or the logits, where the backend does not choose or keeps no
  /// rows, or one that it would choose from is not finite. UserError: the cache has no room for them.
  PassRows add(SequenceId sequence, std::span<const std::int32_t> tokens, std::int64_t position,
               std::int64_t wanted, WantedRows what = Wanted::Logits) const;

 private:
  PassRows add_whole(SequenceId sequence, std::int32_t token, std::int64_t position,
                     const WantedRows& rows) const;
  PassRows tell(const Tensor& logits, const WantedRows& what) const;
  std::int64_t rows_that_fit(SequenceId sequence, std::int64_t rows, std::int64_t divisible) const;
};

/// A sequence of a cache, which goes with it.
class OwnSequence {
 public:
  OwnSequence() = default;
  explicit OwnSequence(KvCache& cache) : cache_(&cache), id_(cache.add()) {}
  ~OwnSequence() { release(); }
  OwnSequence(OwnSequence&& other) noexcept
      : cache_(std::exchange(other.cache_, nullptr)), id_(std::exchange(other.id_, -1)) {}
  OwnSequence& operator=(OwnSequence&& other) noexcept {
    if (this != &other) {
      release();
      cache_ = std::exchange(other.cache_, nullptr);
      id_ = std::exchange(other.id_, -1);
    }
    return *this;
  }
  OwnSequence(const OwnSequence&) = delete;
  OwnSequence& operator=(const OwnSequence&) = delete;

  void release() {
    if (cache_ != nullptr) cache_->remove(id_);
    cache_ = nullptr;
    id_ = -1;
  }
  bool exists() const { return cache_ != nullptr; }
  SequenceId id() const { return id_; }

 private:
  KvCache* cache_ = nullptr;
  SequenceId id_ = -1;
};

/// How many tokens two texts have in common, from the first on.
std::size_t common_prefix(std::span<const std::int32_t> a, std::span<const std::int32_t> b);

}  // namespace fathom
