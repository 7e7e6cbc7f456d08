// RoPE's angles (Su et al. 2021) and what one does to a pair of elements.
#pragma once

#include <cstdint>

namespace fathom::cuda {

struct Rotation {
  float cosine, sine;
};

/// The angle is rounded to fp32 as everywhere (models trained elsewhere have seen it so). It may be of any
/// size: whole turns are taken off in double, after which the functions of single precision are exact to
/// 2e-7.
__device__ __forceinline__ Rotation rotation_at(std::int32_t position, float frequency) {
  constexpr double kTurnsPerRadian = 0.15915494309189533577;
  const float angle = __fmul_rn(__int2float_rn(position), frequency);
  const double turns = static_cast<double>(angle) * kTurnsPerRadian;
  Rotation r{};
  sincospif(2.0F * static_cast<float>(turns - rint(turns)), &r.sine, &r.cosine);
  return r;
}

/// Turns (a, b), elements j and j + d/2 of a head; with the sine negated it turns back.
__device__ __forceinline__ void rotate(float& a, float& b, float cosine, float sine) {
  const float first = a * cosine - b * sine;
  b = b * cosine + a * sine;
  a = first;
}

/// Cosines and sines of `rows` consecutive rows, computed once for all heads: shared memory, [rows, half]
/// each. All threads of the block call it, and synchronise before they read.
struct RotationTable {
  float* cosines;
  float* sines;

  __device__ RotationTable(float* shared, int most_rows, int half)
      : cosines(shared), sines(shared + most_rows * half) {}
  __device__ void make(const std::int32_t* positions, const float* frequencies, int rows, int half) {
    for (int i = static_cast<int>(threadIdx.x); i < rows * half; i += static_cast<int>(blockDim.x)) {
      const int row = i / half;
      const Rotation r = rotation_at(positions[row], frequencies[i - row * half]);
      cosines[i] = r.cosine;
      sines[i] = r.sine;
    }
  }
};

}  // namespace fathom::cuda
