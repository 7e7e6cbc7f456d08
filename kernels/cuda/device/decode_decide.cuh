// Which rows go through a layer, and what their results are multiplied by. Every block of threads works it
// out for itself: that costs less than to be told.
#pragma once

#include "kernels/backend.h"
#include "kernels/cuda/device/decode_state.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/sigmoid.cuh"

namespace fathom::cuda {

class DecodeDecision : DecodePhase {
 public:
  using DecodePhase::DecodePhase;

  /// A routed layer: with the sums of the router's score in shared memory and a predictor's hidden layer, if
  /// there is one, in `predicted`. The gate is the router's in any case.
  __device__ __forceinline__ void decide(const DecodeLayer& layer) {
    const float* const hidden = state_.predicted(layer);
    if (s_.by_predictor) sum_predictor(layer, hidden);
    if (thread_ < s_.rows) {
      const float score = sum_of_warps(fixed_.squares[thread_]);
      float logit = score;
      if (s_.by_predictor) logit = sum_of_warps(fixed_.logits[thread_], layer.predictor_last[0]);
      const bool is_computed = logit > s_.row[thread_].threshold;
      fixed_.is_computed[thread_] = is_computed;
      fixed_.gates[thread_] = gate_of(score);
      if (blockIdx.x == 0) {
        s_.outcome->kept[layer.routed][thread_] = is_computed ? 1 : 0;
        if (is_computed) atomicOr(&s_.left->kept[thread_], 1ULL << layer.routed);
      }
    }
    sync_workers();
    if (thread_ == 0) {
      int n = 0;
      for (int row = 0; row < s_.rows; ++row) {
        if (fixed_.is_computed[row]) fixed_.deals[1].row[n++] = row;
      }
      fixed_.deals[1].rows = n;
    }
    sync_workers();
  }

 private:
  /// The predictor's hidden layer times its last vector.
  __device__ __forceinline__ void sum_predictor(const DecodeLayer& layer, const float* hidden) {
#pragma unroll 4
    for (int row = 0; row < s_.rows; ++row) {
      float logit = 0;
      for (int e = thread_; e < s_.predictor_hidden; e += kDecodeThreads)
        logit = fmaf(__ldcg(hidden + row * s_.predictor_hidden + e),
                     e == thread_ ? state_.predictor_weight : layer.predictor_out[e], logit);
      logit = warp_reduce(logit, Sum{});
      if (lane_ == 0) fixed_.logits[row][warp_] = logit;
    }
    sync_workers();
  }
  __device__ __forceinline__ float gate_of(float score) const {
    if (s_.gate == static_cast<int>(GateKind::Sigmoid)) return sigmoid(score);
    if (s_.gate == static_cast<int>(GateKind::Tanh)) return tanhf(score);
    return score;
  }
};

}  // namespace fathom::cuda
