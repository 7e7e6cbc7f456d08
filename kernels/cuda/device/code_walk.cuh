// One warp's passage over entries of a cache of codes (kernels/cache_codes.h): what entry_walk.cuh does over
// one of bf16, in its steps of 16 entries.
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
//
// From codes to sums is a chain in which each link waits for the last: products, scores, the greatest of
// them, exponentials, what turns them over, products. So a warp does some steps side by side, a pass, and
// asks for the greatest score once for all. Codes come through shared memory where there is room, some passes
// ahead (code_words.cuh says why not in registers); each thread has what it copied itself, so that nobody
// meets.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/device/cache_codes.cuh"
#include "kernels/cuda/device/code_words.cuh"
#include "kernels/cuda/device/decode_deal.cuh"
#include "kernels/cuda/device/entry_walk.cuh"

namespace fathom::cuda {

/// Where a walk's entries are: a cache's pool of codes, entries of its blocks, key/value heads; a row's
/// blocks, of which block b is block b * stride + offset of the pool; and the walk's key/value head.
struct WalkedCodes {
  const std::uint8_t* pool;
  int block, kv_heads;
  const std::int32_t* table;
  int stride, offset, head;
};

/// 16 bytes of a thread that a step's codes and scales are.
constexpr int loads_of_step(int dim, int bits) { return (dim * bits / 32 + 4) / 4; }

/// kWide: steps of a pass; kPlaces: passes that have room in shared memory, on their way there while a warp
/// computes; 0: one pass is on its way, into registers.
template <int kDim, int kBits, int kWide, int kPlaces>
class CodeWalk {
 public:
  /// `room`: of shared memory this thread's first 16 bytes, of kPlaces * kWide * loads_of_step of them; each
  /// kDecodeThreads * 16 behind the last.
  __device__ explicit CodeWalk(const WalkedCodes& of, unsigned room = 0) : of_(of), room_(room) {
    const int lane = static_cast<int>(threadIdx.x) % 32, heads = of.kv_heads * of.block;
    const int block_bytes = 2 * heads * (kBytes + kScaleBytes), head = of.head * of.block;
    g_ = lane / 4;
    c_ = lane % 4;
    mine_ = g_ % 2 * 4 + g_ / 2;
    pitch_ = static_cast<unsigned>(of.stride * block_bytes);
    const std::uint8_t* const first = of.pool + static_cast<std::int64_t>(of.offset) * block_bytes;
    key_codes_ = first + (head + mine_) * kBytes + c_ * (4 * kRun);
    value_codes_ = first + (heads + head + c_) * kBytes + g_ * (4 * kValueWords);
    scales_ = first + 2 * heads * kBytes + (head + mine_) * kScaleBytes;
    value_scales_ = static_cast<unsigned>(heads * kScaleBytes);
  }

