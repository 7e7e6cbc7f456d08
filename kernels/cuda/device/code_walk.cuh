// One warp's passage over entries of a cache of codes (kernels/cache_codes.h): what entry_walk.cuh does over
// one of bf16, in its steps of 16 entries and with its registers of results.
//
// Codes become bf16 as they are, 0 to 255, which bf16 has; those of 4 bits with 128 added, as that is one
// instruction for two. What is theirs to be multiplied by comes behind the products:
//   scores:  q . k' = step (q . code) + low sum(q)                       for each entry,
//   values:  sum p v' = sum (p step) code + sum p low                    for each element,
// and of 4 bits the 128 sum(q), or 128 sum(p step), less, summed as the tensor core was given them.
//
// Lane 4g+c has
//   scores:  of entry g the elements D/4 c .. D/4 (c+1) - 1, and the same of query g. A word of codes gives
//            pairs of elements four (4 bits) or one (8 bits) apart; queries are paired likewise.
//   values:  of the entries 2c, 2c+1, 2c+8, 2c+9 the elements D/8 g .. D/8 (g+1) - 1; the t-th of each entry
//            makes the operand of the t-th eight columns, of which column g is element D/8 g + t.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/device/cache_codes.cuh"
#include "kernels/cuda/device/decode_deal.cuh"
#include "kernels/cuda/device/entry_walk.cuh"

namespace fathom::cuda {

/// Neighbouring words, which nothing reads again soon.
template <int kWords>
__device__ __forceinline__ void load_words(std::uint32_t (&w)[kWords], const void* from, bool valid) {
  if constexpr (kWords == 1) {
    w[0] = valid ? __ldcs(static_cast<const std::uint32_t*>(from)) : 0;
  } else if constexpr (kWords == 2) {
    const uint2 v = valid ? __ldcs(static_cast<const uint2*>(from)) : uint2{};
    w[0] = v.x, w[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 v = valid ? load_once(static_cast<const uint4*>(from) + i) : uint4{};
      w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
    }
  }
}

/// Bytes `low` of a and `high` of b as a pair of bf16.
template <int low, int high>
__device__ __forceinline__ std::uint32_t bytes_as_bf16(std::uint32_t a, std::uint32_t b) {
  // 2^23 + byte, of which the sum leaves the byte; its lower half is zero.
  const float x = __uint_as_float(__byte_perm(a, 0x4b000000U, 0x7650 | low)) - 8388608.0F;
  const float y = __uint_as_float(__byte_perm(b, 0x4b000000U, 0x7650 | high)) - 8388608.0F;
  return __byte_perm(__float_as_uint(x), __float_as_uint(y), 0x7632);
}
/// The lowest four bits of both halves, and 128 beside each.
__device__ __forceinline__ std::uint32_t nibbles_as_bf16(std::uint32_t w) {
  return (w & 0x000f000fU) | 0x43004300U;
}

template <int kDim, int kBits>
class CodeWalk {
 public:
  float max = -INFINITY, sum = 0;  // of head g: the greatest score, and this lane's sum of exponentials
  float offset = 0;                // and what this lane's entries give to all elements alike
  float values[kDim / 8][2] = {};  // of head g, n-tile t: elements D/8 (2c) + t and D/8 (2c+1) + t

  __device__ CodeWalk(const CachedRows<bf16>& a, const std::int32_t* table, int head)
      : a_(a), table_(table), head_(head) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    g_ = lane / 4;
    c_ = lane % 4;
  }

