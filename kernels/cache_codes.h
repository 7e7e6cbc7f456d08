// Keys and values of 4 or 8 bits in a cache (KIVI: Liu et al. 2024, arXiv 2402.02750; QuaRot: Ashkboos et al.
// 2024, arXiv 2404.00456): of each entry and key/value head the d elements of the key share a step and an
// offset, and so do those of the value.
//
//   middle = (max + min) / 2,   half = clip * (max - min) / 2,
//   low  = middle - half, as bf16 towards minus infinity,
//   step = (middle + half - low) / (2^b - 1), as bf16 away from zero,
//   code = (x - low) / step to the nearest, ties to even, in 0 .. 2^b - 1,
//   and what is read is x' = low + step * code, rounded to the compute dtype.
//
// All of it in fp32, where step * code is exact, so that every backend has the same codes and the same x'.
// Rounded that way the grid covers what is not clipped, and is at most by some 1 % wider than it has to be.
// Equal elements have the step 0 or one that is as fine as bf16 is coarse: x' is within 2^-12 of them. An
// element that is not finite makes the step, and with it all that is read of the head, NaN: who looks for
// such numbers finds them behind the cache too. Numbers of the size of 2^127 may come back infinite.
//
// Of a key x may be its element less the mean of that element over keys (SageAttention: Zhang et al. 2024,
// arXiv 2410.02367): a vector that all keys of a head share adds the same to all scores of a query, so that
// attention over keys without it is attention over them, and what the codes have to span is narrower. The
// means are given once for a model, and everything that a row attends to comes without them. The difference
// is rounded to fp32, of elements of the compute dtype and means in fp32.
//
// A block is `block` entries of one layer: codes, then scales, uint8 as a whole. bf16 suffices for a pair: 4
// bytes beside 32 of codes for a head of 64 of 4 bits, 3.6 times less than bf16; 3.8 times with one of 128.
//   CUDA: codes of the keys, then of the values, each [kv_heads, block, code bytes]; element e of 4 bits is
//         the lower (e even) or upper half of byte e / 2. Then scales of the keys and of the values, each
//         [kv_heads, block], step below low in a word of 32 bits.
//   CPU:  the same, but keys are [kv_heads, code bytes, block] (the lanes of a vector are entries), and a
//         byte of a value holds the elements e and e + (d + 1) / 2.
#pragma once

#include <cstdint>

namespace fathom {

/// The paper's at 4 bits.
constexpr float cache_clip(int bits) { return bits == 4 ? 0.95F : 1.0F; }
constexpr bool is_cache_of_codes(int bits) { return bits == 4 || bits == 8; }

/// Bytes of the codes of one head of one entry.
constexpr std::int64_t cache_code_bytes(std::int64_t head_dim, int bits) { return (head_dim * bits + 7) / 8; }
/// And of their scale.
inline constexpr std::int64_t kCacheScaleBytes = 4;

}  // namespace fathom