  /// The first steps' entries begin to come. `first`: the block of the table that this warp's first step lies
  /// in, where that is known; negative: to be looked up.
  __device__ __forceinline__ void begin(const StepRange& range, int entries, int first = -1) {
    entries_ = entries;
    step_ = range.first + static_cast<int>(threadIdx.x) / 32;
    end_ = min(range.end, (entries + 15) / 16);  // a row without entries has a step, of which nothing is read
    if (step_ >= end_) return;
    const int index = step_ * 16 / of_.block;
    at_ = of_.table + index;
    insides_[0] = step_ * 16 - index * of_.block;
    numbers_[0] = first >= 0 ? first : *at_;
    apart_ = kApart / of_.block;
#pragma unroll
    for (int p = 1; p < kWide; ++p) look_up(p, step_ + p * kDecodeWarps);
    if constexpr (kPlaces == 0) {
#pragma unroll
      for (int p = 0; p < kWide; ++p) coming_[p] = {};  // there may be no second step
      Place places[kWide];
      next_places(step_, places);
      for_steps_of(step_, [&](int p) {
        load_keys(coming_[p], places[p]);
        load_values(coming_[p], places[p]);
      });
    } else {
#pragma unroll 1
      for (int i = 0; i < kPlaces; ++i) copy_pass(step_ + i * kPass, i * kPlaceBytes);
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
    for (; step_ < end_; step_ += kPass) {
      float scores[kWide][4];
      if constexpr (kPlaces == 0) {
        const int next = step_ + kPass;
        Place places[kWide];
        if (next < end_) next_places(next, places);
        score(coming_, q, totals, scores, scale...);
        for_steps_of(next, [&](int p) { load_keys(coming_[p], places[p]); });
        add(coming_, scores);
        for_steps_of(next, [&](int p) { load_values(coming_[p], places[p]); });
      } else {
        Entries e[kWide];
        wait_copies<kPlaces - 1>();
#pragma unroll
        for (int p = 0; p < kWide; ++p) take(e[p], place_ + p * kStepBytes);
        score(e, q, totals, scores, scale...);
        copy_pass(step_ + kPlaces * kPass, place_);  // what was there has been taken
        place_ = place_ == (kPlaces - 1) * kPlaceBytes ? 0 : place_ + kPlaceBytes;
        add(e, scores);
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
        room.max[warp][head] = base_[h] == -INFINITY && sum_[h] != 0 ? 0 : base_[h] + kWeightBits;
        room.sum[warp][head] = sum_[h] * kWeight;
      }
      const float offset = offset_[h] * kWeight;
#pragma unroll
      for (int t = 0; t < kDim / 16; ++t) {
        *reinterpret_cast<float2*>(&room.values[warp][head][kDim / 8 * g_ + 2 * t]) =
            float2{fmaf(values_[t][h], kEven, offset), fmaf(values_[t][2 + h], kOdd, offset)};
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
  static constexpr int kPass = kWide * kDecodeWarps;          // steps from a pass to the warp's next
  static constexpr int kLoad = kDecodeThreads * 16;           // from a thread's 16 bytes to its next
  static constexpr int kStepBytes = loads_of_step(kDim, kBits) * kLoad;
  static constexpr int kPlaceBytes = kWide * kStepBytes;
  static constexpr int kScaleWord = 2 * kKeyWords + 4 * kValueWords;  // of a step, where its scales begin
  // What one is in queries and in weights, so that sums with codes are far from the smallest numbers, and
  // from the greatest: queries of 2^20 and values of 2^50 are no harm.
  static constexpr float kQueryUnit = 0x1p104F, kScore = 0x1p29F;  // their product counts 2^-133
  static constexpr float kWeightBits = 64, kWeight = 0x1p-64F;
  // Of sums of values, the elements of rows g and g+8. kWeight's and the codes' 2^133 in one.
  static constexpr float kEven = 0x1p69F, kOdd = kBits == 4 ? kEven / 16 : kEven;

  /// A step's, as a lane has them: of the two entries of its rows the keys and both scales, and of four the
  /// values.
  struct Entries {
    std::uint32_t keys[2][kKeyWords], values[4][kValueWords];
    std::uint32_t key_scales[2], value_scales[2];
  };
  /// Where a step is, in bytes: its codes and its scales, behind those of the first entry of the table's
  /// block 0.
  struct Place {
    std::uint64_t codes, scales;
  };

  /// what(p): of the pass whose first step is number `step` the steps that are there.
  template <typename What>
  __device__ __forceinline__ void for_steps_of(int step, What&& what) const {
#pragma unroll
    for (int p = 0; p < kWide; ++p) {
      if (step + p * kDecodeWarps < end_) what(p);
    }
  }
  /// Where step p of a pass is, of number `step`: the one behind that which was looked up last.
  __device__ __forceinline__ void look_up(int p, int step) {
    const int inside = insides_[(p + kWide - 1) % kWide] + kApart - apart_ * of_.block;
    const bool over = inside >= of_.block;
    insides_[p] = inside - (over ? of_.block : 0);
    at_ += over ? apart_ + 1 : apart_;
    if (step < end_) numbers_[p] = *at_;
  }
  /// Of the pass in line, whose first step is number `step`, and looks up those of the one behind.
  __device__ __forceinline__ void next_places(int step, Place (&places)[kWide]) {
#pragma unroll
    for (int p = 0; p < kWide; ++p) {
      const std::uint64_t block = static_cast<unsigned>(numbers_[p]) * std::uint64_t{pitch_};
      const auto inside = static_cast<unsigned>(insides_[p]);
      places[p] = {block + inside * std::uint64_t{kBytes}, block + inside * std::uint64_t{kScaleBytes}};
    }
#pragma unroll
    for (int p = 0; p < kWide; ++p) look_up(p, step + kPass + p * kDecodeWarps);
  }
  // Entries that are not there are read as well, since blocks are whole steps: any code is a number, and
  // score() looks after the scales.
  __device__ __forceinline__ void load_keys(Entries& e, const Place& p) const {
    const std::uint8_t* const codes = key_codes_ + p.codes;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int r = 0; r < kKeyWords / kRun; ++r) {
        std::uint32_t words[kRun];
        load_words(words, codes + 8 * j * kBytes + 16 * kRun * r);
#pragma unroll
        for (int w = 0; w < kRun; ++w) e.keys[j][kRun * r + w] = words[w];
      }
    }
    load_scales(e.key_scales, p, 0);
  }
  __device__ __forceinline__ void load_values(Entries& e, const Place& p) const {
    const std::uint8_t* const codes = value_codes_ + p.codes;
#pragma unroll
    for (int i = 0; i < 4; ++i) load_words(e.values[i], codes + 4 * i * kBytes);
    load_scales(e.value_scales, p, value_scales_);
  }
  __device__ __forceinline__ void load_scales(std::uint32_t (&scales)[2], const Place& p,
                                              unsigned behind) const {
    const auto* const from = reinterpret_cast<const std::uint32_t*>(scales_ + p.scales + behind);
    scales[0] = __ldcs(from);
    scales[1] = __ldcs(from + 8);
  }

  /// The same by way of shared memory: a step's words are one behind the other there, four in 16 bytes.
  __device__ __forceinline__ void copy_pass(int step, int place) {
    if (step < end_) {
      Place places[kWide];
      next_places(step, places);
      for_steps_of(step, [&](int p) { copy_step(places[p], room_ + place + p * kStepBytes); });
    }
    commit_copies();  // also where there is none: they are waited for by their number
  }
  __device__ __forceinline__ void copy_step(const Place& p, unsigned to) const {
    const auto word = [&](int w) { return to + w / 4 * kLoad + w % 4 * 4; };
    const std::uint8_t *const keys = key_codes_ + p.codes, *const values = value_codes_ + p.codes;
    const std::uint8_t *const scales = scales_ + p.scales, *const value_scales = scales + value_scales_;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int r = 0; r < kKeyWords / kRun; ++r)
        copy_words<kRun>(word(j * kKeyWords + r * kRun), keys + 8 * j * kBytes + 16 * kRun * r);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      copy_words<kValueWords>(word(2 * kKeyWords + i * kValueWords), values + 4 * i * kBytes);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      copy_words<1>(word(kScaleWord + j), scales + 8 * j * kScaleBytes);
      copy_words<1>(word(kScaleWord + 2 + j), value_scales + 8 * j * kScaleBytes);
    }
  }
  __device__ __forceinline__ void take(Entries& e, int at) const {
    std::uint32_t words[kScaleWord + 4];
#pragma unroll
    for (int i = 0; i < loads_of_step(kDim, kBits); ++i) {
      const uint4 v = load_in_turn(room_ + at + i * kLoad);
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
#pragma unroll
    for (int w = 0; w < 2 * kKeyWords; ++w) e.keys[w / kKeyWords][w % kKeyWords] = words[w];
#pragma unroll
    for (int w = 0; w < 4 * kValueWords; ++w)
      e.values[w / kValueWords][w % kValueWords] = words[2 * kKeyWords + w];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      e.key_scales[j] = words[kScaleWord + j];
      e.value_scales[j] = words[kScaleWord + 2 + j];
    }
  }

