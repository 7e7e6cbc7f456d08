// What a warp's passage over entries of a cache of codes (code_walk.cuh) makes of those that it has.
//
// A code is a bf16 as it stands: in the lowest eight bits of one that has nothing else it counts multiples of
// 2^-133, since below 2^-125 these numbers are evenly spaced, and the tensor core takes such numbers as any
// others. So two codes cost one instruction, and of the two of 4 bits in a byte neither has to be moved: the
// upper one counts sixteen times as much. The other operand is large instead (kQueryUnit, kWeightBits), so
// that no sum is as small. What codes are to be multiplied by comes behind the products:
//   scores:  q . k' = step (q . code) + low sum(q)                       for each entry,
//   values:  sum p v' = sum (p step) code + sum p low                    for each element.
// So what is read is not rounded to bf16, as cache_codes.h has it and the row-invariant mode does, but p step
// is.
//
// A head's codes are so few bytes that instructions, not memory, could be what a step waits for. So the codes
// are the operand with sixteen rows, which are all of use however few the query heads are, and those are the
// one with eight columns. Lane 4g+c has
//   scores:  rows are the 16 entries, columns the query heads. Of the entries in rows g and g+8 and of query
//            g the same elements, 16 bytes of codes in each run of 64 (or 8 of 32). A word of codes gives
//            pairs of elements four (4 bits) or one (8 bits) apart; queries are paired likewise.
//   values:  rows are 16 elements, the inner index is the entries, columns are the query heads. Of the
//            entries c, 4+c, 8+c, 12+c the elements D/8 g .. D/8 (g+1) - 1, of which 2t and 2t+1 are in rows
//            g and g+8 of tile t.
// So that loads of values are of neighbouring entries, row r of the scores is entry 4 (r%2) + r/2, and 8 more
// for r >= 8. The scores' exponentials, turned over, are the values' operand.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/device/cache_codes.cuh"
#include "kernels/cuda/device/code_words.cuh"
#include "kernels/cuda/device/decode_deal.cuh"
#include "kernels/cuda/device/entry_walk.cuh"

namespace fathom::cuda {

/// kWide: steps of 16 entries that are taken side by side.
template <int kDim, int kBits, int kWide>
class CodeSums {
 public:
  static constexpr int kProducts = kDim / 16;                 // of a score
  static constexpr int kKeyWords = kDim / 4 * kBits / 32;     // of an entry that a lane has
  static constexpr int kValueWords = kDim / 8 * kBits / 32;   // likewise
  static constexpr int kRun = kKeyWords < 4 ? kKeyWords : 4;  // words side by side

  /// A step's, as a lane has them: of the two entries of its rows the keys and both scales, and of four the
  /// values.
  struct Entries {
    std::uint32_t keys[2][kKeyWords], values[4][kValueWords];
    std::uint32_t key_scales[2], value_scales[2];
  };

  const int g = static_cast<int>(threadIdx.x) % 32 / 4, c = static_cast<int>(threadIdx.x) % 4;
  const int mine = g % 2 * 4 + g / 2;  // the entry of a step in row g

