// The rows that a product multiplies, brought into shared memory as the tensor core wants them
// (decode_product.cuh, decode_lines.cuh, decode_codes.cuh). Every block of threads needs all of them, whole.
//
// A norm's weights are put to the elements here, 1 / rms to the results: it is known only when the whole row
// has been seen, and to wait for it would cost all of the rows once more.
#pragma once

#include <cstdint>

#include "kernels/cuda/device/decode_attention.cuh"
#include "kernels/cuda/device/decode_codes.cuh"
#include "kernels/cuda/device/decode_lines.cuh"
#include "kernels/cuda/device/decode_state.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/reduce.cuh"

namespace fathom::cuda {

template <int kHalves, int kDim, int kBits, bool kFed>
class DecodeStage : DecodePhase {
 public:
  using DecodePhase::DecodePhase;

  /// All threads call it, and may read the rows afterwards. Before a routed layer's projection it also deals
  /// attention's entries; that, and `scales`, may be read behind the product, after another wait for each
  /// other.
  __device__ __forceinline__ void stage(const DecodePlace& p) {
    const DecodeLayer& l = state_.layer_at(p);
    const DecodeProduct product = p.product;
    if constexpr (kFed) Rows::pad(staged(), state_.matrix(product).width, s_.rows, thread_, kDecodeThreads);
    if (product == DecodeProduct::Mix) {
      if (state_.joined) {
        stage_rows(s_.mixed, s_.heads * kDim);
      } else {
        stage_pieces(l);
      }
    } else if (product == DecodeProduct::Contract) {
      stage_rows(s_.activations, s_.hidden);
    } else {
      stage_stream(product == DecodeProduct::Decide    ? l.router
                   : product == DecodeProduct::Expand  ? l.post_norm
                   : product == DecodeProduct::Project ? l.input_norm
                                                       : s_.final_norm,
                   product);
    }
    sync_workers();
    if (product == DecodeProduct::Project && l.routed >= 0 && thread_ == kDecodeThreads - 1)
      state_.deal_entries(l.routed);
    if (thread_ < s_.rows && product != DecodeProduct::Decide)
      fixed_.scales[thread_] = reciprocal_rms(thread_);
  }

  /// Attention's pieces, joined in `mixed` by all blocks of threads together: every piece is read once, and
  /// not once by each of them. Wants another wait for each other.
  __device__ __forceinline__ void join(const DecodeLayer& l) {
    const AttentionDeal& d = state_.deal(l);
    const int total = d.rows * s_.heads * kThreadsOfHead;
#pragma unroll 1
    for (int i = static_cast<int>(blockIdx.x) * kDecodeThreads + thread_; i < total;
         i += static_cast<int>(gridDim.x) * kDecodeThreads) {
      const int head = i / kThreadsOfHead, e = i % kThreadsOfHead * kJoinPack<kDim>, row = head / s_.heads;
      const std::int64_t of = static_cast<std::int64_t>(d.row[row]) * s_.heads + head % s_.heads;
      const JoinedPack<kDim> y = joined(d, row, head % s_.heads, e);
      *reinterpret_cast<JoinedPack<kDim>*>(s_.mixed + of * kDim + e) = y;
    }
  }

 private:
  static constexpr int kThreadsOfHead = kDim / kJoinPack<kDim>;
  static constexpr bool kCodes = kBits < 16;  // of a layer's products
  using Rows = StagedRows<kHalves, kFed>;     // x, where weights are numbers

  __device__ std::uint32_t* staged() const { return reinterpret_cast<std::uint32_t*>(state_.room); }

  static __device__ __forceinline__ int stride_of(int width, bool codes) {
    return codes ? StagedCodes::stride(width) : Rows::stride(width);
  }
  /// Words as of Staged and StagedCodes. `codes`: what the rows are multiplied by.
  template <typename Words>
  __device__ __forceinline__ void put(int stride, bool codes, int row, int e, Words words) const {
    if (codes) {
      StagedCodes::put(staged(), stride, row, e, words);
    } else {
      Rows::put(staged(), stride, row, e, words);
    }
  }

