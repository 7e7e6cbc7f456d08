// fill, cast, add, accumulate, scale.
//
// A thread moves 16 bytes of the wider side (32 for casts between 2 and 4 bytes); what does not fill a pack
// is the last block's, element by element. Views that are not aligned to 16 bytes go element by element
// throughout.
#include <cstring>
#include <type_traits>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // packs in flight in a thread

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Multiply {
  float factor;
  __device__ float operator()(float a) const { return a * factor; }
};

/// out[i] = f(a[i], b[i]). Reads both, writes one: 3 * n elements. kN: elements of a pack, 1 when unaligned.
template <typename T, int kN, typename F>
__global__ void __launch_bounds__(kThreads) map_two(T* out, const T* a, const T* b, std::int64_t n, F f) {
  using P = Pack<T, kN>;
  const std::int64_t packs = n / kN;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
  P left[kUnroll], right[kUnroll];
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const std::int64_t i = first + k * kThreads;
    if (i < packs) {
      left[k] = P::load(a + i * kN);
      right[k] = P::load(b + i * kN);
    }
  }
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const std::int64_t i = first + k * kThreads;
    if (i < packs) {
#pragma unroll
      for (int e = 0; e < kN; ++e) left[k].v[e] = f(left[k].v[e], right[k].v[e]);
      left[k].store(out + i * kN);
    }
  }
  const std::int64_t rest = packs * kN + threadIdx.x;
  if (blockIdx.x == gridDim.x - 1 && rest < n)
    out[rest] = from_float<T>(f(to_float(a[rest]), to_float(b[rest])));
}

/// data[i] = f(data[i]). Reads and writes 2 * n elements.
template <typename T, int kN, typename F>
__global__ void __launch_bounds__(kThreads) map_one(T* data, std::int64_t n, F f) {
  using P = Pack<T, kN>;
  const std::int64_t packs = n / kN;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
  P values[kUnroll];
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const std::int64_t i = first + k * kThreads;
    if (i < packs) values[k] = P::load(data + i * kN);
  }
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const std::int64_t i = first + k * kThreads;
    if (i < packs) {
#pragma unroll
      for (int e = 0; e < kN; ++e) values[k].v[e] = f(values[k].v[e]);
      values[k].store(data + i * kN);
    }
  }
  const std::int64_t rest = packs * kN + threadIdx.x;
  if (blockIdx.x == gridDim.x - 1 && rest < n) data[rest] = from_float<T>(f(to_float(data[rest])));
}

/// Writes n elements.
template <typename T, int kN>
__global__ void __launch_bounds__(kThreads) fill_elements(T* out, std::int64_t n, T value) {
  struct alignas(sizeof(T) * kN) Repeated {
    T e[kN];
  };
  Repeated repeated;
#pragma unroll
  for (int e = 0; e < kN; ++e) repeated.e[e] = value;
  const std::int64_t packs = n / kN;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const std::int64_t i = first + k * kThreads;
    if (i < packs) reinterpret_cast<Repeated*>(out)[i] = repeated;
  }
  const std::int64_t rest = packs * kN + threadIdx.x;
  if (blockIdx.x == gridDim.x - 1 && rest < n) out[rest] = value;
}

template <typename To, typename From>
__device__ __forceinline__ To convert(From x) {
  if constexpr (std::is_same_v<To, bf16> && std::is_same_v<From, double>) {
    return __double2bfloat16(x);  // rounds once
  } else if constexpr (std::is_same_v<From, double>) {
    return static_cast<To>(x);
  } else if constexpr (std::is_same_v<To, double>) {
    return static_cast<double>(to_float(x));
  } else {
    return from_float<To>(to_float(x));
  }
}

template <typename To, typename From>
__global__ void __launch_bounds__(kThreads) cast_elements(To* out, const From* in, std::int64_t n) {
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const std::int64_t i = first + k * kThreads;
    if (i < n) out[i] = convert<To>(in[i]);
  }
}

/// Eight elements a thread, of 2 bytes on one side and 4 on the other: reads and writes 6 * n bytes.
template <typename To, typename From>
__global__ void __launch_bounds__(kThreads) cast_packs(To* out, const From* in, std::int64_t n) {
  const std::int64_t packs = n / 8;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * (kThreads * 2) + threadIdx.x;
  float values[2][8];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const std::int64_t i = first + k * kThreads;
    if (i >= packs) continue;
#pragma unroll
    for (int part = 0; part < 8; part += kPack<From>) {
      const auto pack = Pack<From>::load(in + i * 8 + part);
#pragma unroll
      for (int e = 0; e < kPack<From>; ++e) values[k][part + e] = pack.v[e];
    }
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const std::int64_t i = first + k * kThreads;
    if (i >= packs) continue;
#pragma unroll
    for (int part = 0; part < 8; part += kPack<To>) {
      Pack<To> pack;
#pragma unroll
      for (int e = 0; e < kPack<To>; ++e) pack.v[e] = values[k][part + e];
      pack.store(out + i * 8 + part);
    }
  }
  const std::int64_t rest = packs * 8 + threadIdx.x;
  if (blockIdx.x == gridDim.x - 1 && rest < n) out[rest] = convert<To>(in[rest]);
}

/// Blocks of kThreads * kUnroll packs; the last one also takes the elements that fill no pack.
unsigned grid_of(std::int64_t n, int pack) { return blocks_for((n + pack - 1) / pack, kThreads * kUnroll); }

