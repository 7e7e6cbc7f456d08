// A step of decoding (kernels/decoder.h) is one launch (device/decode_whole.cuh): which kernel for so many
// rows, and what it takes of shared memory. The kernels over caches of numbers are compiled here, those over
// caches of codes in files of their own: each kind takes more than a minute.
#include <algorithm>
#include <iterator>

#include "kernels/cuda/check.h"
#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/device/decode_whole.cuh"
#include "kernels/error.h"

namespace fathom::cuda {

namespace {

const void* kernel_for(int kv_bits, const DecodeKind& k) {
  if (kv_bits == 16) return decode_kernel_over<16>(k);
  if (kv_bits == 8) return decode_kernel_kv8(k);
  if (kv_bits == 4) return decode_kernel_kv4(k);
  throw InternalError("[decode_step] keys and values of 16, 8 or 4 bits");
}

/// What a launch takes: the fixed parts, and room for the phase that wants the most.
template <int kHalves, bool kFed>
std::size_t shared_bytes(const DecodeStep& s, int head_dim, int rows, int blocks, int ring_bytes) {
  const bool codes = s.bits < 16;
  const auto staged = [&](int width, bool by_codes) {
    const int bytes =
        by_codes ? StagedCodes::bytes(width, rows) : StagedRows<kHalves, kFed>::bytes(width, rows);
    return rounded_shared(static_cast<std::size_t>(bytes));
  };
  // The rows x, and the sums of all warps of the most tiles that a block of threads has. The head
  // takes as many at a time as gate and up have, in the room of these (DecodeResults::multiply).
  const auto sums = [&](int out, bool halves) {
    return static_cast<std::size_t>(kDecodeWarps * most_tiles(out, halves, blocks) * rows * 8) *
           sizeof(float);
  };
  const auto product = [&](int out, int in, bool halves) { return staged(in, codes) + sums(out, halves); };
  const int group = s.heads / s.kv_heads;
  const auto attention = static_cast<std::size_t>(head_dim == 64 ? AttentionRoom<64>::bytes(group)
                                                                 : AttentionRoom<128>::bytes(group));
  const std::size_t most =
      std::max({attention, product((s.heads + 2 * s.kv_heads) * head_dim, s.width, false),
                product(s.width, s.heads * head_dim, false), product(2 * s.hidden, s.width, true),
                product(s.width, s.hidden, false), staged(s.width, false) + sums(2 * s.hidden, true),
                staged(s.width, false) + sums(s.predictor_hidden, false)});
  return DecodeLayout(s, s.bits, rows, head_dim, blocks, ring_bytes).room + rounded_shared(most);
}

}  // namespace

DecodePlan plan_decode(const DecodeStep& s, int head_dim, int rows, int blocks, std::size_t shared) {
  const auto variant = [&]<DecodeRing kAhead, int kBits>() -> DecodePlan {
    constexpr int kHalves = halves_of(kAhead);
    if (rows > 8 * kHalves || !has_ring(kAhead, kBits, s.kv_bits)) return {};
    if (is_fed(kAhead, kBits, s.kv_bits)) {
      const auto bytes = [&](int ring) {
        return shared_bytes<kHalves, true>(s, head_dim, rows, blocks, ring * kRingLoad);
      };
      if (bytes(kFedRingLeast) > shared) return {};
      DecodePlan plan{kernel_for(16, {kAhead, head_dim, 16}), kDecodeThreads + 32 * kDecodeFeeders};
      // The first cache gets 32 KB more with each: shared memory is had in such steps.
      std::size_t limit = shared;
      for (int i = 0; i < kDecodeRooms; ++i, limit -= 32 * 1024) {
        DecodeRoom& room = plan.rooms[i];
        if (i > 0) room = plan.rooms[i - 1];
        if (bytes(kFedRingLeast) > limit) continue;
        room.ring = static_cast<int>(std::min<std::size_t>(kFedRingMost, (limit - bytes(0)) / kRingLoad));
        room.shared_bytes = bytes(room.ring);
      }
      return plan;
    }
    constexpr int kRing = places_of(kAhead, kBits);
    const std::size_t bytes = shared_bytes<kHalves, false>(s, head_dim, rows, blocks, kRing * kRingLoad);
    if (bytes > shared) return {};
    DecodePlan plan{kernel_for(s.kv_bits, {kAhead, head_dim, kBits}), kDecodeThreads};
    std::fill(std::begin(plan.rooms), std::end(plan.rooms), DecodeRoom{kRing, bytes});
    return plan;
  };
  const auto first_of = [&]<int kBits>() {
    DecodePlan plan = variant.template operator()<DecodeRing::Long, kBits>();
    if (plan.kernel == nullptr) plan = variant.template operator()<DecodeRing::Medium, kBits>();
    if (plan.kernel == nullptr) plan = variant.template operator()<DecodeRing::Short, kBits>();
    return plan;
  };
  return s.bits == 16 ? first_of.template operator()<16>() : first_of.template operator()<4>();
}

void prepare_decode(const DecodePlan& plan, std::size_t shared) {
  check(cudaFuncSetAttribute(plan.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared)),
        "decode_step");
}

void launch_decode(const DecodePlan& plan, const DecodeRoom& room, const DecodeStep& s, int blocks,
                   cudaStream_t stream) {
  void* arguments[] = {const_cast<DecodeStep*>(&s)};
  check(cudaLaunchCooperativeKernel(plan.kernel, dim3(static_cast<unsigned>(blocks)),
                                    dim3(static_cast<unsigned>(plan.threads)), arguments, room.shared_bytes,
                                    stream),
        "decode_step");
}

}  // namespace fathom::cuda
