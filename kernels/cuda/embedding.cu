// Rows of the embedding table, and their gradient without atomics: rows are sorted by token, so that each
// token's rows stand together in ascending order, and are added up chunk by chunk.
#include <bit>

#include <cub/device/device_radix_sort.cuh>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/gather_rows.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 16;   // sorted rows that a block adds up
constexpr int kColumns = 4;  // of a thread

/// Tokens outside of the table get the key behind all others.
__global__ void __launch_bounds__(kThreads)
    key_kernel(std::uint32_t* keys, std::int32_t* rows, const std::int32_t* tokens, std::int64_t n,
               std::int64_t vocab) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const std::int64_t token = tokens[i];
  keys[i] = static_cast<std::uint32_t>(token >= 0 && token < vocab ? token : vocab);
  rows[i] = static_cast<std::int32_t>(i);
}

template <typename T>
struct Sorted {
  float* dtable;
  float* partials;  // [chunks, 2, width]: a run that came in from the chunk before, one that goes on into the
                    // next
  const T* dout;
  const std::uint32_t* keys;
  const std::int32_t* rows;
  std::int64_t n;
  std::int64_t width;
  std::int64_t vocab;

  __device__ __forceinline__ bool comes_in(std::int64_t begin) const {
    return begin > 0 && keys[begin - 1] == keys[begin];
  }
  __device__ __forceinline__ bool goes_on(std::int64_t end) const {
    return end < n && keys[end - 1] == keys[end];
  }
  /// Where the keys after keys[i] begin.
  __device__ __forceinline__ std::int64_t end_of_run(std::int64_t i) const {
    std::int64_t low = i, high = n;
    while (low < high) {
      const std::int64_t middle = low + (high - low) / 2;
      if (keys[middle] > keys[i]) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
};

/// to += sum. Nobody else adds to these elements in the same kernel, so the sum does not depend on an order;
/// on Hopper the addition is done where the data lies and nothing waits for it.
template <int kN>
__device__ __forceinline__ void add_to(float* to, const float (&sum)[kN]) {
#if __CUDA_ARCH__ >= 900
  if constexpr (kN == 4) {
    atomicAdd(reinterpret_cast<float4*>(to), make_float4(sum[0], sum[1], sum[2], sum[3]));
    return;
  }
#endif
  Pack<float, kN> p = Pack<float, kN>::load(to);
#pragma unroll
  for (int e = 0; e < kN; ++e) p.v[e] += sum[e];
  p.store(to);
}

/// Runs of one token that lie within the chunk are added to the table; the others are left to the second
/// kernel. Reads dout once; the table's rows are read and written once for each token that occurs.
template <typename T, int kN>
__global__ void __launch_bounds__(kThreads) chunk_kernel(Sorted<T> s) {
  const std::int64_t column = (static_cast<std::int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kN;
  if (column >= s.width) return;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kChunk;
  const std::int64_t end = begin + kChunk < s.n ? begin + kChunk : s.n;
  float sum[kN] = {};
  bool came_in = s.comes_in(begin);
  for (std::int64_t i = begin; i < end; ++i) {
    const Pack<T, kN> d = Pack<T, kN>::load(s.dout + s.rows[i] * s.width + column);
#pragma unroll
    for (int e = 0; e < kN; ++e) sum[e] += d.v[e];
    const std::uint32_t key = s.keys[i];
    if (i + 1 < end && s.keys[i + 1] == key) continue;
    const bool goes_on = i + 1 == end && s.goes_on(end);
    if (key < s.vocab) {
      if (came_in || goes_on) {
        Pack<float, kN> p;
#pragma unroll
        for (int e = 0; e < kN; ++e) p.v[e] = sum[e];
        p.store(s.partials + (static_cast<std::int64_t>(blockIdx.x) * 2 + (came_in ? 0 : 1)) * s.width +
                column);
      } else {
        add_to(s.dtable + static_cast<std::int64_t>(key) * s.width + column, sum);
      }
    }
#pragma unroll
    for (int e = 0; e < kN; ++e) sum[e] = 0.0F;
    came_in = false;
  }
}

/// The chunk in which a run begins adds up what the run left in the chunks after it. Where the run ends is
/// looked up first: in a table of few rows (bytes) a run spans hundreds of chunks, whose parts are then
/// loaded several at a time.
template <typename T, int kN>
__global__ void __launch_bounds__(kThreads) run_kernel(Sorted<T> s) {
  const std::int64_t column = (static_cast<std::int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kN;
  if (column >= s.width) return;
  const std::int64_t chunk = blockIdx.x;
  const std::int64_t begin = chunk * kChunk;
  const std::int64_t end = begin + kChunk < s.n ? begin + kChunk : s.n;
  const std::uint32_t key = s.keys[end - 1];
  const bool whole_chunk_came_in = s.comes_in(begin) && s.keys[begin] == key;
  if (key >= s.vocab || !s.goes_on(end) || whole_chunk_came_in) return;
  const std::int64_t last = (s.end_of_run(end) - 1) / kChunk;
  float sum[kN];
  const Pack<float, kN> first = Pack<float, kN>::load(s.partials + (chunk * 2 + 1) * s.width + column);
#pragma unroll
  for (int e = 0; e < kN; ++e) sum[e] = first.v[e];
#pragma unroll 8
  for (std::int64_t c = chunk + 1; c <= last; ++c) {
    const Pack<float, kN> p = Pack<float, kN>::load(s.partials + c * 2 * s.width + column);
#pragma unroll
    for (int e = 0; e < kN; ++e) sum[e] += p.v[e];
  }
  add_to(s.dtable + static_cast<std::int64_t>(key) * s.width + column, sum);
}

template <typename T, int kN>
void add_up(const Sorted<T>& s, cudaStream_t stream) {
  const dim3 grid(blocks_for(s.n, kChunk), blocks_for(s.width, static_cast<std::int64_t>(kThreads) * kN));
  chunk_kernel<T, kN><<<grid, kThreads, 0, stream>>>(s);
  run_kernel<T, kN><<<grid, kThreads, 0, stream>>>(s);
}

std::int64_t rows_of_table(const char* op, ConstView table, std::int64_t width) {
  if (width < 1 || table.size % width != 0) fail(op, "the table's size", table.size, width);
  return table.size / width;
}

}  // namespace

void CudaBackend::embedding_forward(View out, ConstView table, ConstView tokens, std::int64_t rows,
                                    std::int64_t width) {
  const char* op = "embedding_forward";
  const std::int64_t vocab = rows_of_table(op, table, width);
  for_compute_type(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = output<T>(op, "out", out, rows * width);
    const T* from = input<T>(op, "table", table, vocab * width);
    const auto* ids = input<std::int32_t>(op, "tokens", tokens, rows);
    gather_rows<T>(op, {to, from, ids, rows, vocab, width}, stream_);
  });
}

void CudaBackend::embedding_backward_accumulate(View dtable, ConstView dout, ConstView tokens,
                                                std::int64_t rows, std::int64_t width) {
  const char* op = "embedding_backward";
  const std::int64_t vocab = rows_of_table(op, dtable, width);
  float* to = output<float>(op, "dtable", dtable, vocab * width);
  const auto* ids = input<std::int32_t>(op, "tokens", tokens, rows);
  if (rows > 0x7fffffff)
    fail(op, "rows", rows, 0x7fffffff);  // they are numbered, and counted by cub, in 32 bits
  const int bits = std::bit_width(static_cast<std::uint64_t>(vocab));
  std::size_t sort_bytes = 0;
  check(cub::DeviceRadixSort::SortPairs(
            nullptr, sort_bytes, static_cast<std::uint32_t*>(nullptr), static_cast<std::uint32_t*>(nullptr),
            static_cast<std::int32_t*>(nullptr), static_cast<std::int32_t*>(nullptr), static_cast<int>(rows),
            0, bits, stream_),
        op);
  for_compute_type(op, dout.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* d = input<T>(op, "dout", dout, rows * width);
    if (rows == 0) return;
    const auto round_up = [](std::size_t n) { return (n + 255) / 256 * 256; };
    const std::size_t list = round_up(static_cast<std::size_t>(rows) * sizeof(std::int32_t));
    const std::size_t partials = round_up(static_cast<std::size_t>(blocks_for(rows, kChunk)) * 2 *
                                          static_cast<std::size_t>(width) * sizeof(float));
    auto* base = static_cast<std::byte*>(scratch(4 * list + partials + sort_bytes));
    auto* keys = reinterpret_cast<std::uint32_t*>(base);
    auto* sorted_keys = reinterpret_cast<std::uint32_t*>(base + list);
    auto* numbers = reinterpret_cast<std::int32_t*>(base + 2 * list);
    auto* sorted_numbers = reinterpret_cast<std::int32_t*>(base + 3 * list);
    key_kernel<<<blocks_for(rows, kThreads), kThreads, 0, stream_>>>(keys, numbers, ids, rows, vocab);
    check(cub::DeviceRadixSort::SortPairs(base + 4 * list + partials, sort_bytes, keys, sorted_keys, numbers,
                                          sorted_numbers, static_cast<int>(rows), 0, bits, stream_),
          op);
    const Sorted<T> s{
        to, reinterpret_cast<float*>(base + 4 * list), d, sorted_keys, sorted_numbers, rows, width, vocab};
    const bool packed = width % kColumns == 0 &&
                        reinterpret_cast<std::uintptr_t>(d) % (kColumns * sizeof(T)) == 0 &&
                        packs<float>(to, width);
    packed ? add_up<T, kColumns>(s, stream_) : add_up<T, 1>(s, stream_);
    check_launch(op);
  });
}

}  // namespace fathom::cuda