  __device__ __forceinline__ void begin(const StepRange& range, int entries) {
    const int step = range.first + static_cast<int>(threadIdx.x) / 32;
    if (step >= range.end) return;
    load_keys(step, entries);
    load_values(step, entries);
  }
  __device__ __forceinline__ void run(const bf16* queries, int group, const StepRange& range, int entries,
                                      float scale) {
    std::uint32_t q[kProducts][2] = {};
    float total = 0;  // of head g's query
    if (g_ < group) read_query(queries + g_ * AttentionRoom<kDim>::kStride + kDim / 4 * c_, q, total);
    total += __shfl_xor_sync(kFullWarp, total, 1);
    total += __shfl_xor_sync(kFullWarp, total, 2);
    int step = range.first + static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
    while (step < range.end) {
      const int next = step + kDecodeWarps;
      float scores[2][4] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int w = 0; w < kKeyWords; ++w) multiply(scores[j], q, k_[j][w], w);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const CodeScale s = CodeScale::of(key_scales_[j][e]);
          scores[j][e] = scale * fmaf(s.step, scores[j][e], (s.low - kAdded * s.step) * total);
        }
      }
      if (next < range.end) load_keys(next, entries);
      std::uint32_t p[4] = {};
      weigh(scores, step * 16, entries, p);
      add(p);
      if (next < range.end) load_values(next, entries);
      step = next;
    }
  }
  /// What the walk has found, for the block's other warps.
  __device__ __forceinline__ void leave(AttentionRoom<kDim>& room, int warp, int group) {
#pragma unroll
    for (int other = 1; other < 4; other *= 2) {
      sum += __shfl_xor_sync(kFullWarp, sum, other);
      offset += __shfl_xor_sync(kFullWarp, offset, other);
    }
    if (g_ >= group) return;
    if (c_ == 0) {
      room.max[warp][g_] = max;
      room.sum[warp][g_] = sum;
    }
#pragma unroll
    for (int t = 0; t < kDim / 8; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) room.values[warp][g_][kDim / 8 * (2 * c_ + i) + t] = values[t][i] + offset;
    }
  }

 private:
  static constexpr int kProducts = kDim / 16;                // of a score
  static constexpr int kKeyWords = kDim / 4 * kBits / 32;    // of an entry that a lane has
  static constexpr int kValueWords = kDim / 8 * kBits / 32;  // likewise
  static constexpr float kAdded = kBits == 4 ? 128.0F : 0.0F;

  __device__ __forceinline__ CodeBlock<kBits> block_of(int entry) const {
    const CacheShape& s = a_.s;
    return CodeBlock<kBits>::at(a_.codes, s, table_[entry / static_cast<int>(s.block)] * s.stride + s.offset);
  }
  __device__ __forceinline__ void load_keys(int step, int entries) {
    const CodeBlock<kBits> block = block_of(step * 16);
    const int inside = step * 16 % block.block;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int entry = 8 * j + g_;
      load_words(k_[j], block.codes(head_, inside + entry) + c_ * (kKeyWords * 4),
                 step * 16 + entry < entries);
      // Of two entries, of which the second may be one that is not there: its score is not looked at.
      load_words(key_scales_[j], block.scales(head_, inside + 8 * j + 2 * c_),
                 step * 16 + 8 * j + 2 * c_ < entries);
    }
  }
  __device__ __forceinline__ void load_values(int step, int entries) {
    const CodeBlock<kBits> block = block_of(step * 16);
    const int inside = step * 16 % block.block, head = block.kv_heads + head_;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int entry = 2 * c_ + i % 2 + 8 * (i / 2);
      const bool valid = step * 16 + entry < entries;
      load_words(v_[i], block.codes(head, inside + entry) + g_ * (kValueWords * 4), valid);
      std::uint32_t word[1];
      load_words(word, block.scales(head, inside + entry), valid);
      value_scales_[i] = word[0];
    }
  }
  /// Paired as multiply() pairs the codes.
  __device__ __forceinline__ static void read_query(const bf16* query, std::uint32_t (&q)[kProducts][2],
                                                    float& total) {
    const auto pair = [&](int first, int second) {
      const float x = to_float(query[first]), y = to_float(query[second]);
      total += x + y;
      return pack_bf16(x, y);
    };
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      if constexpr (kBits == 4) {
        const int at = i / 2 * 8 + i % 2 * 2;
        q[i][0] = pair(at, at + 4), q[i][1] = pair(at + 1, at + 5);
      } else {
        q[i][0] = pair(4 * i, 4 * i + 1), q[i][1] = pair(4 * i + 2, 4 * i + 3);
      }
    }
  }
  /// Word w of a key's codes.
  __device__ __forceinline__ static void multiply(float (&score)[4], const std::uint32_t (&q)[kProducts][2],
                                                  std::uint32_t codes, int w) {
    if constexpr (kBits == 4) {
      mma(score, {q[2 * w][0], 0, q[2 * w][1], 0}, nibbles_as_bf16(codes), nibbles_as_bf16(codes >> 4));
      mma(score, {q[2 * w + 1][0], 0, q[2 * w + 1][1], 0}, nibbles_as_bf16(codes >> 8),
          nibbles_as_bf16(codes >> 12));
    } else {
      mma(score, {q[w][0], 0, q[w][1], 0}, bytes_as_bf16<0, 1>(codes, codes),
          bytes_as_bf16<2, 3>(codes, codes));
    }
  }
  /// The scores' exponentials, less the greatest so far, times the values' steps: an operand.
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
    offset *= shrink;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float weight[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const CodeScale s = CodeScale::of(value_scales_[2 * j + e]);
        const float x = fast_exp2(scores[j][e] - most);
        sum += x;
        offset = fmaf(x, s.low, offset);
        weight[e] = x * s.step;
      }
      p[2 * j] = pack_bf16(weight[0], weight[1]);
      offset = fmaf(-kAdded, low_of(p[2 * j]) + high_of(p[2 * j]), offset);
    }
