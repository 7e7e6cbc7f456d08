// One warp's passage over entries of a cache of codes (kernels/cache_codes.h): what entry_walk.cuh does over
// one of bf16, in its steps of 16 entries.
//
// From codes to sums is a chain in which each link waits for the last: products, scores, the greatest of
// them, exponentials, what turns them over, products. So a warp does some steps side by side, a pass, and
// asks for the greatest score once for all. Codes come through shared memory where there is room, some passes
// ahead (code_words.cuh says why not in registers); each thread has what it copied itself, so that nobody
// meets.
#pragma once

#include <cstdint>

#include "kernels/cuda/device/code_sums.cuh"

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
  using Sums = CodeSums<kDim, kBits, kWide>;
  using Entries = typename Sums::Entries;

 public:
  /// `room`: of shared memory this thread's first 16 bytes, of kPlaces * kWide * loads_of_step of them; each
  /// kDecodeThreads * 16 behind the last.
  __device__ explicit CodeWalk(const WalkedCodes& of, unsigned room = 0) : of_(of), room_(room) {
    const int heads = of.kv_heads * of.block;
    const int block_bytes = 2 * heads * (kBytes + kScaleBytes), head = of.head * of.block;
    pitch_ = static_cast<unsigned>(of.stride * block_bytes);
    const std::uint8_t* const first = of.pool + static_cast<std::int64_t>(of.offset) * block_bytes;
    key_codes_ = first + (head + sums_.mine) * kBytes + sums_.c * (4 * kRun);
    value_codes_ = first + (heads + head + sums_.c) * kBytes + sums_.g * (4 * kValueWords);
    scales_ = first + 2 * heads * kBytes + (head + sums_.mine) * kScaleBytes;
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
    std::uint32_t q[Sums::kProducts][2] = {};
    float total = 0;  // of head g's query
    if (sums_.g < group) sums_.read_query(queries + sums_.g * AttentionRoom<kDim>::kStride, q, total);
    total += __shfl_xor_sync(kFullWarp, total, 1);
    total += __shfl_xor_sync(kFullWarp, total, 2);
    const float totals[2] = {(__shfl_sync(kFullWarp, total, 8 * sums_.c) * ... * scale),
                             (__shfl_sync(kFullWarp, total, 8 * sums_.c + 4) * ... * scale)};
#pragma unroll 1
    for (; step_ < end_; step_ += kPass) {
      float scores[kWide][4];
      if constexpr (kPlaces == 0) {
        const int next = step_ + kPass;
        Place places[kWide];
        if (next < end_) next_places(next, places);
        sums_.score(coming_, q, totals, scores, scale...);
        hide(coming_, scores);
        for_steps_of(next, [&](int p) { load_keys(coming_[p], places[p]); });
        sums_.add(coming_, scores);
        for_steps_of(next, [&](int p) { load_values(coming_[p], places[p]); });
      } else {
        Entries e[kWide];
        wait_copies<kPlaces - 1>();
#pragma unroll
        for (int p = 0; p < kWide; ++p) take(e[p], place_ + p * kStepBytes);
        sums_.score(e, q, totals, scores, scale...);
        hide(e, scores);
        copy_pass(step_ + kPlaces * kPass, place_);  // what was there has been taken
        place_ = place_ == (kPlaces - 1) * kPlaceBytes ? 0 : place_ + kPlaceBytes;
        sums_.add(e, scores);
      }
    }
  }
  /// What the walk has found, for the block's other warps.
  __device__ __forceinline__ void leave(AttentionRoom<kDim>& room, int warp, int group) {
    sums_.leave(room, warp, group);
  }

 private:
  static constexpr int kBytes = kDim * kBits / 8;  // of a head of an entry
  static constexpr int kScaleBytes = static_cast<int>(kCacheScaleBytes);
  static constexpr int kKeyWords = Sums::kKeyWords, kValueWords = Sums::kValueWords, kRun = Sums::kRun;
  static constexpr int kApart = 16 * kDecodeWarps;    // entries from a step to the warp's next
  static constexpr int kPass = kWide * kDecodeWarps;  // steps from a pass to the warp's next
  static constexpr int kLoad = kDecodeThreads * 16;   // from a thread's 16 bytes to its next
  static constexpr int kStepBytes = loads_of_step(kDim, kBits) * kLoad;
  static constexpr int kPlaceBytes = kWide * kStepBytes;
  static constexpr int kScaleWord = 2 * kKeyWords + 4 * kValueWords;  // of a step, where its scales begin
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
  // hide() looks after the scales.
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

  /// Of entries that are not there scores and values count nothing.
  __device__ __forceinline__ void hide(Entries (&e)[kWide], float (&scores)[kWide][4]) const {
    // Only the last pass has steps that are not whole, or not there.
    if ((step_ + kPass - kDecodeWarps) * 16 + 16 <= entries_ && step_ + kPass - kDecodeWarps < end_) return;
#pragma unroll
    for (int p = 0; p < kWide; ++p) {
      const int step = step_ + p * kDecodeWarps, there = step < end_ ? entries_ - step * 16 : 0;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (sums_.mine + 8 * j < there) continue;
        scores[p][2 * j] = scores[p][2 * j + 1] = -INFINITY;
        e[p].value_scales[j] = 0;
      }
    }
  }

  WalkedCodes of_;
  Sums sums_;
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
};

}  // namespace fathom::cuda
