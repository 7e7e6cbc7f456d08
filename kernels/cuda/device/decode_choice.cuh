// The end of a decoding step: from the logits to each row's token, the most likely one or one that is drawn.
//
// A block of threads looks at the ids whose logits it computed. For the most likely token it leaves the best
// of these for the first block, which has all blocks' candidates once they have met. For a draw every block
// sums the exponentials of its own ids, less the greatest logit; the sums of all blocks side by side are
// where the row's share falls, and the block in whose sum it falls finds the token among its ids. Sums of
// sums are in double: a share of a large vocabulary is decided by small differences. The share of the most
// likely token, where somebody wants it, is one by these sums.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/device/decode_state.cuh"
#include "kernels/cuda/device/reduce.cuh"

namespace fathom::cuda {

class DecodeChoice : DecodePhase {
 public:
  using DecodePhase::DecodePhase;

  /// The tokens, and whether all logits are finite: into the outcome. All threads call it; nobody has arrived
  /// since the logits were written.
  __device__ __forceinline__ void choose() {
    find_candidates();
    state_.grid.arrive();
    state_.meet();
    bool sums = false;
    for (int row = 0; row < s_.rows; ++row) sums = sums || needs_sum(row);
    if (!sums && blockIdx.x != 0) return;
    compare_candidates();
    if (!sums) return;
    sync_workers();
    const IdRange ids{min(own_first(), s_.choices), own_end()};
    const int blocks = static_cast<int>(gridDim.x);
    sum_exponentials(ids, blocks);
    state_.grid.arrive();
    state_.meet();
    find_blocks(blocks);
    sync_workers();
    find_tokens(ids);
  }

 private:
  static constexpr int kNobody = 0x7fffffff;

  /// Some of the ids.
  struct IdRange {
    int first, end;
  };
  /// This block's own ids: those that may be chosen of what it computed. The first of them may be behind the
  /// end.
  __device__ __forceinline__ int own_first() const { return state_.matrix(DecodeProduct::Head).first * 8; }
  __device__ __forceinline__ int own_end() const {
    const Matrix& m = state_.matrix(DecodeProduct::Head);
    return min((m.first + m.tiles) * 8, s_.choices);
  }
  __device__ __forceinline__ bool is_drawn(int row) const { return s_.row[row].inverse_temperature > 0; }
  __device__ __forceinline__ bool needs_sum(int row) const {
    return is_drawn(row) || s_.row[row].wants_share != 0;
  }

  // --- the most likely token
  static __device__ __forceinline__ DecodeCandidate better(const DecodeCandidate& a,
                                                           const DecodeCandidate& b) {
    const bool first = a.value > b.value || (a.value == b.value && a.id < b.id);
    return {first ? a.value : b.value, first ? a.id : b.id, a.finite & b.finite};
  }
  static __device__ __forceinline__ DecodeCandidate from_lane(const DecodeCandidate& a, int across) {
    return {__shfl_xor_sync(kFullWarp, a.value, across), __shfl_xor_sync(kFullWarp, a.id, across),
            __shfl_xor_sync(kFullWarp, a.finite, across)};
  }
  static __device__ __forceinline__ DecodeCandidate best_of_lanes(DecodeCandidate best) {
#pragma unroll
    for (int across = 16; across > 0; across /= 2) best = better(best, from_lane(best, across));
    return best;
  }
  /// The best of this block's own ids, a row a warp.
  __device__ __forceinline__ void find_candidates() {
    sync_workers();
    const IdRange ids{own_first(), own_end()};
#pragma unroll 1
    for (int row = warp_; row < s_.rows; row += kDecodeWarps) {
      DecodeCandidate best{-INFINITY, kNobody, 1};
#pragma unroll 4
      for (int id = ids.first + lane_; id < ids.end; id += 32) {
        const float z = s_.logits[static_cast<std::int64_t>(row) * s_.vocab + id];
        best = better(best, {z, id, isfinite(z) ? 1 : 0});
      }
      best = best_of_lanes(best);
      if (lane_ == 0) s_.candidates[blockIdx.x * kDecodeRows + row] = best;
    }
  }
  /// The best of all blocks' candidates, a row a warp.
  __device__ __forceinline__ void compare_candidates() {
    for (int row = warp_; row < s_.rows; row += kDecodeWarps) {
      DecodeCandidate best{-INFINITY, kNobody, 1};
      for (int i = lane_; i < static_cast<int>(gridDim.x); i += 32) {
        const auto* from = s_.candidates + i * kDecodeRows + row;
        best = better(best, {__ldcg(&from->value), __ldcg(&from->id), __ldcg(&from->finite)});
      }
      best = best_of_lanes(best);
      if (lane_ != 0) continue;
      fixed_.greatest[row] = best.value;
      if (blockIdx.x != 0) continue;
      s_.outcome->finite[row] = best.finite;
      if (s_.row[row].inverse_temperature == 0) tell(row, best.id == kNobody ? 0 : best.id);
    }
  }
  /// To the host, and to the next launch.
  __device__ __forceinline__ void tell(int row, int token) const {
    s_.outcome->token[row] = token;
    s_.left->token[row] = token;
  }