#pragma unroll
    for (int t = 0; t < kDim / 8; ++t) {
      values[t][0] *= shrink;
      values[t][1] *= shrink;
    }
  }
  __device__ __forceinline__ void add_tile(int t, const std::uint32_t (&p)[4], std::uint32_t b0,
                                           std::uint32_t b1) {
    float c[4] = {values[t][0], values[t][1], 0.0F, 0.0F};
    mma(c, p, b0, b1);
    values[t][0] = c[0];
    values[t][1] = c[1];
  }
  __device__ __forceinline__ void add(const std::uint32_t (&p)[4]) {
#pragma unroll
    for (int w = 0; w < kValueWords; ++w) {
      if constexpr (kBits == 4) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const unsigned pick = half == 0 ? 0x5410 : 0x7632;
          const std::uint32_t b0 = __byte_perm(v_[0][w], v_[1][w], pick),
                              b1 = __byte_perm(v_[2][w], v_[3][w], pick);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            add_tile(8 * w + 4 * half + i, p, nibbles_as_bf16(b0 >> 4 * i), nibbles_as_bf16(b1 >> 4 * i));
        }
      } else {
        add_tile(4 * w, p, bytes_as_bf16<0, 0>(v_[0][w], v_[1][w]), bytes_as_bf16<0, 0>(v_[2][w], v_[3][w]));
        add_tile(4 * w + 1, p, bytes_as_bf16<1, 1>(v_[0][w], v_[1][w]),
                 bytes_as_bf16<1, 1>(v_[2][w], v_[3][w]));
        add_tile(4 * w + 2, p, bytes_as_bf16<2, 2>(v_[0][w], v_[1][w]),
                 bytes_as_bf16<2, 2>(v_[2][w], v_[3][w]));
        add_tile(4 * w + 3, p, bytes_as_bf16<3, 3>(v_[0][w], v_[1][w]),
                 bytes_as_bf16<3, 3>(v_[2][w], v_[3][w]));
      }
    }
  }

  const CachedRows<bf16>& a_;
  const std::int32_t* table_;
  int head_, g_, c_;
  std::uint32_t k_[2][kKeyWords], v_[4][kValueWords];
  std::uint32_t key_scales_[2][2], value_scales_[4];
};

}  // namespace fathom::cuda
