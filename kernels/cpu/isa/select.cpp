// Which rows a routed block keeps: the top K of each sequence, or those above a threshold.
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/partials.h"
#include "kernels/cpu/isa/vector_math.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

/// An unsigned integer that orders as the number does; both zeros are equal, and every NaN is the least.
FATHOM_INLINE std::uint32_t key_of(float x) {
  const std::uint32_t bits = bits_of(x + 0.0F);  // -0 + 0 = +0
  constexpr std::uint32_t kSign = 0x80000000U;
  return x != x ? 0 : ((bits & kSign) != 0 ? ~bits : bits | kSign);
}
FATHOM_INLINE std::uint64_t key_of(double x) {
  const std::uint64_t bits = bits_of(x + 0.0);
  constexpr std::uint64_t kSign = std::uint64_t{1} << 63;
  return x != x ? 0 : ((bits & kSign) != 0 ? ~bits : bits | kSign);
}

/// Finds the K-th largest key a byte at a time, then takes the larger keys and, of its equals, the first
/// ones.
template <typename T, typename Key>
void top_k(std::int32_t* indices, Key* keys, const T* scores, std::int64_t first, std::int64_t seq,
           std::int64_t keep) {
#pragma omp simd
  for (std::int64_t t = 0; t < seq; ++t) keys[t] = key_of(scores[t]);
  Key prefix = 0, mask = 0;
  std::int64_t wanted = keep;  // how many of the keys with this prefix are kept
  for (int shift = 8 * static_cast<int>(sizeof(Key)) - 8; shift >= 0; shift -= 8) {
    std::int32_t counts[256] = {};
    for (std::int64_t t = 0; t < seq; ++t) {
      if ((keys[t] & mask) == prefix) ++counts[keys[t] >> shift & 0xffU];
    }
    int digit = 255;
    while (counts[digit] < wanted) wanted -= counts[digit--];
    prefix |= static_cast<Key>(digit) << shift;
    mask |= static_cast<Key>(0xff) << shift;
  }
  for (std::int64_t t = 0; t < seq; ++t) {
    const bool equal = keys[t] == prefix;
    if (keys[t] > prefix || (equal && wanted > 0)) *indices++ = static_cast<std::int32_t>(first + t);
    if (equal) --wanted;
  }
}

}  // namespace

void CpuBackend::top_k_rows(View indices, ConstView scores, std::int64_t batch, std::int64_t seq,
                            std::int64_t keep) {
  const char* op = "top_k_rows";
  if (keep < 0 || keep > seq) fail(op, "keep", keep, seq);
  auto* out = output<std::int32_t>(op, "indices", indices, batch * keep);
  for_compute_type(op, scores.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Key = decltype(key_of(zero));
    const T* in = input<T>(op, "scores", scores, batch * seq);
    if (keep == 0) return;
    const Scratch<Key> scratch(batch * seq);
    Key* keys = scratch.data();
    parallel_for(batch, 1, [=](std::int64_t begin, std::int64_t end) {
      for (std::int64_t b = begin; b < end; ++b) {
        top_k(out + b * keep, keys + b * seq, in + b * seq, b * seq, seq, keep);
      }
    });
  });
}

std::int64_t CpuBackend::select_above(View indices, View offsets, ConstView scores, double threshold,
                                      std::int64_t batch, std::int64_t seq) {
  const char* op = "select_above";
  auto* out = output<std::int32_t>(op, "indices", indices, batch * seq);
  auto* parts = output<std::int32_t>(op, "offsets", offsets, batch + 1);
  std::int32_t count = 0;
  for_compute_type(op, scores.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* in = input<T>(op, "scores", scores, batch * seq);
    parts[0] = 0;
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t i = b * seq; i < (b + 1) * seq; ++i) {
        if (static_cast<double>(in[i]) > threshold) out[count++] = static_cast<std::int32_t>(i);
      }
      parts[b + 1] = count;
    }
  });
  return count;
}

}  // namespace fathom::cpu::FATHOM_ISA
