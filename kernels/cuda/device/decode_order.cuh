// The order in which a decoding step multiplies by its matrices, for those who multiply and for those who
// bring the weights ahead of them (decode_feed.cuh).
#pragma once

#include "kernels/cuda/decode_step.h"

namespace fathom::cuda {

/// The products of a step, in the order in which a layer has them.
enum class DecodeProduct : int { Decide, Project, Mix, Expand, Contract, Head };
inline constexpr int kDecodeProducts = 6;

/// Whether a product is one of those that may be by codes.
__device__ __forceinline__ bool is_of_layer(DecodeProduct p) {
  return p != DecodeProduct::Decide && p != DecodeProduct::Head;
}

/// Where a step is. Behind the last layer there is the head, as a product of layer number `depth`.
struct DecodePlace {
  DecodeProduct product;
  int layer;

  __device__ __forceinline__ bool operator==(const DecodePlace& o) const {
    return product == o.product && layer == o.layer;
  }
};

struct DecodeOrder {
  const DecodeStep& s;
  const DecodeLayer* layers;

  __device__ __forceinline__ DecodePlace first_of(int layer) const {
    if (layer == s.depth) return {DecodeProduct::Head, layer};
    return {layers[layer].routed >= 0 ? DecodeProduct::Decide : DecodeProduct::Project, layer};
  }
  /// Without a predictor a decision is each block of threads' own.
  __device__ __forceinline__ bool has_product(const DecodePlace& p) const {
    return p.product != DecodeProduct::Decide || s.by_predictor != 0;
  }
  /// Behind a decision a guess: a few rows most likely pass a routed layer by; of many, one goes through it.
  __device__ __forceinline__ DecodePlace expected_after(const DecodePlace& p) const {
    constexpr int kFew = 4;
    if (p.product == DecodeProduct::Decide) return after_decision(p.layer, s.rows > kFew);
    if (p.product == DecodeProduct::Contract) return first_of(p.layer + 1);
    return {static_cast<DecodeProduct>(static_cast<int>(p.product) + 1), p.layer};
  }
  /// `is_computed`: a row goes through the layer.
  __device__ __forceinline__ DecodePlace after_decision(int layer, bool is_computed) const {
    return is_computed ? DecodePlace{DecodeProduct::Project, layer} : first_of(layer + 1);
  }
  __device__ __forceinline__ const void* weights_of(const DecodePlace& p) const {
    if (p.product == DecodeProduct::Head) return s.head;
    const DecodeLayer& l = layers[p.layer];
    switch (p.product) {
      case DecodeProduct::Decide:
        return l.predictor_in;
      case DecodeProduct::Project:
        return l.qkv;
      case DecodeProduct::Mix:
        return l.out;
      case DecodeProduct::Expand:
        return l.gate_up;
      default:
        return l.down;
    }
  }
};

}  // namespace fathom::cuda
