// Steps of decoding that the backend does as a whole (kernels/decoder.h): what it has to know of a model and
// of a cache, and which of its tables are whose.
#pragma once

#include <cstdint>
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
  std::int32_t token = 0;     // the last one that there is
  std::int64_t position = 0;  // and its place in the text, of which the sequence may hold a part
  /// Of SamplingOptions the temperature and the seed alone: whoever has more to say reads the logits.
  double temperature = 0;
  std::uint64_t seed = 0;
  std::optional<double> threshold = {};  // of its routing; none: the rule's
};

class WholeStep {
 public:
  /// Null where the backend has none for this model. All arguments outlive it. `choices`: ids below are
  /// chosen.
  static std::unique_ptr<WholeStep> open(Context& c, const Transformer& model, const Causal& rule,
                                         KvCache& cache, std::int64_t choices, std::int64_t most_sequences);

  std::int64_t most_rows() const { return decoder_->most_rows(); }
  /// The rows' entries are in the cache afterwards. At most most_rows(); the cache fits one more row of each.
  std::vector<DecoderResult> run(std::span<const StepRow> rows);
  /// Of row i of the last step, [V].
  std::vector<float> logits(std::int64_t i);

 private:
  struct Slot {
    SequenceId sequence = -1;
    std::int64_t used = 0;            // the step that it was last part of
    std::vector<std::int64_t> known;  // by table: how many of its blocks the decoder has
  };
  WholeStep(KvCache& cache, std::unique_ptr<Decoder> decoder, double threshold, std::int64_t slots,
            std::int64_t tables, std::int64_t vocab);
  std::int64_t slot_of(SequenceId id);

  KvCache& cache_;
  std::unique_ptr<Decoder> decoder_;
  double threshold_;  // the rule's
  std::vector<Slot> slots_;
  std::int64_t tables_, vocab_;
  std::int64_t steps_ = 0;
};

}  // namespace fathom
