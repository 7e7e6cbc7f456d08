// One warp's passage over entries of the cache: attention of the query heads of one key/value head over steps
// of 16 entries.
//
// Keys and values go straight from memory into the operands of the tensor core (mma.cuh), 16 bytes a lane.
// Lane 4g+c has
//   scores:  rows are the query heads, columns eight entries. Of entry g the elements 8c .. 8c+7 of a run of
//            32, as it has them of query g.
//   values:  rows are the query heads, the inner index the 16 entries. Of the entries 2c, 2c+1, 2c+8, 2c+9
//            (whose weights are where the scores' result has them) the elements 8g .. 8g+7 of a run of 64;
//            the same element j of two entries is a word of an operand, whose eight columns are 8g + j.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/device/decode_deal.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/read_once.cuh"
#include "kernels/cuda/device/reduce.cuh"

namespace fathom::cuda {

/// 16 bytes of an entry, which this step does not read again: they need no room in the first cache, and are
/// the first to go from the second one, where what every step reads stays. What lies beside them in a run of
/// 256 bytes is asked for as well, since other lanes want it. Only for entries of earlier steps: the load may
/// pass by what this launch has written.
__device__ __forceinline__ uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(read_once()));
  return v;
}

/// What attention keeps in shared memory.
template <int kDim>
struct AttentionRoom {
  // 64 bytes beside a multiple of 128, so that eight queries' 16 bytes come without conflicts.
  static constexpr int kStride = kDim + 32;
  __nv_bfloat16 queries[kDecodeGroup * kStride];
  float key[kDim], value[kDim];  // the new entry's
  float scores[kDecodeGroup];    // of the new entry
  float max[kDecodeWarps][kDecodeGroup], sum[kDecodeWarps][kDecodeGroup];
  // Of head h and warp w from w * (kDim + 8): so that eight heads' come without conflicts, and what is of
  // heads that there are not is the room's end, which nobody needs.
  float values[kDecodeGroup][kDecodeWarps * (kDim + 8) + 8];

  __device__ __forceinline__ float* values_of(int warp, int head) { return values[head] + warp * (kDim + 8); }
  __device__ __forceinline__ const float* values_of(int warp, int head) const {
    return values[head] + warp * (kDim + 8);
  }
  /// What `group` query heads need.
  static constexpr int bytes(int group) {
    return static_cast<int>(sizeof(AttentionRoom)) -
           (kDecodeGroup - group) * static_cast<int>(sizeof(AttentionRoom::values[0]));
  }
};

/// One warp's passage over its steps. Cache: where the entries are: pool, block and kv_heads as in
/// DecodeStep.
template <int kDim, typename Cache>
class EntryWalk {
 public:
  float max = -INFINITY, sum = 0;  // of head g: the greatest score, and this lane's sum of exponentials
  float values[kDim / 8][2] = {};  // of head g, n-tile 8 h + j: elements 64 h + 8 (2c) + j and 8 (2c+1) + j