  /// Paired as multiply() pairs the codes.
  __device__ __forceinline__ void read_query(const bf16* query, std::uint32_t (&q)[kProducts][2],
                                             float& total) const {
    constexpr int kOfWord = 32 / kBits;
#pragma unroll
    for (int w = 0; w < kKeyWords; ++w) {
      const bf16* const of_word = query + ((w / kRun * 4 + c_) * kRun + w % kRun) * kOfWord;
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
  /// scores[p][2j + h]: of step p the entry in row g + 8j and head 2c + h.
  template <typename... Scale>
  __device__ __forceinline__ void score(Entries (&e)[kWide], const std::uint32_t (&q)[kProducts][2],
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
    // Only the last pass has steps that are not whole, or not there.
    if ((step_ + kPass - kDecodeWarps) * 16 + 16 <= entries_ && step_ + kPass - kDecodeWarps < end_) return;
#pragma unroll
    for (int p = 0; p < kWide; ++p) {
      const int step = step_ + p * kDecodeWarps, there = step < end_ ? entries_ - step * 16 : 0;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (mine_ + 8 * j < there) continue;
        scores[p][2 * j] = scores[p][2 * j + 1] = -INFINITY;
        e[p].value_scales[j] = 0;
      }
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

  WalkedCodes of_;
  int g_, c_, mine_;  // mine_: the entry of a step in row g
  // What this lane has of the first step of the table's block 0: its keys, values and the keys' scales; the
  // values' scales behind these; and bytes from a block of the table to the next.
  const std::uint8_t *key_codes_, *value_codes_, *scales_;
  unsigned value_scales_, pitch_;
  int entries_ = 0, step_ = 0, end_ = 0;
  int apart_ = 0;                     // whole blocks from a step to the warp's next
  const std::int32_t* at_ = nullptr;  // in the table, of the step that was looked up last
  // Of the pass whose codes are asked for next: what the table has, and the entries in these blocks.
  int numbers_[kWide] = {}, insides_[kWide] = {};
  unsigned room_;
  int place_ = 0;  // of the pass that is computed next, in bytes
  Entries coming_[kPlaces == 0 ? kWide : 1];
  // Of the heads 2c and 2c+1: what scores are relative to, kWeightBits below one that is near the greatest;
  // this lane's sums of exponentials; and what its entries give to all elements alike.
  float base_[2] = {-INFINITY, -INFINITY}, sum_[2] = {}, offset_[2] = {};
  float values_[kDim / 16][4] = {};  // [t][2i + h]: of head 2c+h the element D/8 g + 2t + i
};

}  // namespace fathom::cuda
