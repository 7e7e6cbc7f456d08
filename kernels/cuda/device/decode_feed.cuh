// The warps of a decoding step that bring weights. They go through the step's matrices by themselves, as far
// ahead of the warps that compute as the ring has room, so that memory is read while those meet other blocks
// of threads, stage rows or attend to entries.
//
// They keep few loads under way. A multiprocessor's part of the memory is busy with some 30 KB (an H200), and
// all that is asked for beyond stands in line before the few words that others wait for: rows, queries,
// entries. The ring holds what has come, not what was asked for.
//
// What they bring is the first to go from the second cache (read_once): a step reads hundreds of times what
// that holds, and the words that every layer waits for, norms and rows and tables, are to be found there.
//
// Which matrix follows a decision is a guess until it is known. Where it was wrong, the batches since are
// passed over by both sides.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/device/decode_lines.cuh"
#include "kernels/cuda/device/decode_order.cuh"
#include "kernels/cuda/device/decode_ring.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/read_once.cuh"

namespace fathom::cuda {

/// One of the feeding warps, as one of its lanes goes through the step. Up to eight rows x
/// (decode_lines.cuh).
class WeightFeeder {
 public:
  /// `matrices`: by product. `ring`: of DecodeStep::ring places.
  __device__ WeightFeeder(const DecodeOrder& order, const Matrix* matrices, RingMeeting& meeting,
                          unsigned char* ring)
      : order_(order),
        matrices_(matrices),
        meeting_(meeting),
        feeder_(static_cast<int>(threadIdx.x) / 32 - kDecodeWarps),
        lane_(static_cast<int>(threadIdx.x) % 32),
        ring_(shared_address(ring) + static_cast<unsigned>((feeder_ * kFedWarps * 32 + lane_) * 16)) {}

  __device__ void run() {
    DecodePlace now = order_.first_of(0);
    bool is_open = false;
    for (;;) {
      if (order_.has_product(now)) {
        if (!is_open) open(now);
        while (left_ > 0) feed(nullptr);
      }
      if (now.product == DecodeProduct::Head) break;
      DecodePlace next = order_.expected_after(now);
      is_open = false;
      if (now.product == DecodeProduct::Decide) {
        const int number = order_.layers[now.layer].routed;
        const int& decided = meeting_.decided[number];
        int fed = 0;
        if (order_.has_product(next)) {
          open(next);
          is_open = true;
          while (left_ > 0 && feed(&decided)) ++fed;
        }
        while (look(decided) == 0) __nanosleep(20);
        const DecodePlace known =
            order_.after_decision(now.layer, look(decided) == static_cast<int>(Decided::Computed));
        if (!(known == next)) {
          is_open = false;
          wait_copies<0>();
          __syncwarp();
          if (lane_ == 0) tell(meeting_.given_up[feeder_], (number + 1) * RingMeeting::kGivenUpUnit + fed);
        }
        next = known;
      }
      now = next;
    }
    wait_copies<0>();
  }

 private:
  static constexpr int kColumns = kLineColumns;
  static constexpr int kLoad = kRingLoad;
  static constexpr int kGroup = 4;    // units of each warp that are asked for and waited for together
  static constexpr int kPending = 2;  // groups under way while the next one is not yet asked for

  /// The matrix's batches are next.
  __device__ __forceinline__ void open(const DecodePlace& p) {
    const Matrix& m = matrices_[static_cast<int>(p.product)];
    const int row = lane_ / 8, warp = feeder_ * kFedWarps, part = warp & (m.parts - 1);
    const int quad = m.parts < kDecodeWarps ? warp / (kDecodeWarps / 2) : 0;
    at_once_ = m.at_once;
    both_ = m.at_once % 2 == 0;
    const int passes = !both_ && m.parts == kDecodeWarps ? 2 : 1;
    batches_ = batch_ = m.at_once == 1 ? m.units : m.batches;
    left_ = m.tiles * passes * batches_;
    const int advance = batches_ * m.at_once * (both_ ? kColumns / 2 : kColumns);
    const int tile_size = (m.half > 0 ? 4 : 8) * m.width, quad_size = max(m.half, 4) * m.width;
    next_ = (passes == 2 ? quad_size : tile_size) - advance;
    next_sum_ = passes == 2 ? tile_size - 2 * advance : 2 * next_;
    const auto* const column =
        static_cast<const __nv_bfloat16*>(order_.weights_of(p)) + part * m.units * kColumns + lane_ % 8 * 8;
    at_ = column + static_cast<std::int64_t>(m.row(m.first, 4 * quad + row)) * m.width;
    at_other_ = column + static_cast<std::int64_t>(m.row(m.first, (4 + row) % 8)) * m.width;
    last_ = column + static_cast<std::int64_t>(m.rows - 1) * m.width;
    apart_ = m.units * kColumns;
    // Of matrices whose rows are not cut evenly: columns of a row from the first warp's first one.
    columns_ = m.width - part * m.units * kColumns;
    is_whole_ = m.width % (m.parts * kColumns) == 0;
  }