  /// `table`: the row's blocks; a block b of it is block b * stride + offset of the pool.
  __device__ EntryWalk(const Cache& s, const std::int32_t* table, int stride, int offset, int head)
      : s_(s), table_(table), stride_(stride), offset_(offset), head_(head) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    g_ = lane / 4;
    c_ = lane % 4;
  }

  /// The first step's entries begin to come.
  __device__ __forceinline__ void begin(const StepRange& range, int entries) {
    const int step = range.first + static_cast<int>(threadIdx.x) / 32;
    if (step < range.end) begin_at(key_of(step * 16), range, entries);
  }
  /// The same, where the first step's keys are known to begin.
  __device__ __forceinline__ void begin_at(const __nv_bfloat16* keys, const StepRange& range, int entries) {
    const int step = range.first + static_cast<int>(threadIdx.x) / 32;
    if (step >= range.end) return;
    load_keys(keys, step, entries);
    load_values(keys, step, entries);
  }
  /// `scale`: of the scores; none where the queries have it already.
  template <typename... Scale>
  __device__ __forceinline__ void run(const __nv_bfloat16* queries, int group, const StepRange& range,
                                      int entries, Scale... scale) {
    uint4 q[kRuns] = {};
    constexpr int kStride = AttentionRoom<kDim>::kStride;
    if (g_ < group) {
#pragma unroll
      for (int r = 0; r < kRuns; ++r)
        q[r] = *reinterpret_cast<const uint4*>(queries + g_ * kStride + 32 * r + 8 * c_);
    }
    int step = range.first + static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
    while (step < range.end) {
      const int next = step + kDecodeWarps;
      float scores[2][4] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int r = 0; r < kRuns; ++r) {
          mma(scores[j], {q[r].x, 0, q[r].y, 0}, k_[j][r].x, k_[j][r].y);
          mma(scores[j], {q[r].z, 0, q[r].w, 0}, k_[j][r].z, k_[j][r].w);
        }
      }
      if (next < range.end) load_keys(key_of(next * 16), next, entries);
      if constexpr (sizeof...(scale) > 0) {
#pragma unroll
        for (int e = 0; e < 8; ++e) scores[e / 4][e % 4] *= (scale + ...);
      }
      std::uint32_t p[4] = {};
      weigh(scores, step * 16, entries, p);
      add(p);
      if (next < range.end) load_values(key_of(next * 16), next, entries);
      step = next;
    }
  }
  /// What the walk has found, for the block's other warps.
  __device__ __forceinline__ void leave(AttentionRoom<kDim>& room, int warp, int group) {
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    if (g_ >= group) return;
    if (c_ == 0) {
      room.max[warp][g_] = max;
      room.sum[warp][g_] = sum;
    }
    float* const to = room.values_of(warp, g_);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const int e = 64 * (n / 8) + n % 8;
      to[e + 8 * (2 * c_)] = values[n][0];
      to[e + 8 * (2 * c_ + 1)] = values[n][1];
    }
  }

 private:
  static constexpr int kRuns = kDim / 32, kWide = kDim / 64;

  /// Where an entry's key begins.
  __device__ __forceinline__ const __nv_bfloat16* key_of(int entry) const {
    const std::int64_t block = static_cast<std::int64_t>(table_[entry / s_.block]) * stride_ + offset_;
    return s_.pool + ((block * 2 * s_.kv_heads + head_) * s_.block + entry % s_.block) * kDim;
  }
  /// `keys`: where the step's first one begins.
  __device__ __forceinline__ void load_keys(const __nv_bfloat16* keys, int step, int entries) {
    keys += 8 * c_;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int entry = 8 * j + g_;
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        k_[j][r] = step * 16 + entry < entries ? load_once(keys + entry * kDim + 32 * r) : uint4{};
      }
    }
  }
  __device__ __forceinline__ void load_values(const __nv_bfloat16* keys, int step, int entries) {
    const __nv_bfloat16* const values =
        keys + static_cast<std::int64_t>(s_.kv_heads) * s_.block * kDim + 8 * g_;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int entry = 2 * c_ + (i % 2) + 8 * (i / 2);
#pragma unroll
      for (int h = 0; h < kWide; ++h)
        v_[i][h] = step * 16 + entry < entries ? load_once(values + entry * kDim + 64 * h) : uint4{};
    }
  }
  /// The scores' exponentials, less the greatest so far, as an operand. The first entry of a step is there,
  /// so the greatest is finite; only in a row without entries it is not, and then nobody takes the sums.
  __device__ __forceinline__ void weigh(float (&scores)[2][4], int first, int entries,
                                        std::uint32_t (&p)[4]) {
    float most = max;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (first + 8 * j + 2 * c_ + e >= entries) scores[j][e] = -INFINITY;
        most = fmaxf(most, scores[j][e]);
      }
    }
    most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 1));
    most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 2));
    const float shrink = fast_exp2(max - most);
    max = most;
    sum *= shrink;
    float e[2][2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        e[j][i] = fast_exp2(scores[j][i] - most);
        sum += e[j][i];
      }
    }
    p[0] = pack_bf16(e[0][0], e[0][1]);
    p[2] = pack_bf16(e[1][0], e[1][1]);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      values[n][0] *= shrink;
      values[n][1] *= shrink;
    }
  }
  __device__ __forceinline__ void add(const std::uint32_t (&p)[4]) {
#pragma unroll
    for (int h = 0; h < kWide; ++h) {
      const auto word = [&](int i, int w) {
        return w == 0 ? v_[i][h].x : w == 1 ? v_[i][h].y : w == 2 ? v_[i][h].z : v_[i][h].w;
      };
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const unsigned pick = j % 2 == 0 ? 0x5410 : 0x7632;
        const std::uint32_t b0 = __byte_perm(word(0, j / 2), word(1, j / 2), pick);
        const std::uint32_t b1 = __byte_perm(word(2, j / 2), word(3, j / 2), pick);
        float c[4] = {values[8 * h + j][0], values[8 * h + j][1], 0.0F, 0.0F};
        mma(c, p, b0, b1);
        values[8 * h + j][0] = c[0];
        values[8 * h + j][1] = c[1];
      }
    }
  }

  const Cache& s_;
  const std::int32_t* table_;
  int stride_, offset_, head_, g_, c_;
  uint4 k_[2][kRuns];
  uint4 v_[4][kWide];
};

}  // namespace fathom::cuda