  // --- a draw: a token from softmax(z / temperature), for the rows that ask for one
  __device__ __forceinline__ float exponential(int row, int id) const {
    const float z = s_.logits[static_cast<std::int64_t>(row) * s_.vocab + id];
    return expf((z - fixed_.greatest[row]) * (is_drawn(row) ? s_.row[row].inverse_temperature : 1.0F));
  }
  /// Of this block's own ids: all warps work on one row after another.
  __device__ __forceinline__ void sum_exponentials(const IdRange& ids, int blocks) {
    for (int row = 0; row < s_.rows; ++row) {
      if (!needs_sum(row)) continue;
      float sum = 0;
      for (int id = ids.first + thread_; id < ids.end; id += kDecodeThreads) sum += exponential(row, id);
      sum = block_sum(sum);
      if (thread_ == 0) s_.sums[row * blocks + static_cast<int>(blockIdx.x)] = sum;
    }
  }
  /// Whether a row's share falls in this block's sum, and where: a row a warp.
  __device__ __forceinline__ void find_blocks(int blocks) {
    for (int row = warp_; row < s_.rows; row += kDecodeWarps) {
      if (!needs_sum(row)) continue;
      // Each border between two blocks is one number for both, or a share might fall between them.
      double before = 0, behind = 0, total = 0;
      int last = 0;  // block with anything to draw
      for (int base = 0; base < blocks; base += 32) {
        const int i = base + lane_, me = static_cast<int>(blockIdx.x) - base;
        const double sum = i < blocks ? __ldcg(s_.sums + row * blocks + i) : 0.0F;
        const double up_to = scan(sum);
        const unsigned any = __ballot_sync(kFullWarp, sum > 0);
        if (any != 0) last = base + 31 - __clz(static_cast<int>(any));
        const double others = __shfl_sync(kFullWarp, up_to, max(me - 1, 0) & 31);
        const double with = __shfl_sync(kFullWarp, up_to, me & 31);
        if (me >= 0 && me < 32) before = total + (me > 0 ? others : 0.0), behind = total + with;
        total += __shfl_sync(kFullWarp, up_to, 31);
      }
      if (!is_drawn(row)) {
        if (lane_ == 0 && blockIdx.x == 0) s_.outcome->share[row] = static_cast<float>(1 / total);
        continue;
      }
      // Rounding may leave the share behind the last border: then it is the last block's.
      const double share = s_.row[row].uniform * total;
      const bool mine = last == static_cast<int>(blockIdx.x);
      const bool found = share >= before && before < behind && (share < behind || mine);
      if (lane_ == 0) fixed_.before[row] = found ? share - before : -1.0;
    }
  }
  /// The tokens of the rows whose shares fall in this block's sums, a row a warp.
  __device__ __forceinline__ void find_tokens(const IdRange& ids) {
    for (int row = warp_; row < s_.rows; row += kDecodeWarps) {
      if (s_.row[row].inverse_temperature == 0 || fixed_.before[row] < 0) continue;
      const int id = find(row, ids, fixed_.before[row]);
      if (lane_ == 0) tell(row, id);
    }
  }
  /// The id in whose exponential the share falls; rounding may leave it behind the last one with any.
  __device__ __forceinline__ int find(int row, const IdRange& ids, double share) const {
    double before = 0;
    int last = ids.first;
    for (int base = ids.first; base < ids.end; base += 32) {
      const int id = base + lane_;
      const float e = id < ids.end ? exponential(row, id) : 0.0F;
      const double sum = scan(e);
      const unsigned found = __ballot_sync(kFullWarp, e > 0 && share < before + sum);
      if (found != 0) return base + __ffs(static_cast<int>(found)) - 1;
      const unsigned any = __ballot_sync(kFullWarp, e > 0);
      if (any != 0) last = base + 31 - __clz(static_cast<int>(any));
      before += __shfl_sync(kFullWarp, sum, 31);
    }
    return last;
  }
  /// Of all threads; every thread gets it.
  __device__ __forceinline__ float block_sum(float sum) {
    sum = warp_reduce(sum, Sum{});
    if (lane_ == 0) fixed_.scratch[warp_] = sum;
    sync_workers();
    sum = sum_of_warps(fixed_.scratch);
    sync_workers();
    return sum;
  }
  /// Of the lanes up to and with this one.
  __device__ __forceinline__ double scan(double sum) const {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const double other = __shfl_up_sync(kFullWarp, sum, offset);
      if (lane_ >= offset) sum += other;
    }
    return sum;
  }
};

}  // namespace fathom::cuda