  /// The stream. With a norm's weights: times these, and the sums of its squares. With a router's, in a
  /// decision: as it is, and the sums of its products with these.
  __device__ __forceinline__ void stage_stream(const float* weight, DecodeProduct product) {
    const bool router = product == DecodeProduct::Decide, codes = kCodes && is_of_layer(product);
    const int stride = stride_of(s_.width, codes);
#pragma unroll 2
    for (int row = 0; row < s_.rows; ++row) {
      float sum = 0;
#pragma unroll 1
      for (int e = 8 * thread_; e < s_.width; e += 8 * kDecodeThreads) {
        const uint4 raw = stream_at(row, e);
        const float4 w[2] = {*reinterpret_cast<const float4*>(weight + e),
                             *reinterpret_cast<const float4*>(weight + e + 4)};
        std::uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = low_of(words[i]), y = high_of(words[i]);
          const float wx = i % 2 == 0 ? w[i / 2].x : w[i / 2].z, wy = i % 2 == 0 ? w[i / 2].y : w[i / 2].w;
          sum += router ? x * wx + y * wy : x * x + y * y;
          if (!router) words[i] = pack_bf16(x * wx, y * wy);
        }
        put(stride, codes, row, e, uint4{words[0], words[1], words[2], words[3]});
      }
      sum = warp_reduce(sum, Sum{});
      if (lane_ == 0) fixed_.squares[row][warp_] = sum;
    }
  }
  /// Elements e .. e+7 of a row of the stream. Until the blocks have met, that is the embedding, which the
  /// first block writes down for later phases.
  __device__ __forceinline__ uint4 stream_at(int row, int e) {
    const std::int64_t at = static_cast<std::int64_t>(row) * s_.width + e;
    if (state_.met) return __ldcg(reinterpret_cast<const uint4*>(s_.to_norm + at));
    const uint4 raw = *reinterpret_cast<const uint4*>(
        s_.embedding + static_cast<std::int64_t>(fixed_.tokens[row]) * s_.width + e);
    if (blockIdx.x == 0) {
      *reinterpret_cast<uint4*>(s_.to_norm + at) = raw;
      float* const to = s_.x + at;
      const std::uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        *reinterpret_cast<float2*>(to + 2 * i) = float2{low_of(words[i]), high_of(words[i])};
    }
    return raw;
  }
  /// Rows of bf16 as they are.
  __device__ __forceinline__ void stage_rows(const __nv_bfloat16* from, int width) {
    const int stride = stride_of(width, kCodes), packs = width / 8;
    int row = 0, e = thread_;
#pragma unroll 4
    for (int i = thread_; i < s_.rows * packs; i += kDecodeThreads) {
      while (e >= packs) e -= packs, ++row;
      const uint4 raw = __ldcg(reinterpret_cast<const uint4*>(from + static_cast<std::int64_t>(i) * 8));
      put(stride, kCodes, row, e * 8, raw);
      e += kDecodeThreads;
    }
  }
  /// Attention's pieces, joined: by every block of threads for itself. Rows that are not computed keep what
  /// was there; nobody takes their results.
  __device__ __forceinline__ void stage_pieces(const DecodeLayer& l) {
    const AttentionDeal& d = state_.deal(l);
    const int size = s_.heads * kDim, stride = stride_of(size, kCodes);
#pragma unroll 1
    for (int i = thread_; i < d.rows * s_.heads * kThreadsOfHead; i += kDecodeThreads) {
      const int head = i / kThreadsOfHead, e = i % kThreadsOfHead * kJoinPack<kDim>, row = head / s_.heads;
      const JoinedPack<kDim> y = joined(d, row, head - row * s_.heads, e);
      const int column = (head - row * s_.heads) * kDim + e;
      if constexpr (kJoinPack<kDim> == 8) {
        put(stride, kCodes, d.row[row], column, uint4{y.word[0], y.word[1], y.word[2], y.word[3]});
      } else {
        put(stride, kCodes, d.row[row], column, y.word[0]);
        put(stride, kCodes, d.row[row], column + 2, y.word[1]);
      }
    }
  }
  /// A pack of attention from element e, of a head of the computed row number i.
  __device__ __forceinline__ JoinedPack<kDim> joined(const AttentionDeal& d, int i, int head, int e) const {
    return join_pieces<kDim>(s_, static_cast<std::int64_t>(d.row[i]) * s_.heads + head, e,
                             d.pieces_of(i, head / (s_.heads / s_.kv_heads)));
  }
};

}  // namespace fathom::cuda
