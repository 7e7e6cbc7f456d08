// One warp's passage over entries of a cache of codes (kernels/cache_codes.h): what entry_walk.cuh does over
// one of bf16, in its steps of 16 entries.
//
// Codes become bf16 as they are, 0 to 255, which bf16 has; those of 4 bits with 128 added, as that is one
// instruction for two. What is theirs to be multiplied by comes behind the products:
//   scores:  q . k' = step (q . code) + low sum(q)                       for each entry,
//   values:  sum p v' = sum (p step) code + sum p low                    for each element,
// and of 4 bits the 128 sum(q), or 128 sum(p step), less, summed as the tensor core was given them. So what
// is read is not rounded to bf16, as cache_codes.h has it and the row-invariant mode does, but p step is.
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
  // One instruction: (a & b) | c. As an expression it would be two, each with one of the constants.
  std::uint32_t pair;
  asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xea;\n" : "=r"(pair) : "r"(w));
  return pair;
}

/// Where a walk's entries are: a cache's pool of codes, entries of its blocks, key/value heads; a row's
/// blocks, of which block b is block b * stride + offset of the pool; and the walk's key/value head.
struct WalkedCodes {
  const std::uint8_t* pool;
  int block, kv_heads;
  const std::int32_t* table;
  int stride, offset, head;
};

/// kAhead: steps whose codes are on their way, or here, while a warp computes one.
template <int kDim, int kBits, int kAhead>
class CodeWalk {
 public:
  __device__ explicit CodeWalk(const WalkedCodes& of)
      : of_(of), block_bytes_(2 * of.kv_heads * of.block * (kBytes + kScaleBytes)) {
    const int lane = static_cast<int>(threadIdx.x) % 32, keys = of.kv_heads * of.block;
    g_ = lane / 4;
    c_ = lane % 4;
    mine_ = g_ % 2 * 4 + g_ / 2;
    keys_at_ = (of.head * of.block + mine_) * kBytes + c_ * (4 * kRun);
    values_at_ = (keys + of.head * of.block + c_) * kBytes + g_ * (4 * kValueWords);
    scales_at_ = 2 * keys * kBytes + (of.head * of.block + mine_) * kScaleBytes;
  }

  /// The first steps' entries begin to come. `first`: the block of the table that this warp's first step lies
  /// in, where that is known; negative: to be looked up.
  __device__ __forceinline__ void begin(const StepRange& range, int entries, int first = -1) {
    entries_ = entries;
    step_ = range.first + static_cast<int>(threadIdx.x) / 32;
    end_ = min(range.end, (entries + 15) / 16);  // a row without entries has a step, of which nothing is read
    if (step_ >= end_) return;
    index_ = step_ * 16 / of_.block;
    inside_ = step_ * 16 - index_ * of_.block;
    number_ = first >= 0 ? first : of_.table[index_];
    apart_ = kApart / of_.block;
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int step = step_ + a * kDecodeWarps;
      if (step >= end_) break;
      const Place place = next_place(step);
      load_keys(coming_[a], place);
      load_values(coming_[a], place);
    }
  }
  /// `scale`: of the scores; none where the queries have it already.
  template <typename... Scale>
  __device__ __forceinline__ void run(const bf16* queries, int group, Scale... scale) {
    if (step_ >= end_) return;
    std::uint32_t q[kProducts][2] = {};
    float total = 0;  // of head g's query
    if (g_ < group) read_query(queries + g_ * AttentionRoom<kDim>::kStride, q, total);
    total += __shfl_xor_sync(kFullWarp, total, 1);
    total += __shfl_xor_sync(kFullWarp, total, 2);
    const float totals[2] = {(__shfl_sync(kFullWarp, total, 8 * c_) * ... * scale),
                             (__shfl_sync(kFullWarp, total, 8 * c_ + 4) * ... * scale)};
#pragma unroll 1
    while (step_ < end_) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (step_ >= end_) break;
        Entries& e = coming_[a];
        const int next = step_ + kAhead * kDecodeWarps;
        const bool more = next < end_;
        Place place{};
        if (more) place = next_place(next);
        float scores[4];
        score(e, q, totals, scores, scale...);
        if (more) load_keys(e, place);
        add(e, scores);
        if (more) load_values(e, place);
        step_ += kDecodeWarps;
      }
    }
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
      const int head = 2 * c_ + h;
      if (head >= group) continue;
      if (g_ == 0) {
        // Where no score was a number none was the greatest, but who joins the warps must see them.
        room.max[warp][head] = max_[h] == -INFINITY && sum_[h] != 0 ? 0 : max_[h];
        room.sum[warp][head] = sum_[h];
      }
      const float offset = offset_[h] - added_[h];
