// AdamW (Loshchilov & Hutter 2019) over the parameters' flat arenas, and clipping by the global norm.
#pragma once

#include "src/model/checkpoint.h"
#include "train/shards.h"

namespace fathom {

class AdamW {
 public:
  /// One rank's.
  AdamW(Context& c, const ParameterSet& parameters, const TrainConfig& config);
  /// One of several ranks: it has the moments of its own parts, and updates these.
  AdamW(Context& c, const TrainConfig& config, Shards shards);

  /// Norms of the gradients. The predictors are apart: they are clipped on their own, so that a model trained
  /// with predictors is bit-equal to one trained without.
  struct Norms {
    double model = 0;
    double predictor = 0;
  };
  static Norms norms(Context& c, const ParameterSet& parameters);
  /// The same without waiting for the device: the groups' sums of squares, into stat [kParameterGroups].
  static void record_norms(Context& c, const ParameterSet& parameters, const Tensor& squares);
  static Norms norms_of(const double* squares);
  /// Of this rank's own parts alone: the ranks' sums are those of record_norms.
  void record_own_norms(Context& c, const ParameterSet& parameters, const Tensor& squares);

  /// One update, number `step` (from 1), at rate `lr`, with each norm clipped to train.grad_clip.
  void update(Context& c, ParameterSet& parameters, const Norms& norms, double lr, std::int64_t step);

  /// The same in two parts, between which the device judges the step (Backend::judge_step). The first gives
  /// it the step's numbers, the second, which may be captured, goes by what is in numbers() when it runs.
  void prepare(Context& c, double lr, std::int64_t step);
  void record_update(Context& c, ParameterSet& parameters);
  /// UpdateNumbers of each group, fp64 [kParameterGroups * kUpdateNumbers].
  const Tensor& numbers() const { return numbers_; }

  /// Of this rank's own parts, one behind the other (Shards::Bucket::moments).
  OptimizerState& state() { return state_; }
  const Shards& shards() const { return shards_; }

 private:
  void set_numbers(Context& c, double lr, std::int64_t step, const double (&scales)[kParameterGroups]);

  Shards shards_;
  OptimizerState state_;
  Tensor numbers_;
  Tensor squares_;  // by bucket, where there are others' too
  TrainConfig config_;
};

/// Before the first micro-batch of a step: every gradient begins anew. The matrices' are overwritten by the
/// first product that gives them something, so their memory is not touched here.
void begin_gradients(Context& c, const ParameterSet& parameters);
/// After the last one: gradients that nothing reached are zero, of the parameters from `from` of the arenas
/// on.
void settle_gradients(Context& c, const ParameterSet& parameters, std::int64_t from = 0);

}  // namespace fathom
