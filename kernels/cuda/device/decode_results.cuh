// A product of a decoding step, and what becomes of its results: the warps' sums are added up, and what the
// layer does with one element of them is done at once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/device/decode_codes.cuh"
#include "kernels/cuda/device/decode_lines.cuh"
#include "kernels/cuda/device/decode_state.cuh"

namespace fathom::cuda {

template <int kHalves, int kDim, int kBits, bool kFed>
class DecodeResults : DecodePhase {
 public:
  using DecodePhase::DecodePhase;

  /// The product at a place, of the open matrix and the staged rows. Those who have results arrive; behind
  /// the head nobody does yet, since it is the candidates that are waited for.
  template <typename Stream>
  __device__ __forceinline__ void multiply_numbers(const DecodePlace& p, Stream& stream) {
    const Matrix& m = state_.matrix(p.product);
    const int rows = s_.rows, tiles = m.tiles;
    float* const sums = reinterpret_cast<float*>(
        state_.room +
        rounded_shared(static_cast<std::size_t>(StagedRows<kHalves, kFed>::bytes(m.width, rows))));
    const bool is_head = p.product == DecodeProduct::Head;
    const auto* const staged = reinterpret_cast<const std::uint32_t*>(state_.room);
    // The head has more tiles than there is room for sums. As many at a time as gate and up have, whose rows
    // x are as wide.
    const int at_once = is_head ? max(1, state_.matrix(DecodeProduct::Expand).tiles) : tiles;
    load_ahead(p, m, min(at_once, tiles));
    int from = 0;
#pragma unroll 1
    do {
      const int end = min(from + at_once, tiles);
      if constexpr (kFed) {
        stream.run(m, staged, rows, end - from, sums);
      } else {
        stream.template run<kHalves>(m, staged, rows, from, end, [&](int tile, const float(&c)[4]) {
          const int g = lane_ / 4, column = lane_ % 4 * 2;
#pragma unroll
          for (int h = 0; h < kHalves; ++h) {
            const int row = g + 8 * h;
            if (row >= rows) continue;
            float* const to = sums + (((tile - from) * kDecodeWarps + warp_) * rows + row) * 8 + column;
            *reinterpret_cast<float2*>(to) = float2{c[2 * h], c[2 * h + 1]};
          }
        });
      }
      take_sums(p, m, from, end - from, sums);
      if (is_head) sync_workers();
      from = end;
    } while (from < tiles);
  }
  /// The same for a product by codes. The head is none.
  template <int kRing>
  __device__ __forceinline__ void multiply(const DecodePlace& p, CodeStream<kRing>& stream) {
    const Matrix& m = state_.matrix(p.product);
    const int rows = s_.rows, g = lane_ / 4;
    float* const sums = reinterpret_cast<float*>(
        state_.room + rounded_shared(static_cast<std::size_t>(StagedCodes::bytes(m.width, rows))));
    state_.stream_before = state_.branch_before = 0;
    load_ahead(p, m, m.tiles);
    load_row_scales(p, m);
    const auto* const staged = reinterpret_cast<const std::uint32_t*>(state_.room);
    stream.template run<kHalves>(m, staged, rows, [&](int tile, const float(&c)[kHalves][4]) {
      float* const to = sums + (tile * kDecodeWarps + warp_) * rows * 8 + g;
      const int next_tile = kDecodeWarps * rows * 8;
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = 8 * h + lane_ % 4 * 2 + e;
          if (row >= rows) continue;
          to[row * 8] = c[h][e];
          if (tile + 1 < m.tiles) to[next_tile + row * 8] = c[h][2 + e];
        }
      }
    });
    take_sums(p, m, 0, m.tiles, sums);
  }

 private:
  /// The `parts` sums of `tiles` of this block's tiles, from number `from`, once all warps have theirs.
  __device__ __forceinline__ void take_sums(const DecodePlace& p, const Matrix& m, int from, int tiles,
                                            const float* sums) {
    sync_workers();
    // Warps that have nothing to add up go on to ask for the next weights.
    const int results = (tiles * s_.rows) << (m.half > 0 ? 2 : 3);
    const int writers = max(1, min(kDecodeWarps, (results + 31) / 32));
    if (warp_ >= writers) return;
    add_up(p, m, from, tiles, sums);
    if (p.product != DecodeProduct::Head) state_.grid.arrive_with(writers);
  }
  /// Of a row, that are added up.
  static __device__ __forceinline__ int parts_of(const Matrix& m) { return kFed ? m.parts : kDecodeWarps; }
  /// Whether a product is by codes that have one scale a row, which their sums want.
  __device__ __forceinline__ bool has_row_scales(const DecodePlace& p, const Matrix& m) const {
    return kBits < 16 && is_of_layer(p.product) && (s_.group == 0 || s_.group == m.width);
  }
  /// What this thread's first result is multiplied by, likewise ahead.
  __device__ __forceinline__ void load_row_scales(const DecodePlace& p, const Matrix& m) {
    const int shift = m.half > 0 ? 2 : 3, rows = s_.rows;
    state_.row_scale = state_.other_row_scale = 0;  // no register has to hold the last product's
    if (!has_row_scales(p, m) || thread_ >= (m.tiles * rows) << shift) return;
    const int at = ((m.first + (thread_ >> shift) / rows) << shift) + (thread_ & ((1 << shift) - 1));
    const float* const scales = state_.scales_of(p);
    state_.row_scale = __ldg(scales + at);
    if (m.half > 0) state_.other_row_scale = __ldg(scales + m.half + at);
  }
  /// What this thread's first result is added to, or multiplied by: it does not wait for the product. And
  /// which one that is, as much as can be worked out before: behind the product all blocks wait for it.
  __device__ __forceinline__ void load_ahead(const DecodePlace& p, const Matrix& m, int tiles) {
    const int rows = s_.rows, shift = m.half > 0 ? 2 : 3, most = m.half > 0 ? m.half : m.rows;
    if (p.product == DecodeProduct::Decide && thread_ < s_.predictor_hidden)
      state_.predictor_weight = state_.layers[p.layer].predictor_out[thread_];
    const int item = thread_ >> shift, column = thread_ & ((1 << shift) - 1);
    const int tile = rows == 1 ? item : item / rows, row = item - tile * rows;
    const int at = ((m.first + tile) << shift) + column;
    const bool is_there = item < tiles * rows && at < most;
    state_.first_row = row;
    state_.first_at = is_there ? row * most + at : -1;
    state_.first_part = (tile * parts_of(m) * rows + row) * 8 + column;
    if ((p.product == DecodeProduct::Contract || p.product == DecodeProduct::Mix) && is_there) {
      state_.stream_before = __ldcg(s_.x + state_.first_at);
      if (p.product == DecodeProduct::Contract) state_.branch_before = __ldcg(s_.branch + state_.first_at);
    }
  }
  /// The sums of `tiles` of this block's tiles, from number `from`: [tiles][parts][rows][8].
  __device__ __forceinline__ void add_up(const DecodePlace& p, const Matrix& m, int from, int tiles,
                                         const float* sums) {
    const int parts = parts_of(m);
    const bool halves = m.half > 0;
    const int shift = halves ? 2 : 3, most = halves ? m.half : m.rows, rows = s_.rows;
    // A thread's first one by what was worked out ahead; where tiles are taken some at a time, of the first
    // of these.
    if (from == 0 && state_.first_at >= 0) {
      const float* part_sums = sums + state_.first_part;
      float sum = 0, other = 0;
#pragma unroll
      for (int part = 0; part < kDecodeWarps; ++part, part_sums += rows * 8) {
        if (part < kDecodeWarps / 2 || parts == kDecodeWarps) {
          sum += part_sums[0];
          if (halves) other += part_sums[4];
        }
      }
      if constexpr (kBits < 16) {
        if (has_row_scales(p, m)) {
          sum *= state_.row_scale;
          if (halves) other *= state_.other_row_scale;
        }
      }
      take(p, state_.first_row, state_.first_at, sum, other, true);
    }
#pragma unroll 1
    for (int i = thread_ + (from == 0 ? kDecodeThreads : 0); i < (tiles * rows) << shift;
         i += kDecodeThreads) {
      const int item = i >> shift, column = i & ((1 << shift) - 1);
      const int tile = rows == 1 ? item : item / rows, row = item - tile * rows;
      const int at = ((m.first + from + tile) << shift) + column;
      const float* part_sums = sums + (tile * parts * rows + row) * 8 + column;
      float sum = 0, other = 0;
#pragma unroll 1
      for (int part = 0; part < parts; ++part, part_sums += rows * 8) {
        sum += part_sums[0];
        if (halves) other += part_sums[4];
      }
      if constexpr (kBits < 16) {
        if (has_row_scales(p, m) && at < most) {
          const float* const scales = state_.scales_of(p);
          sum *= __ldg(scales + at);
          if (halves) other *= __ldg(scales + m.half + at);
        }
      }
      if (at < most) take(p, row, row * most + at, sum, other, false);
    }
  }
  /// A product's result: its row, its place among all rows' results, and for two halves the one that belongs
  /// to it; whether it is this thread's first.
  __device__ __forceinline__ void take(const DecodePlace& p, int row, int i, float sum, float other,
                                       bool first) {
    const DecodeLayer& l = state_.layer_at(p);
    switch (p.product) {
      case DecodeProduct::Decide: {
        const float z = sum + l.predictor_bias[i - row * s_.predictor_hidden];
        state_.predicted(l)[i] = z / (1.0F + expf(-z));
        break;
      }
      case DecodeProduct::Project:
        s_.qkv[i] = sum * fixed_.scales[row];
        break;
      case DecodeProduct::Mix:
        s_.branch[i] = sum;
        s_.to_norm[i] = __float2bfloat16_rn((first ? state_.stream_before : __ldcg(s_.x + i)) + sum);
        break;
      case DecodeProduct::Expand: {
        const float scale = fixed_.scales[row], z = sum * scale;
        s_.activations[i] = __float2bfloat16_rn(__fdividef(z, 1.0F + __expf(-z)) * (other * scale));
        break;
      }
      case DecodeProduct::Head:
        s_.logits[i] = sum * fixed_.scales[row];
        break;
      default: {  // Contract
        float x = first ? state_.stream_before : __ldcg(s_.x + i);
        if (l.routed < 0 || fixed_.is_computed[row]) {
          x += (l.routed < 0 ? 1.0F : fixed_.gates[row]) *
               ((first ? state_.branch_before : __ldcg(s_.branch + i)) + sum);
          s_.x[i] = x;
        }
        s_.to_norm[i] = __float2bfloat16_rn(x);
      }
    }
  }
};

}  // namespace fathom::cuda