#pragma unroll
      for (int t = 0; t < kDim / 16; ++t) {
        *reinterpret_cast<float2*>(&room.values[warp][head][kDim / 8 * g_ + 2 * t]) =
            float2{values_[t][h] + offset, values_[t][2 + h] + offset};
      }
    }
  }

 private:
  static constexpr int kBytes = kDim * kBits / 8;  // of a head of an entry
  static constexpr int kScaleBytes = static_cast<int>(kCacheScaleBytes);
  static constexpr int kProducts = kDim / 16;                 // of a score
  static constexpr int kKeyWords = kDim / 4 * kBits / 32;     // of an entry that a lane has
  static constexpr int kValueWords = kDim / 8 * kBits / 32;   // likewise
  static constexpr int kRun = kKeyWords < 4 ? kKeyWords : 4;  // words side by side
  static constexpr int kApart = 16 * kDecodeWarps;            // entries from a step to the warp's next
  static constexpr float kAdded = kBits == 4 ? 128.0F : 0.0F;

  /// A step's, as a lane has them: of the two entries of its rows the keys and both scales, and of four the
  /// values.
  struct Entries {
    std::uint32_t keys[2][kKeyWords], values[4][kValueWords];
    std::uint32_t key_scales[2], value_scales[2];
  };
  /// Where a step is: its block of the pool, and its first entry there.
  struct Place {
    const std::uint8_t* block;
    int inside;
  };

  /// Of the step in line, number `step`, and looks up the block of the one behind.
  __device__ __forceinline__ Place next_place(int step) {
    const int number = number_ * of_.stride + of_.offset;
    const Place place{of_.pool + static_cast<std::int64_t>(number) * block_bytes_, inside_};
    index_ += apart_;
    inside_ += kApart - apart_ * of_.block;
    if (inside_ >= of_.block) inside_ -= of_.block, ++index_;
    if (step + kDecodeWarps < end_) number_ = of_.table[index_];
    return place;
  }
  // Entries that are not there are read as well, since blocks are whole steps: any code is a number, and
  // score() looks after the scales.
  __device__ __forceinline__ void load_keys(Entries& e, const Place& p) const {
    const std::uint8_t* const codes = p.block + (keys_at_ + p.inside * kBytes);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int r = 0; r < kKeyWords / kRun; ++r) {
        std::uint32_t words[kRun];
        load_words(words, codes + 8 * j * kBytes + 16 * kRun * r, true);
#pragma unroll
        for (int w = 0; w < kRun; ++w) e.keys[j][kRun * r + w] = words[w];
      }
    }
    load_scales(e.key_scales, p, 0);
  }
  __device__ __forceinline__ void load_values(Entries& e, const Place& p) const {
    const std::uint8_t* const codes = p.block + (values_at_ + p.inside * kBytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) load_words(e.values[i], codes + 4 * i * kBytes, true);
    load_scales(e.value_scales, p, of_.kv_heads * of_.block * kScaleBytes);
  }
  __device__ __forceinline__ void load_scales(std::uint32_t (&scales)[2], const Place& p, int behind) const {
    const auto* const from =
        reinterpret_cast<const std::uint32_t*>(p.block + (scales_at_ + p.inside * kScaleBytes + behind));
    scales[0] = __ldcs(from);
    scales[1] = __ldcs(from + 8);
  }

  /// Paired as multiply() pairs the codes.
  __device__ __forceinline__ void read_query(const bf16* query, std::uint32_t (&q)[kProducts][2],
                                             float& total) const {
    constexpr int kOfWord = 32 / kBits;
#pragma unroll
    for (int w = 0; w < kKeyWords; ++w) {
      const bf16* const of_word = query + ((w / kRun * 4 + c_) * kRun + w % kRun) * kOfWord;
      const auto pair = [&](int first, int second) {
        const float x = to_float(of_word[first]), y = to_float(of_word[second]);
        total += x + y;
        return pack_bf16(x, y);
      };
      if constexpr (kBits == 4) {
        q[2 * w][0] = pair(0, 4), q[2 * w][1] = pair(1, 5);
        q[2 * w + 1][0] = pair(2, 6), q[2 * w + 1][1] = pair(3, 7);
      } else {
        q[w][0] = pair(0, 1), q[w][1] = pair(2, 3);
      }
    }
  }
  /// Word w of both keys' codes. `sums`: two, so that one product need not wait for the last.
  __device__ __forceinline__ static void multiply(float (&sums)[2][4], const std::uint32_t (&q)[kProducts][2],
                                                  std::uint32_t first, std::uint32_t second, int w) {
    if constexpr (kBits == 4) {
      mma(sums[0],
          {nibbles_as_bf16(first), nibbles_as_bf16(second), nibbles_as_bf16(first >> 4),
           nibbles_as_bf16(second >> 4)},
          q[2 * w][0], q[2 * w][1]);
      mma(sums[1],
          {nibbles_as_bf16(first >> 8), nibbles_as_bf16(second >> 8), nibbles_as_bf16(first >> 12),
           nibbles_as_bf16(second >> 12)},
          q[2 * w + 1][0], q[2 * w + 1][1]);
    } else {
      mma(sums[w % 2],
          {bytes_as_bf16<0, 1>(first, first), bytes_as_bf16<0, 1>(second, second),
           bytes_as_bf16<2, 3>(first, first), bytes_as_bf16<2, 3>(second, second)},
          q[w][0], q[w][1]);
    }
  }
  /// scores[2j + h]: of the entry in row g + 8j and head 2c + h.
  template <typename... Scale>
  __device__ __forceinline__ void score(Entries& e, const std::uint32_t (&q)[kProducts][2],
                                        const float (&totals)[2], float (&scores)[4], Scale... scale) const {
    float sums[2][4] = {};
#pragma unroll
    for (int w = 0; w < kKeyWords; ++w) multiply(sums, q, e.keys[0][w], e.keys[1][w], w);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const CodeScale s = CodeScale::of(e.key_scales[j]);
      const float step = (s.step * ... * scale), low = fmaf(-kAdded, s.step, s.low);
#pragma unroll
      for (int h = 0; h < 2; ++h)
        scores[2 * j + h] = fmaf(step, sums[0][2 * j + h] + sums[1][2 * j + h], low * totals[h]);
    }
    if (step_ * 16 + 16 <= entries_) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (step_ * 16 + mine_ + 8 * j < entries_) continue;
      scores[2 * j] = scores[2 * j + 1] = -INFINITY;
      e.value_scales[j] = 0;
    }
  }
  /// Makes the greatest score so far what exponentials are less than.
  __device__ __forceinline__ void raise(const float (&scores)[4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = fmaxf(scores[h], scores[2 + h]);
#pragma unroll
      for (int other = 4; other < 32; other *= 2) most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, other));
      most = fmaxf(max_[h], most);
      const float shrink = fast_exp2(max_[h] - most);
      max_[h] = most;
      sum_[h] *= shrink;
      offset_[h] *= shrink;
