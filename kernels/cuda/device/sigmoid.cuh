// 1 / (1 + e^-x), exact and fast.
#pragma once

namespace fathom::cuda {

__device__ __forceinline__ float sigmoid(float x) { return 1.0F / (1.0F + expf(-x)); }

/// To a few units in the last place; 0 and 1 at the infinities.
__device__ __forceinline__ float fast_sigmoid(float x) { return __fdividef(1.0F, 1.0F + expf(-x)); }

/// x sigmoid(x) to 2^-17 of it, for results of bf16; zero where that is below 2^-120.
__device__ __forceinline__ float quick_silu(float x) {
  constexpr float kLog2OfE = 1.4426950408889634F;
  float power, reciprocal;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(__fmul_rn(x, -kLog2OfE)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(__fadd_rn(power, 1.0F)));
  return __fmul_rn(x, reciprocal);
}

}  // namespace fathom::cuda
