// Speed of attention and of the linear layers on the CPU, beside the library's product of the same shape. The
// counter is GFLOP/s by the convention of docs/flops.md: causal attention counts half of T x T.
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include <benchmark/benchmark.h>
#include <cblas.h>

#include "kernels/backend.h"

namespace fathom {
namespace {

std::vector<float> normal(std::int64_t n) {
  std::mt19937 generator(1);
  std::normal_distribution<float> distribution;
  std::vector<float> v(static_cast<std::size_t>(n));
  for (float& x : v) x = distribution(generator);
  return v;
}
View view(std::vector<float>& v) { return {v.data(), static_cast<std::int64_t>(v.size()), DType::F32}; }

void report(benchmark::State& state, double flops) {
  state.counters["GFLOP/s"] = benchmark::Counter(flops * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

/// Arguments: B, T, H, G, d.
AttentionShape attention_shape(const benchmark::State& state) {
  AttentionShape s{state.range(0), state.range(1), state.range(2), state.range(3), state.range(4), 1.0};
  s.scale = 1.0 / std::sqrt(static_cast<double>(s.head_dim));
  return s;
}
double half_square(const AttentionShape& s) {
  return 4.0 * static_cast<double>(s.batch * s.heads * s.head_dim) * static_cast<double>(s.seq * s.seq) / 2;
}

struct AttentionData {
  explicit AttentionData(const AttentionShape& s)
      : qkv(normal(s.batch * s.seq * (s.heads + 2 * s.kv_heads) * s.head_dim)),
        dqkv(qkv.size()),
        out(s.batch * s.seq * s.heads * s.head_dim),
        dout(normal(static_cast<std::int64_t>(out.size()))),
        lse(s.batch * s.seq * s.heads) {}
  std::vector<float> qkv, dqkv, out, dout, lse;
};

void attention_forward(benchmark::State& state) {
  const AttentionShape s = attention_shape(state);
  const auto backend = make_cpu_backend({});
  AttentionData a(s);
  for (auto _ : state) backend->attention_forward(view(a.out), view(a.lse), view(a.qkv), {}, s);
  report(state, half_square(s));
}

void attention_backward(benchmark::State& state) {
  const AttentionShape s = attention_shape(state);
  const auto backend = make_cpu_backend({});
  AttentionData a(s);
  backend->attention_forward(view(a.out), view(a.lse), view(a.qkv), {}, s);
  for (auto _ : state) {
    backend->attention_backward(view(a.dqkv), view(a.dout), view(a.out), view(a.lse), view(a.qkv), {}, s);
  }
  report(state, 2 * half_square(s));
}

void attention_both(benchmark::State& state) {
  const AttentionShape s = attention_shape(state);
  const auto backend = make_cpu_backend({});
  AttentionData a(s);
  for (auto _ : state) {
    backend->attention_forward(view(a.out), view(a.lse), view(a.qkv), {}, s);
    backend->attention_backward(view(a.dqkv), view(a.dout), view(a.out), view(a.lse), view(a.qkv), {}, s);
  }
  report(state, 3 * half_square(s));
}

void attention_shapes(benchmark::internal::Benchmark* b) {
  b->Args({8, 256, 4, 4, 64})->Args({8, 256, 4, 2, 64})->Args({8, 32, 4, 4, 64})->Args({2, 1024, 4, 4, 64});
  b->Args({1, 1024, 1, 1, 64})->Args({8, 256, 4, 4, 40})->UseRealTime();
}
BENCHMARK(attention_forward)->Apply(attention_shapes);
BENCHMARK(attention_backward)->Apply(attention_shapes);
BENCHMARK(attention_both)->Apply(attention_shapes);

enum class Product { Fast, Invariant, Library };

void linear(benchmark::State& state, Product product) {
  const LinearShape s{state.range(0), state.range(1), state.range(2)};
  BackendOptions options;
  options.invariant = product == Product::Invariant;
  const auto backend = make_cpu_backend(options);
  auto x = normal(s.rows * s.in);
  auto w = normal(s.out * s.in);
  std::vector<float> y(static_cast<std::size_t>(s.rows * s.out));
  for (auto _ : state) {
    if (product == Product::Library) {
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<int>(s.rows), static_cast<int>(s.out),
                  static_cast<int>(s.in), 1.0F, x.data(), static_cast<int>(s.in), w.data(),
                  static_cast<int>(s.in), 0.0F, y.data(), static_cast<int>(s.out));
    } else {
      backend->linear_forward(view(y), view(x), view(w), s);
    }
  }
  report(state, 2.0 * static_cast<double>(s.rows) * static_cast<double>(s.in) * static_cast<double>(s.out));
  state.counters["weights GB/s"] = benchmark::Counter(4e-9 * static_cast<double>(s.in * s.out),
                                                      benchmark::Counter::kIsIterationInvariantRate);
}

/// rows, in, out: the training shapes of a small model, then decoding (one row, and a few).
void linear_shapes(benchmark::internal::Benchmark* b) {
  b->Args({2048, 256, 768})->Args({2048, 256, 1408})->Args({2048, 704, 256})->Args({2048, 256, 256});
  b->Args({256, 256, 768})->Args({1, 1024, 8192})->Args({1, 256, 768})->Args({2, 1024, 8192});
  b->Args({4, 1024, 8192})->Args({16, 1024, 8192})->UseRealTime();
}
BENCHMARK_CAPTURE(linear, fast, Product::Fast)->Apply(linear_shapes);
BENCHMARK_CAPTURE(linear, invariant, Product::Invariant)->Apply(linear_shapes);
BENCHMARK_CAPTURE(linear, library, Product::Library)->Apply(linear_shapes);

}  // namespace
}  // namespace fathom

BENCHMARK_MAIN();
