// The ring in shared memory through which weights come, where warps of their own bring them, and how those
// who fill it (decode_feed.cuh) and those who empty it (decode_fed_product.cuh) know of each other.
//
// A place of the ring is one unit for each warp that computes. A feeding warp loads for two of these, lane
// for lane, and nobody else reads or writes these warps' part of a place: what they have to agree on is
// between the three. Units that are multiplied at once are a batch, which does not go round the end of the
// ring: where it would, both sides pass over the places that are left there.
//
// Batches are numbered through the whole step, and a barrier says when one is there: the feeding lanes
// arrive as their copies do. A place is used once each time that the ring goes round, and a barrier of its
// own says when both warps have read it.
#pragma once

#include <cstdint>

#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/device/mma.cuh"

namespace fathom::cuda {

inline constexpr int kFedWarps = kDecodeWarps / kDecodeFeeders;
inline constexpr int kRingBatches = 64;  // more than the ring holds

/// What a decision came to, once it is known.
enum class Decided : int { NotYet, Skipped, Computed };

struct RingMeeting {
  std::uint64_t there[kDecodeFeeders][kRingBatches];  // a batch, by number
  std::uint64_t read[kDecodeFeeders][kFedRingMost];   // a place
  int decided[kDecodeRouted];                         // Decided, by number of the routed layer
  int given_up[kDecodeFeeders];  // 1 + the number of the last decision that was not what was expected, times
                                 // kGivenUpUnit, and the batches that were brought in vain
  static constexpr int kGivenUpUnit = 1024;
};

/// Barriers in shared memory (mbarrier): a phase is over when so many have arrived as it is made for.
__device__ __forceinline__ void make_barrier(std::uint64_t& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void arrive_at(unsigned barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}\n" ::"r"(barrier)
               : "memory");
}
/// When the copies that this thread has asked for are there.
__device__ __forceinline__ void arrive_with_copies_at(unsigned barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
/// Whether a phase is over, of those of even numbers or of odd ones. May wait a little.
__device__ __forceinline__ bool is_over(unsigned barrier, unsigned parity) {
  unsigned yes;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(yes)
      : "r"(barrier), "r"(parity)
      : "memory");
  return yes != 0;
}

/// What another warp of the block told.
__device__ __forceinline__ int look(const int& word) {
  int value;
  asm volatile("ld.acquire.cta.shared.s32 %0, [%1];" : "=r"(value) : "r"(shared_address(&word)) : "memory");
  return value;
}
__device__ __forceinline__ void tell(int& word, int value) {
  asm volatile("st.release.cta.shared.s32 [%0], %1;" ::"r"(shared_address(&word)), "r"(value) : "memory");
}

}  // namespace fathom::cuda
