// Normal numbers from a counter: Philox4x32-10 (Salmon et al. 2011), then Box and Muller's transform.
//
// Elements 2c and 2c+1 come from the counter (c low, c high, stream low, stream high) under the key (seed
// low, seed high). Of the four words, the first two make u1 = (53 bits + 1) / 2^53 in (0, 1] (word 0 low,
// word 1 high, shifted right by 11), the last two u2 = 53 bits / 2^53; the elements are sqrt(-2 ln u1) times
// cos(2 pi u2) and sin(2 pi u2), all in double.
#include <math.h>

#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/partials.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

struct Words {
  std::uint32_t w[4];
};

Words philox(std::uint64_t counter, std::uint64_t stream, std::uint64_t seed) {
  Words c{{static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32),
           static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)}};
  auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53} * c.w[0], b = std::uint64_t{0xCD9E8D57} * c.w[2];
    c = {{static_cast<std::uint32_t>(b >> 32) ^ c.w[1] ^ k0, static_cast<std::uint32_t>(b),
          static_cast<std::uint32_t>(a >> 32) ^ c.w[3] ^ k1, static_cast<std::uint32_t>(a)}};
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  return c;
}

double uniform(std::uint32_t low, std::uint32_t high, double offset) {
  const std::uint64_t bits = (static_cast<std::uint64_t>(high) << 32 | low) >> 11;
  return (static_cast<double>(bits) + offset) * 0x1p-53;
}

// Numbers first, first + 1, ...: the first and the last may be halves of their pairs.
template <typename T>
void normal(T* out, std::int64_t n, double stddev, const NormalNumbers& from, std::uint64_t stream) {
  constexpr std::int64_t kPairs = 1024;
  const std::int64_t first = from.first, first_pair = first / 2;
  const std::uint64_t seed = from.seed;
  const std::int64_t pairs = n > 0 ? (first + n + 1) / 2 - first_pair : 0;
  parallel_for(pairs, kPairs, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t pair = first_pair + begin; pair < first_pair + end; ++pair) {
      const Words words = philox(static_cast<std::uint64_t>(pair), stream, seed);
      const double radius = stddev * ::sqrt(-2.0 * ::log(uniform(words.w[0], words.w[1], 1.0)));
      const double angle = 6.283185307179586476925 * uniform(words.w[2], words.w[3], 0.0);
      const std::int64_t at = 2 * pair - first;
      if (at >= 0) out[at] = static_cast<T>(radius * ::cos(angle));
      if (at + 1 < n) out[at + 1] = static_cast<T>(radius * ::sin(angle));
    }
  });
}

}  // namespace

void CpuBackend::fill_normal(View out, double stddev, std::uint64_t seed, std::uint64_t stream) {
  fill_normal_from(out, stddev, {seed, stream, {}, 0});
}

void CpuBackend::fill_normal_from(View out, double stddev, const NormalNumbers& from) {
  const char* op = "fill_normal";
  std::uint64_t stream = from.stream;
  if (from.offset) stream += static_cast<std::uint64_t>(*input<std::int64_t>(op, "offset", from.offset, 1));
  for_compute_type(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    normal(output<T>(op, "out", out, out.size), out.size, stddev, from, stream);
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