  /// The next batch, when there is room for it. False: `watched` is not zero any more, and it was not fed.
  __device__ __forceinline__ bool feed(const int* watched) {
    const bool round = place_ + at_once_ > order_.s.ring;
    const int place = round ? 0 : place_;
    const unsigned turn = round ? turn_ ^ 1U : turn_;
    const unsigned read = shared_address(&meeting_.read[feeder_][place + min(lane_, at_once_ - 1)]);
    while (!__all_sync(0xffffffffU, is_over(read, turn ^ 1U))) {
      if (watched != nullptr && look(*watched) != 0) return false;
      __nanosleep(20);
    }
    unsigned to = ring_ + static_cast<unsigned>(place * kLoad);
    if (both_) {
#pragma unroll 1
      for (int i = 0; i < at_once_; i += kGroup, to += kGroup * kLoad) {
#pragma unroll
        for (int w = 0; w < kFedWarps; ++w) {
          const __nv_bfloat16 *const a = at_ + w * apart_, *const b = at_other_ + w * apart_;
          copy(to + w * 512, a);
          copy(to + w * 512 + kLoad, b);
          copy(to + w * 512 + 2 * kLoad, a + kColumns);
          copy(to + w * 512 + 3 * kLoad, b + kColumns);
        }
        at_ += 2 * kColumns;
        at_other_ += 2 * kColumns;
        keep_few();
      }
    } else if (is_whole_) {
#pragma unroll 1
      for (int left = at_once_; left > 0; left -= kGroup, to += kGroup * kLoad) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
#pragma unroll
          for (int w = 0; w < kFedWarps; ++w) {
            if (j < left) copy(to + w * 512 + j * kLoad, at_ + w * apart_ + j * kColumns);
          }
        }
        at_ += min(left, kGroup) * kColumns;
        keep_few();
      }
    } else {
      feed_unit(to);
    }
    arrive_with_copies_at(shared_address(&meeting_.there[feeder_][number_ % kRingBatches]));
    ++number_;
    place_ = place + at_once_;
    turn_ = turn;
    --left_;
    if (--batch_ > 0) return true;
    batch_ = batches_;
    at_ += next_;
    at_ = at_ < last_ ? at_ : last_;
    if (both_) {
      at_other_ += next_;
      at_other_ = at_other_ < last_ ? at_other_ : last_;
    } else {
      next_ = next_sum_ - next_;
    }
    return true;
  }
  /// One unit of each warp, if it has so many. A row's last unit may have half of its columns: the lanes of
  /// the other half read these too.
  __device__ __forceinline__ void feed_unit(unsigned to) {
    const int before = (batches_ - batch_) * kColumns;
#pragma unroll
    for (int w = 0; w < kFedWarps; ++w) {
      const int left = columns_ - w * apart_ - before;
      const int back = lane_ % 8 * 8 >= left ? 32 : 0;
      if (left > 0) copy(to + w * 512, at_ + w * apart_ - back);
    }
    at_ += kColumns;
    keep_few();
  }
  static __device__ __forceinline__ void keep_few() {
    commit_copies();
    wait_copies<kPending>();
  }
  static __device__ __forceinline__ void copy(unsigned to, const __nv_bfloat16* from) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to),
                 "l"(from), "l"(read_once())
                 : "memory");
  }

  const DecodeOrder& order_;
  const Matrix* const matrices_;
  RingMeeting& meeting_;
  const int feeder_, lane_;
  const unsigned ring_;             // address of this lane's 16 bytes of the first warp in the first place
  unsigned number_ = 0, turn_ = 0;  // of the next batch; how often the ring went round: the lowest bit
  int place_ = 0;
  // The open matrix, as FedStream goes through it; elements from a warp's units to the other's.
  bool both_ = false, is_whole_ = true;
  int at_once_ = 1, batches_ = 0, batch_ = 0, left_ = 0, next_ = 0, next_sum_ = 0, apart_ = 0, columns_ = 0;
  const __nv_bfloat16 *at_ = nullptr, *at_other_ = nullptr, *last_ = nullptr;
};

}  // namespace fathom::cuda
