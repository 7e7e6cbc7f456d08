// AdamW (Loshchilov & Hutter 2019) over the parameters' flat arenas, and clipping by the global norm.
#pragma once

#include "src/model/checkpoint.h"

namespace fathom {

class AdamW {
 public:
  AdamW(Context& c, const ParameterSet& parameters, const TrainConfig& config);

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

  /// One update, number `step` (from 1), at rate `lr`, with each norm clipped to train.grad_clip.
  void update(Context& c, ParameterSet& parameters, const Norms& norms, double lr, std::int64_t step);

  /// The same in two parts, between which the device judges the step (Backend::judge_step). The first gives
  /// it the step's numbers, the second, which may be captured, goes by what is in numbers() when it runs.
  void prepare(Context& c, double lr, std::int64_t step);
  void record_update(Context& c, ParameterSet& parameters);
  /// UpdateNumbers of each group, fp64 [kParameterGroups * kUpdateNumbers].
  const Tensor& numbers() const { return numbers_; }

  OptimizerState& state() { return state_; }

 private:
  void set_numbers(Context& c, double lr, std::int64_t step, const double (&scales)[kParameterGroups]);

  OptimizerState state_;
  Tensor numbers_;
  TrainConfig config_;
};

/// Before the first micro-batch of a step: every gradient begins anew. The matrices' are overwritten by the
/// first product that gives them something, so their memory is not touched here.
void begin_gradients(Context& c, const ParameterSet& parameters);
/// After the last one: gradients that nothing reached are zero.
void settle_gradients(Context& c, const ParameterSet& parameters);

}  // namespace fathom
