#include "kernels/cpu/host.h"

#include <cstdlib>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include <fmt/format.h>

#include "kernels/error.h"

#ifdef FATHOM_OPENMP
#include <omp.h>
#endif

namespace fathom::cpu {

namespace {
int g_threads = 1;
thread_local bool g_in_parallel = false;
}  // namespace

void fail(const char* op, const char* what, std::int64_t given, std::int64_t expected) {
  throw InternalError(fmt::format("[{}] {}: got {}, expected {}", op, what, given, expected));
}

void fail_dtype(const char* op, DType given) {
  throw InternalError(
      fmt::format("[{}] the CPU backend computes in fp32 and fp64, got {}", op, name_of(given)));
}

void fail_type(const char* op, const char* what, DType given, DType expected) {
  throw InternalError(
      fmt::format("[{}] {}: got {}, expected {}", op, what, name_of(given), name_of(expected)));
}

void fail_null(const char* op, const char* what) {
  throw InternalError(fmt::format("[{}] {}: got a null view, expected data", op, what));
}

std::string describe(const char* isa, int threads) {
  const std::string name(isa);
  const char* shown = name == "avx512" ? "AVX-512" : name == "avx2" ? "AVX2" : "portable";
  return fmt::format("CPU, {}, {} thread{}", shown, threads, threads == 1 ? "" : "s");
}

void set_threads(int threads) { g_threads = threads < 1 ? 1 : threads; }
int threads() { return g_threads; }
bool in_parallel() { return g_in_parallel; }

void run_pieces(std::int64_t n, std::int64_t grain, RangeBody body, void* context) {
  if (grain < 1) grain = 1;
  const std::int64_t pieces = (n + grain - 1) / grain;
  const auto piece = [&](std::int64_t i) {
    const std::int64_t begin = i * grain;
    body(context, begin, begin + grain < n ? begin + grain : n);
  };
  if (pieces == 1 || g_threads == 1 || g_in_parallel) {
    for (std::int64_t i = 0; i < pieces; ++i) piece(i);
    return;
  }
#ifdef FATHOM_OPENMP
#pragma omp parallel for schedule(static) num_threads(g_threads)
  for (std::int64_t i = 0; i < pieces; ++i) {
    g_in_parallel = true;
    piece(i);
    g_in_parallel = false;
  }
#else
  const auto share = [&](int thread) {
    g_in_parallel = true;
    for (std::int64_t i = pieces * thread / g_threads; i < pieces * (thread + 1) / g_threads; ++i) piece(i);
    g_in_parallel = false;
  };
  std::vector<std::thread> others;
  for (int t = 1; t < g_threads; ++t) others.emplace_back(share, t);
  share(0);
  for (std::thread& t : others) t.join();
#endif
}

void* allocate(std::size_t bytes) {
  const std::size_t rounded = (bytes + 63) / 64 * 64;
  void* data = std::aligned_alloc(64, rounded == 0 ? 64 : rounded);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

void release(void* data) noexcept { std::free(data); }

}  // namespace fathom::cpu
