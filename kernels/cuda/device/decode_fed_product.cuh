// A warp's share of the matrices of a decoding step, as warps of their own bring it (decode_ring.cuh): up to
// eight rows x, units as decode_lines.cuh has them.
#pragma once

#include <cstdint>

#include "kernels/cuda/device/decode_lines.cuh"
#include "kernels/cuda/device/decode_ring.cuh"
#include "kernels/cuda/device/mma.cuh"

namespace fathom::cuda {

class FedStream {
 public:
  /// `ring`: `places` places in shared memory, 16-aligned.
  __device__ FedStream(unsigned char* ring, int places, RingMeeting& meeting)
      : places_(places),
        ring_address_(shared_address(ring) + threadIdx.x * 16),
        there_(shared_address(&meeting.there[feeder()][0])),
        read_(shared_address(&meeting.read[feeder()][0])) {}

  /// The next `tiles` tiles of the next matrix times the staged rows x: the warps' shares of the sums, into
  /// `sums`: [tiles][parts][rows][8].
  __device__ __forceinline__ void run(const Matrix& m, const std::uint32_t* staged, int rows, int tiles,
                                      float* sums) {
    if (m.at_once == 11) {
      run_by<11>(m, staged, rows, tiles, sums);
    } else if (m.at_once == 8) {
      run_by<8>(m, staged, rows, tiles, sums);
    } else if (m.at_once == 4) {
      run_by<4>(m, staged, rows, tiles, sums);
    } else if (m.at_once == 3) {
      run_by<3>(m, staged, rows, tiles, sums);
    } else {
      run_by<1>(m, staged, rows, tiles, sums);
    }
  }
  /// Behind decision number `decision` not what was expected comes, of which there may be some in the ring.
  __device__ __forceinline__ void give_up(RingMeeting& meeting, int decision, const Matrix& expected) {
    int told = 0;
    do {
      told = look(meeting.given_up[feeder()]) - (decision + 1) * RingMeeting::kGivenUpUnit;
    } while (told < 0);
    for (; told > 0; --told) {
      go_round(expected.at_once);
      end_batch(expected.at_once);
    }
  }

 private:
  static constexpr int kLoad = kRingLoad;
  static constexpr int kColumns = kLineColumns;

  static __device__ __forceinline__ int feeder() { return static_cast<int>(threadIdx.x) / 32 / kFedWarps; }

  template <int kUnits>
  __device__ __forceinline__ void run_by(const Matrix& m, const std::uint32_t* staged, int rows, int tiles,
                                         float* sums) {
    constexpr bool kBoth = kUnits % 2 == 0;
    constexpr int kRowUnits = kBoth ? kUnits / 2 : kUnits;
    constexpr int kUnitBytes = kColumns * 2;  // of rows x
    const int g = static_cast<int>(threadIdx.x) % 32 / 4, c = static_cast<int>(threadIdx.x) % 4;
    const unsigned start = shared_address(staged + g * StagedLines::stride(m.width) + c * 8) +
                           static_cast<unsigned>(part_of_warp(m) * m.units * kUnitBytes);
    const bool has_row = g < rows;
    uint4 xs[kRowUnits][2] = {};
    const auto load_rows = [&](unsigned x) {
      if (!has_row) return;
#pragma unroll
      for (int j = 0; j < kRowUnits; ++j) {
        xs[j][0] = load_in_turn(x + j * kUnitBytes);
        xs[j][1] = load_in_turn(x + j * kUnitBytes + 16);
      }
    };
    load_rows(start);
    const bool by_quad = !kBoth && m.parts == kDecodeWarps;
    const int batches = kUnits == 1 ? m.units : m.batches;
    const int missing = kUnits == 1 ? batches - units_of_warp(m) : 0;
    float* to = sums + (part_of_warp(m) * rows + g) * 8 + c + 4 * quad_of_warp(m);
    const int next_tile = m.parts * rows * 8;
#pragma unroll 1
    for (; tiles > 0; --tiles, to += next_tile) {
#pragma unroll 1
      for (int quad = 0; quad <= (by_quad ? 1 : 0); ++quad) {
        unsigned x = start;
        float low[2][4] = {}, high[2][4] = {};  // of every second unit: so many products under way at once
#pragma unroll 1
        for (int i = batches; i > 0; --i) {
          go_round(kUnits);
          while (!is_over(there_ + number_ % kRingBatches * 8, number_ / kRingBatches & 1U)) {
          }
          if (kUnits > 1 || i > missing) {
            const unsigned place = ring_address_ + static_cast<unsigned>(place_ * kLoad);
            uint4 w[kUnits];
#pragma unroll
            for (int j = 0; j < kUnits; ++j) w[j] = load_in_turn(place + j * kLoad);
#pragma unroll
            for (int j = 0; j < kUnits; ++j) {
              const uint4 a = xs[kBoth ? j / 2 : j][0], b = xs[kBoth ? j / 2 : j][1];
              mma(low[j % 2], {a.x, a.y, a.z, a.w}, w[j].x, w[j].y);
              mma(high[j % 2], {b.x, b.y, b.z, b.w}, w[j].z, w[j].w);
            }
          }
          end_batch(kUnits);
          x = i == 1 ? start : x + kRowUnits * kUnitBytes;
          if (batches > 1) load_rows(x);
        }
        float sum[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) sum[h] = (low[h][0] + high[h][0]) + (low[h][3] + high[h][3]);
        if (has_row) {
          if constexpr (kBoth) {
            to[0] = sum[0], to[4] = sum[1];
          } else {
            to[4 * quad] = sum[0] + sum[1];
          }
        }
      }
    }
  }
  /// Places at the end of the ring that a batch has no room in are passed over.
  __device__ __forceinline__ void go_round(int units) {
    if (place_ + units <= places_) return;
    tell_read(places_ - place_);
    place_ = 0;
  }
  /// A batch has been read.
  __device__ __forceinline__ void end_batch(int units) {
    tell_read(units);
    place_ += units;
    ++number_;
  }
  __device__ __forceinline__ void tell_read(int places) const {
    __syncwarp();
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane < places) arrive_at(read_ + static_cast<unsigned>(place_ + lane) * 8);
  }

  const int places_;
  const unsigned ring_address_, there_, read_;
  unsigned number_ = 0;  // of the batch that is next
  int place_ = 0;        // of the ring
};

}  // namespace fathom::cuda