template <typename T>
void fill_with(cudaStream_t stream, View out, T value) {
  const T zero{};
  if (std::memcmp(&value, &zero, sizeof(T)) == 0) {
    check(cudaMemsetAsync(out.data, 0, static_cast<std::size_t>(out.size) * sizeof(T), stream), "fill");
    return;
  }
  auto* to = static_cast<T*>(out.data);
  constexpr int kN = 16 / static_cast<int>(sizeof(T));
  if (aligned(to)) {
    fill_elements<T, kN><<<grid_of(out.size, kN), kThreads, 0, stream>>>(to, out.size, value);
  } else {
    fill_elements<T, 1><<<grid_of(out.size, 1), kThreads, 0, stream>>>(to, out.size, value);
  }
  check_launch("fill");
}

template <typename T>
void add_views(cudaStream_t stream, const char* op, T* out, const T* a, const T* b, std::int64_t n) {
  if (n == 0) return;
  constexpr int kN = kPack<T>;
  if (aligned(out) && aligned(a) && aligned(b)) {
    map_two<T, kN><<<grid_of(n, kN), kThreads, 0, stream>>>(out, a, b, n, Add{});
  } else {
    map_two<T, 1><<<grid_of(n, 1), kThreads, 0, stream>>>(out, a, b, n, Add{});
  }
  check_launch(op);
}

template <typename To, typename From>
void cast_views(cudaStream_t stream, View out, ConstView in) {
  auto* to = static_cast<To*>(out.data);
  const auto* from = static_cast<const From*>(in.data);
  const std::int64_t n = out.size;
  if constexpr (std::is_same_v<To, From>) {
    const std::size_t bytes = static_cast<std::size_t>(n) * sizeof(To);
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream), "cast");
    return;
  } else if constexpr (sizeof(To) + sizeof(From) == 6) {
    if (aligned(to) && aligned(from)) {
      cast_packs<To, From><<<blocks_for((n + 7) / 8, kThreads * 2), kThreads, 0, stream>>>(to, from, n);
      check_launch("cast");
      return;
    }
  }
  cast_elements<To, From><<<grid_of(n, 1), kThreads, 0, stream>>>(to, from, n);
  check_launch("cast");
}

template <typename To>
void cast_to(cudaStream_t stream, View out, ConstView in) {
  switch (in.dtype) {
    case DType::F32:
      return cast_views<To, float>(stream, out, in);
    case DType::F64:
      return cast_views<To, double>(stream, out, in);
    case DType::BF16:
      return cast_views<To, bf16>(stream, out, in);
    default:
      fail_dtype("cast", in.dtype);
  }
}

}  // namespace

void CudaBackend::fill(View out, double value) {
  if (out.size == 0) return;
  if (out.data == nullptr) fail_null("fill", "out");
  switch (out.dtype) {
    case DType::F32:
      return fill_with(stream_, out, static_cast<float>(value));
    case DType::F64:
      return fill_with(stream_, out, value);
    case DType::BF16: {
      const bf16 rounded = __double2bfloat16(value);
      std::uint16_t bits = 0;
      std::memcpy(&bits, &rounded, sizeof(bits));
      return fill_with(stream_, out, bits);
    }
    case DType::I32:
      return fill_with(stream_, out, static_cast<std::int32_t>(value));
    case DType::I64:
      return fill_with(stream_, out, static_cast<std::int64_t>(value));
    case DType::U8:
      return fill_with(stream_, out, static_cast<std::uint8_t>(value));
  }
}

void CudaBackend::cast(View out, ConstView in) {
  if (in.size != out.size) fail("cast", "in", in.size, out.size);
  if (!is_floating(in.dtype)) fail_dtype("cast", in.dtype);
  if (!is_floating(out.dtype)) fail_dtype("cast", out.dtype);
  if (out.size == 0) return;
  if (out.data == nullptr) fail_null("cast", "out");
  if (in.data == nullptr) fail_null("cast", "in");
  switch (out.dtype) {
    case DType::F32:
      return cast_to<float>(stream_, out, in);
    case DType::F64:
      return cast_to<double>(stream_, out, in);
    default:
      return cast_to<bf16>(stream_, out, in);
  }
}

void CudaBackend::add(View out, ConstView a, ConstView b) {
  for_compute_type("add", out.dtype, [&](auto zero) {
    using T = decltype(zero);
    add_views(stream_, "add", output<T>("add", "out", out, out.size), input<T>("add", "a", a, out.size),
              input<T>("add", "b", b, out.size), out.size);
  });
}

void CudaBackend::accumulate(View out, ConstView in) {
  for_compute_type("accumulate", out.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = output<T>("accumulate", "out", out, out.size);
    add_views<T>(stream_, "accumulate", to, to, input<T>("accumulate", "in", in, out.size), out.size);
  });
}

void CudaBackend::scale(View out, double factor) {
  for_compute_type("scale", out.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = output<T>("scale", "out", out, out.size);
    const std::int64_t n = out.size;
    if (n == 0) return;
    const Multiply f{static_cast<float>(factor)};
    constexpr int kN = kPack<T>;
    if (aligned(to)) {
      map_one<T, kN><<<grid_of(n, kN), kThreads, 0, stream_>>>(to, n, f);
    } else {
      map_one<T, 1><<<grid_of(n, 1), kThreads, 0, stream_>>>(to, n, f);
    }
    check_launch("scale");
  });
}

}  // namespace fathom::cuda
