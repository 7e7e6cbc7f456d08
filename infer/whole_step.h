// Steps of decoding that the backend does as a whole (kernels/decoder.h): what it has to know of a model and
// of a cache, and which of its tables are whose.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "infer/kv_cache.h"
#include "infer/sampling.h"
#include "kernels/decoder.h"
#include "src/model/transformer.h"

namespace fathom {

/// One text's row of a step.
struct StepRow {
  SequenceId sequence = 0;
  std::int32_t token = 0;     // the last one that there is, unless the row follows another
  std::int64_t position = 0;  // and its place in the text, of which the sequence may hold a part
  /// Of SamplingOptions the temperature and the seed alone: whoever has more to say reads the logits.
  double temperature = 0;
  std::uint64_t seed = 0;
  std::optional<double> threshold = {};  // of its routing; none: the rule's
  /// Which row of the step under way is the same text's: its token is what that one chooses. -1: none.
  std::int32_t follows = -1;
  bool wants_share = false;  // DecoderResult::share; at temperature 0
};

class WholeStep {
 public:
  /// Null where the backend has none for this model. All arguments outlive it. `choices`: ids below are
  /// chosen.
  static std::unique_ptr<WholeStep> open(Context& c, const Transformer& model, const Causal& rule,
                                         KvCache& cache, std::int64_t choices, std::int64_t most_sequences);

  std::int64_t most_rows() const { return decoder_->most_rows(); }
  /// A step from its beginning to its end: the rows' entries are in the cache afterwards. At most
  /// most_rows(); the cache fits one more row of each. What was under way is given up.
  std::vector<DecoderResult> run(std::span<const StepRow> rows);

  // Steps ahead, so that the device does not rest while the host looks at results:

  /// Begins a step, while one other may be under way. The cache fits a row more of each, and two of one that
  /// follows another.
  void launch(std::span<const StepRow> rows);
  /// Of the earliest step under way, when it is over. The cache does not have its entries until
  /// KvCache::commit().
  std::vector<DecoderResult> wait();
  /// Rows of the earliest step under way, as they were to be: which of them is this one, with the token that
  /// was chosen for it; -1: none. For who was told another token, that is none too.
  std::int32_t find(const StepRow& row) const;
  bool is_under_way() const { return !under_way_.empty(); }
  /// Nobody wants what is under way; what it adds to the cache is written over.
  void give_up();
  /// Of row i of the step that was waited for, [V].
  std::vector<float> logits(std::int64_t i);
  /// The same where they lie, as Decoder::logits_in_place() has them.
  ConstView logits_in_place(std::int64_t i) { return decoder_->logits_in_place(i); }

 private:
  struct Slot {
    SequenceId sequence = -1;
    std::int64_t used = 0;            // the step that it was last part of
    std::vector<std::int64_t> known;  // by table: how many of its blocks the decoder has
  };
  WholeStep(KvCache& cache, std::unique_ptr<Decoder> decoder, double threshold, std::int64_t slots,
            std::int64_t tables, std::int64_t vocab);
  std::int64_t slot_of(SequenceId id);
  DecoderRow place(const StepRow& row, const std::vector<std::int32_t>& entries);

  KvCache& cache_;
  std::unique_ptr<Decoder> decoder_;
  double threshold_;  // the rule's
  std::vector<Slot> slots_;
  std::int64_t tables_, vocab_;
  std::int64_t steps_ = 0;
  std::deque<std::vector<StepRow>> under_way_;  // the earliest first
};

}  // namespace fathom