  /// Paired as multiply() pairs the codes.
  __device__ __forceinline__ void read_query(const bf16* query, std::uint32_t (&q)[kProducts][2],
                                             float& total) const {
    constexpr int kOfWord = 32 / kBits;
#pragma unroll
    for (int w = 0; w < kKeyWords; ++w) {
      const bf16* const of_word = query + ((w / kRun * 4 + c) * kRun + w % kRun) * kOfWord;
      const auto pair = [&](int first, int second, float unit) {
        const float x = to_float(of_word[first]), y = to_float(of_word[second]);
        total += x + y;
        return pack_bf16(x * unit, y * unit);
      };
      if constexpr (kBits == 4) {
        constexpr float kOfUpper = kQueryUnit / 16;
        q[2 * w][0] = pair(0, 4, kQueryUnit), q[2 * w][1] = pair(1, 5, kOfUpper);
        q[2 * w + 1][0] = pair(2, 6, kQueryUnit), q[2 * w + 1][1] = pair(3, 7, kOfUpper);
      } else {
        q[w][0] = pair(0, 1, kQueryUnit), q[w][1] = pair(2, 3, kQueryUnit);
      }
    }
  }
  /// scores[p][2j + h]: of step p the entry in row g + 8j and head 2c + h.
  template <typename... Scale>
  __device__ __forceinline__ void score(const Entries (&e)[kWide], const std::uint32_t (&q)[kProducts][2],
                                        const float (&totals)[2], float (&scores)[kWide][4],
                                        Scale... scale) const {
    float sums[kWide][2][4] = {};
#pragma unroll
    for (int w = 0; w < kKeyWords; ++w) {
#pragma unroll
      for (int p = 0; p < kWide; ++p) multiply(sums[p], q, e[p].keys[0][w], e[p].keys[1][w], w);
    }
#pragma unroll
    for (int p = 0; p < kWide; ++p) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const CodeScale s = CodeScale::of(e[p].key_scales[j]);
        const float step = s.step * (kScore * ... * scale);
#pragma unroll
        for (int h = 0; h < 2; ++h)
          scores[p][2 * j + h] = fmaf(step, sums[p][0][2 * j + h] + sums[p][1][2 * j + h], s.low * totals[h]);
      }
    }
  }
  /// The values, by the scores' exponentials.
  __device__ __forceinline__ void add(const Entries (&e)[kWide], const float (&scores)[kWide][4]) {
    // What sums are relative to need not be the greatest score, only near it: it seldom has to be raised.
    constexpr float kNear = 8 + kWeightBits;
    float most[2] = {scores[0][0], scores[0][1]};
#pragma unroll
    for (int i = 2; i < 4 * kWide; ++i) most[i % 2] = fmaxf(most[i % 2], scores[i / 4][i % 4]);
    if (__any_sync(kFullWarp, fmaxf(most[0] - base_[0], most[1] - base_[1]) > kNear)) raise(scores);
    std::uint32_t weights[kWide][2];
#pragma unroll
    for (int p = 0; p < kWide; ++p) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const CodeScale s = CodeScale::of(e[p].value_scales[j]);
        float x[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          x[h] = fast_exp2(scores[p][2 * j + h] - base_[h]);
          sum_[h] += x[h];
          offset_[h] = fmaf(x[h], s.low, offset_[h]);
        }
        weights[p][j] = turn_over(pack_bf16(x[0] * s.step, x[1] * s.step));
      }
    }