#pragma unroll
      for (int t = 0; t < kDim / 16; ++t) {
        values_[t][h] *= shrink;
        values_[t][2 + h] *= shrink;
      }
      added_[h] *= shrink;
    }
  }
  /// The values, by the scores' exponentials.
  __device__ __forceinline__ void add(const Entries& e, const float (&scores)[4]) {
    // What sums are relative to need not be the greatest score, only near it: it seldom has to be raised.
    constexpr float kNear = 8;
    const float above = fmaxf(fmaxf(scores[0], scores[2]) - max_[0], fmaxf(scores[1], scores[3]) - max_[1]);
    if (__any_sync(kFullWarp, above > kNear)) raise(scores);
    float weights[4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const CodeScale s = CodeScale::of(e.value_scales[j]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float x = fast_exp2(scores[2 * j + h] - max_[h]);
        sum_[h] += x;
        offset_[h] = fmaf(x, s.low, offset_[h]);
        weights[2 * j + h] = x * s.step;
      }
    }
    const std::uint32_t b0 = turn_over(pack_bf16(weights[0], weights[1])),
                        b1 = turn_over(pack_bf16(weights[2], weights[3]));
    constexpr std::uint32_t kPair = 0x43004300U;  // 128, twice
    if constexpr (kBits == 4) mma(added_, {kPair, kPair, kPair, kPair}, b0, b1);
#pragma unroll
    for (int w = 0; w < kValueWords; ++w) {
      const auto& v = e.values;
      if constexpr (kBits == 4) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const unsigned pick = half == 0 ? 0x5410 : 0x7632;
          const std::uint32_t low = __byte_perm(v[0][w], v[1][w], pick),
                              high = __byte_perm(v[2][w], v[3][w], pick);
#pragma unroll
          for (int i = 0; i < 2; ++i)
            mma(values_[4 * w + 2 * half + i],
                {nibbles_as_bf16(low >> 8 * i), nibbles_as_bf16(low >> (8 * i + 4)),
                 nibbles_as_bf16(high >> 8 * i), nibbles_as_bf16(high >> (8 * i + 4))},
                b0, b1);
        }
      } else {
        mma(values_[2 * w],
            {bytes_as_bf16<0, 0>(v[0][w], v[1][w]), bytes_as_bf16<1, 1>(v[0][w], v[1][w]),
             bytes_as_bf16<0, 0>(v[2][w], v[3][w]), bytes_as_bf16<1, 1>(v[2][w], v[3][w])},
            b0, b1);
        mma(values_[2 * w + 1],
            {bytes_as_bf16<2, 2>(v[0][w], v[1][w]), bytes_as_bf16<3, 3>(v[0][w], v[1][w]),
             bytes_as_bf16<2, 2>(v[2][w], v[3][w]), bytes_as_bf16<3, 3>(v[2][w], v[3][w])},
            b0, b1);
      }
    }
  }

  WalkedCodes of_;
  int block_bytes_, g_, c_, mine_;       // mine_: the entry of a step in row g
  int keys_at_, values_at_, scales_at_;  // in a block: what this lane has of its first step
  int entries_ = 0, step_ = 0, end_ = 0;
  int index_ = 0, inside_ = 0, number_ = 0;  // of the step whose codes are asked for next: its block in the
                                             // table, the entry in it, and what the table has
  int apart_ = 0;                            // whole blocks from a step to the warp's next
  Entries coming_[kAhead];
  // Of the heads 2c and 2c+1: what scores are relative to; this lane's sums of exponentials; what its entries
  // give to all elements alike; and 128 times the values' weights.
  float max_[2] = {-INFINITY, -INFINITY}, sum_[2] = {}, offset_[2] = {}, added_[4] = {};
  float values_[kDim / 16][4] = {};  // [t][2i + h]: of head 2c+h the element D/8 g + 2t + i
};

}  // namespace fathom::cuda
