// Normal numbers from a counter: Philox4x32-10 (Salmon et al. 2011), then Box and Muller's transform.
//
// Elements 2c and 2c+1 come from the counter (c low, c high, stream low, stream high) under the key (seed
// low, seed high), exactly as on the CPU, whose fill_normal.cpp says how the four words become two numbers.
// The transform is in double, so that the backends agree to the rounding of the result.
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;

__device__ uint4 philox(std::uint64_t counter, std::uint64_t stream, std::uint64_t seed) {
  uint4 c = make_uint4(static_cast<unsigned>(counter), static_cast<unsigned>(counter >> 32),
                       static_cast<unsigned>(stream), static_cast<unsigned>(stream >> 32));
  auto k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned a_low = 0xD2511F53U * c.x, a_high = __umulhi(0xD2511F53U, c.x);
    const unsigned b_low = 0xCD9E8D57U * c.z, b_high = __umulhi(0xCD9E8D57U, c.z);
    c = make_uint4(b_high ^ c.y ^ k0, b_low, a_high ^ c.w ^ k1, a_low);
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  return c;
}

__device__ double uniform(unsigned low, unsigned high, double offset) {
  const std::uint64_t bits = (static_cast<std::uint64_t>(high) << 32 | low) >> 11;
  return (static_cast<double>(bits) + offset) * 0x1p-53;
}

__device__ void store(float* to, double x) { *to = static_cast<float>(x); }
__device__ void store(bf16* to, double x) { *to = __double2bfloat16(x); }

/// The stream is `stream`, plus what `offset` holds where it is not null. One pair of numbers a thread, from
/// that of number `first` on, of which the first and the last may be halves; writes n elements, and is bound
/// by arithmetic in double.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    normal(T* out, std::int64_t n, double stddev, std::uint64_t seed, std::uint64_t stream,
           const std::int64_t* offset, std::int64_t first) {
  const std::int64_t pair = first / 2 + static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t at = 2 * pair - first;
  if (at >= n) return;
  if (offset != nullptr) stream += static_cast<std::uint64_t>(*offset);
  const uint4 words = philox(static_cast<std::uint64_t>(pair), stream, seed);
  const double radius = stddev * sqrt(-2.0 * log(uniform(words.x, words.y, 1.0)));
  double sine = 0, cosine = 0;
  sincospi(2.0 * uniform(words.z, words.w, 0.0), &sine, &cosine);
  if (at >= 0) store(out + at, radius * cosine);
  if (at + 1 < n) store(out + at + 1, radius * sine);
}

}  // namespace

void CudaBackend::fill_normal(View out, double stddev, std::uint64_t seed, std::uint64_t stream) {
  fill_normal_from(out, stddev, {seed, stream, {}, 0});
}

void CudaBackend::fill_normal_from(View out, double stddev, const NormalNumbers& from) {
  const char* op = "fill_normal";
  const std::int64_t* offset = from.offset ? input<std::int64_t>(op, "offset", from.offset, 1) : nullptr;
  for_compute_type(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = output<T>(op, "out", out, out.size);
    if (out.size == 0) return;
    const std::int64_t pairs = (from.first + out.size + 1) / 2 - from.first / 2;
    normal<T><<<blocks_for(pairs, kThreads), kThreads, 0, stream_>>>(to, out.size, stddev, from.seed,
                                                                     from.stream, offset, from.first);
    check_launch(op);
  });
}

}  // namespace fathom::cuda