#pragma unroll
    for (int p = 0; p < kWide; ++p) weigh(e[p].values, weights[p]);
  }
  /// What the walk has found, for the block's other warps.
  __device__ __forceinline__ void leave(AttentionRoom<kDim>& room, int warp, int group) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int other = 4; other < 32; other *= 2) {
        sum_[h] += __shfl_xor_sync(kFullWarp, sum_[h], other);
        offset_[h] += __shfl_xor_sync(kFullWarp, offset_[h], other);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int head = 2 * c + h;
      if (head >= group) continue;
      if (g == 0) {
        // Where no score was a number none was the greatest, but who joins the warps must see them.
        room.max[warp][head] = base_[h] == -INFINITY && sum_[h] != 0 ? 0 : base_[h] + kWeightBits;
        room.sum[warp][head] = sum_[h] * kWeight;
      }
      const float offset = offset_[h] * kWeight;
#pragma unroll
      for (int t = 0; t < kDim / 16; ++t) {
        *reinterpret_cast<float2*>(room.values_of(warp, head) + kDim / 8 * g + 2 * t) =
            float2{fmaf(values_[t][h], kEven, offset), fmaf(values_[t][2 + h], kOdd, offset)};
      }
    }
  }

 private:
  // What one is in queries and in weights, so that sums with codes are far from the smallest numbers, and
  // from the greatest: queries of 2^20 and values of 2^50 are no harm.
  static constexpr float kQueryUnit = 0x1p104F, kScore = 0x1p29F;  // their product counts 2^-133
  static constexpr float kWeightBits = 64, kWeight = 0x1p-64F;
  // Of sums of values, the elements of rows g and g+8. kWeight's and the codes' 2^133 in one.
  static constexpr float kEven = 0x1p69F, kOdd = kBits == 4 ? kEven / 16 : kEven;

  /// Word w of both keys' codes. `sums`: two, so that one product need not wait for the last.
  __device__ __forceinline__ static void multiply(float (&sums)[2][4], const std::uint32_t (&q)[kProducts][2],
                                                  std::uint32_t first, std::uint32_t second, int w) {
    if constexpr (kBits == 4) {
      mma(sums[0],
          {of_both_halves<0x0f>(first), of_both_halves<0x0f>(second), of_both_halves<0xf0>(first),
           of_both_halves<0xf0>(second)},
          q[2 * w][0], q[2 * w][1]);
      first >>= 8, second >>= 8;
      mma(sums[1],
          {of_both_halves<0x0f>(first), of_both_halves<0x0f>(second), of_both_halves<0xf0>(first),
           of_both_halves<0xf0>(second)},
          q[2 * w + 1][0], q[2 * w + 1][1]);
    } else {
      mma(sums[w % 2], {two_bytes<0>(first), two_bytes<0>(second), two_bytes<1>(first), two_bytes<1>(second)},
          q[w][0], q[w][1]);
    }
  }
  /// Makes the greatest score so far what exponentials are less than.
  __device__ __forceinline__ void raise(const float (&scores)[kWide][4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = -INFINITY;
#pragma unroll
      for (int p = 0; p < kWide; ++p) most = fmaxf(most, fmaxf(scores[p][h], scores[p][2 + h]));
#pragma unroll
      for (int other = 4; other < 32; other *= 2) most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, other));
      const float base = fmaxf(base_[h], most - kWeightBits);
      const float shrink = fast_exp2(base_[h] - base);
      base_[h] = base;
      sum_[h] *= shrink;
      offset_[h] *= shrink;
#pragma unroll
      for (int t = 0; t < kDim / 16; ++t) {
        values_[t][h] *= shrink;
        values_[t][2 + h] *= shrink;
      }
    }
  }
  __device__ __forceinline__ void weigh(const std::uint32_t (&v)[4][kValueWords],
                                        const std::uint32_t (&weights)[2]) {
#pragma unroll
    for (int i = 0; i < 2 * kValueWords; ++i) {
      const int w = i / 2;
      const unsigned pick = i % 2 == 0 ? 0x5410 : 0x7632;
      std::uint32_t low = __byte_perm(v[0][w], v[1][w], pick), high = __byte_perm(v[2][w], v[3][w], pick);
      if constexpr (kBits == 4) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          mma(values_[2 * i + t],
              {of_both_halves<0x0f>(low), of_both_halves<0xf0>(low), of_both_halves<0x0f>(high),
               of_both_halves<0xf0>(high)},
              weights[0], weights[1]);
          low >>= 8, high >>= 8;
        }
      } else {
        mma(values_[i],
            {of_both_halves<0xff>(low), of_both_halves<0xff>(low >> 8), of_both_halves<0xff>(high),
             of_both_halves<0xff>(high >> 8)},
            weights[0], weights[1]);
      }
    }
  }

  // Of the heads 2c and 2c+1: what scores are relative to, kWeightBits below one that is near the greatest;
  // this lane's sums of exponentials; and what its entries give to all elements alike.
  float base_[2] = {-INFINITY, -INFINITY}, sum_[2] = {}, offset_[2] = {};
  float values_[kDim / 16][4] = {};  // [t][2i + h]: of head 2c+h the element D/8 g + 2t + i
};

}  // namespace fathom::cuda
