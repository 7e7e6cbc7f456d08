// A row in the registers of the threads that share it: 16-byte packs kept as memory has them, so that bf16
// takes half the registers of its floats, and unpacked where they are used.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

template <typename T>
__device__ __forceinline__ uint4 load_raw(const T* from) {
  return *reinterpret_cast<const uint4*>(from);
}
template <typename T>
__device__ __forceinline__ void store_raw(T* to, const uint4& raw) {
  *reinterpret_cast<uint4*>(to) = raw;
}

template <typename T>
__device__ __forceinline__ Pack<T> unpack(const uint4& raw);
template <>
__device__ __forceinline__ Pack<float> unpack<float>(const uint4& raw) {
  return {{__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z), __uint_as_float(raw.w)}};
}
/// The upper half of a float's bits is the bf16: of each word, the low element moves up and the high one
/// stays.
template <>
__device__ __forceinline__ Pack<__nv_bfloat16> unpack<__nv_bfloat16>(const uint4& raw) {
  constexpr unsigned kHigh = 0xffff0000U;
  return {{__uint_as_float(raw.x << 16), __uint_as_float(raw.x & kHigh), __uint_as_float(raw.y << 16),
           __uint_as_float(raw.y & kHigh), __uint_as_float(raw.z << 16), __uint_as_float(raw.z & kHigh),
           __uint_as_float(raw.w << 16), __uint_as_float(raw.w & kHigh)}};
}

__device__ __forceinline__ unsigned two_bf16(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}
__device__ __forceinline__ uint4 repack(const Pack<float>& p) {
  return make_uint4(__float_as_uint(p.v[0]), __float_as_uint(p.v[1]), __float_as_uint(p.v[2]),
                    __float_as_uint(p.v[3]));
}
__device__ __forceinline__ uint4 repack(const Pack<__nv_bfloat16>& p) {
  return make_uint4(two_bf16(p.v[0], p.v[1]), two_bf16(p.v[2], p.v[3]), two_bf16(p.v[4], p.v[5]),
                    two_bf16(p.v[6], p.v[7]));
}

/// N floats (a multiple of 4) from an address aligned to 16 bytes.
template <int N>
__device__ __forceinline__ void load_floats(float (&to)[N], const float* from) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    to[i] = four.x;
    to[i + 1] = four.y;
    to[i + 2] = four.z;
    to[i + 3] = four.w;
  }
}

/// How a row is shared: by `warps` warps, of which each lane holds up to `packs` packs, every (32 * warps)-th
/// one.
template <int kPacks, int kWarps>
struct RowClass {
  static constexpr int packs = kPacks, warps = kWarps;
};

/// Calls body(RowClass) with the least class that holds a row of `packs` packs; false when there is none.
template <typename Body>
bool for_row_class(std::int64_t packs, Body&& body) {
  if (packs <= 32) {
    body(RowClass<1, 1>{});
  } else if (packs <= 64) {
    body(RowClass<2, 1>{});
  } else if (packs <= 96) {
    body(RowClass<3, 1>{});
  } else if (packs <= 128) {
    body(RowClass<4, 1>{});
  } else if (packs <= 192) {
    body(RowClass<6, 1>{});
  } else if (packs <= 256) {
    body(RowClass<8, 1>{});
  } else if (packs <= 512) {
    body(RowClass<4, 4>{});
  } else if (packs <= 1024) {
    body(RowClass<8, 4>{});
  } else {
    return false;
  }
  return true;
}

}  // namespace fathom::cuda
