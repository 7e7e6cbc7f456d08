// GB/s of every memory-bound op of the CPU backend at training sizes, beside memcpy's.
//
// The bytes are those that an op must move: each input read once, each output written once, an accumulated
// one both. FATHOM_ISA picks the instruction set, FATHOM_THREADS the threads.
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>

#include "kernels/backend.h"

namespace {

using namespace fathom;

constexpr std::int64_t kRows = 2048, kWidth = 256, kHidden = 704, kVocab = 4096, kBatch = 8,
                       kKept = kRows / 8;
constexpr std::int64_t kHeads = 4, kKvHeads = 4, kHeadDim = 64, kArena = 8 << 20;

/// Memory that the benchmarks' views point into, filled once.
class Pool {
 public:
  explicit Pool(Backend& b) : backend_(b) {}
  View floats(std::int64_t n, double scale = 1.0) {
    const View v{backend_.allocate(static_cast<std::size_t>(n) * 4), n, DType::F32};
    backend_.fill_normal(v, scale, 1, stream_++);
    return v;
  }
  View integers(std::int64_t n, const std::function<std::int64_t(std::int64_t)>& value) {
    const View v{backend_.allocate(static_cast<std::size_t>(n) * 4), n, DType::I32};
    for (std::int64_t i = 0; i < n; ++i)
      static_cast<std::int32_t*>(v.data)[i] = static_cast<std::int32_t>(value(i));
    return v;
  }

 private:
  Backend& backend_;
  std::uint64_t stream_ = 0;
};

void add(const char* name, double bytes, std::function<void()> body) {
  benchmark::RegisterBenchmark(name,
                               [bytes, body = std::move(body)](benchmark::State& state) {
                                 for (auto _ : state) body();
                                 state.SetBytesProcessed(static_cast<std::int64_t>(bytes) *
                                                         static_cast<std::int64_t>(state.iterations()));
                               })
      ->UseRealTime()
      ->Unit(benchmark::kMicrosecond);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  const char* threads = std::getenv("FATHOM_THREADS");
  const auto owner = make_cpu_backend({}, threads == nullptr ? 0 : std::atoi(threads));
  Backend& b = *owner;
  benchmark::AddCustomContext("backend", b.description());
  Pool pool(b);

  const std::int64_t n = kRows * kWidth, f = kRows * kHidden, l = kRows * kVocab;
  const std::int64_t qkv = kRows * (kHeads + 2 * kKvHeads) * kHeadDim;
  const View x = pool.floats(n), y = pool.floats(n), z = pool.floats(n), h = pool.floats(n),
             w = pool.floats(kWidth);
  const View dw = pool.floats(kWidth), stat = pool.floats(kRows), stat2 = pool.floats(kRows),
             one = pool.floats(1);
  const View eight = pool.floats(8), hidden = pool.floats(f), gate_up = pool.floats(2 * f);
  const View dgate_up = pool.floats(2 * f), logits = pool.floats(l), dlogits = pool.floats(l);
  const View table = pool.floats(kVocab * kWidth), packed = pool.floats(qkv), packed2 = pool.floats(qkv);
  const View qw = pool.floats(kHeadDim), kw = pool.floats(kHeadDim), dqw = pool.floats(kHeadDim);
  const View dkw = pool.floats(kHeadDim), rstd2 = pool.floats(kRows * (kHeads + kKvHeads));
  const View part = pool.floats(kKept * kWidth), part2 = pool.floats(kKept * kWidth);
  const View p = pool.floats(kArena), m = pool.floats(kArena), v = pool.floats(kArena),
             g = pool.floats(kArena);
  b.fill(v, 1.0);
  const View tokens = pool.integers(kRows, [](std::int64_t i) { return i * 2654435761 % kVocab; });
  const View positions = pool.integers(kRows, [](std::int64_t i) { return i % (kRows / kBatch); });
  const View kept = pool.integers(kKept, [](std::int64_t i) { return i * 8 + i % 3; });
  const NormShape norm{kRows, kWidth, 1e-5};
  const QkvShape rope{kRows, kHeads, kKvHeads, kHeadDim, 10000.0, 1e-5};
  const GatherShape gather{kRows, kKept, kWidth};
  const AdamWParams adamw{0.9, 0.95, 1e-8, 0.1};
  UpdateNumbers update = update_numbers(adamw, 1e-4, 1);
  const View numbers{&update, kUpdateNumbers, DType::F64};
  const auto N = static_cast<double>(n) * 4, F = static_cast<double>(f) * 4, L = static_cast<double>(l) * 4;
  const auto Q = static_cast<double>(qkv) * 4, K = static_cast<double>(kKept * kWidth) * 4;
  const auto A = static_cast<double>(kArena) * 4, R = static_cast<double>(kRows) * 4;

  add("memcpy_large_one_thread", 2 * A, [&] { std::memcpy(p.data, g.data, static_cast<std::size_t>(A)); });
  add("memcpy_small_one_thread", 2 * N, [&] { std::memcpy(y.data, x.data, static_cast<std::size_t>(N)); });
  add("copy_large", 2 * A, [&] { b.copy(p, g); });
  add("copy", 2 * N, [&] { b.copy(y, x); });
  add("fill", N, [&] { b.fill(y, 1.0); });
  add("fill_normal", N, [&] { b.fill_normal(y, 1.0, 1, 2); });
  add("add", 3 * N, [&] { b.add(z, x, y); });
  add("accumulate", 3 * N, [&] { b.accumulate(z, x); });
  add("scale", 2 * N, [&] { b.scale(z, 1.0); });
  add("sum", N, [&] { b.sum(one, x); });
  add("sum_squares", N, [&] { b.sum_squares(one, x); });
  add("sum_squares_large", A, [&] { b.sum_squares(one, g); });
  add("count_nonfinite", N, [&] { benchmark::DoNotOptimize(b.count_nonfinite(x)); });
  add("embedding_forward", 2 * N, [&] { b.embedding_forward(y, table, tokens, kRows, kWidth); });
  add("embedding_backward", 3 * N, [&] { b.embedding_backward_accumulate(table, x, tokens, kRows, kWidth); });
  add("rms_norm_forward", 2 * N, [&] { b.rms_norm_forward(y, stat, x, w, norm); });
  add("rms_norm_backward", 3 * N, [&] { b.rms_norm_backward(z, dw, y, x, w, stat, norm); });
  add("add_rms_norm_forward", 4 * N, [&] { b.add_rms_norm_forward(h, y, stat, x, z, w, norm); });
  add("add_rms_norm_backward", 4 * N, [&] { b.add_rms_norm_backward(z, dw, h, y, x, w, stat, norm); });
  add("rms_norm_backward_from_output", 4 * N,
      [&] { b.rms_norm_backward_from_output(z, dw, h, y, x, w, stat, norm); });
  add("rope_forward", 2 * Q,
      [&] { b.rope_forward(packed2, View{}, packed, positions, View{}, View{}, rope); });
  add("rope_forward_in_place", 2 * Q,
      [&] { b.rope_forward(packed, View{}, packed, positions, View{}, View{}, rope); });
  add("rope_forward_qk_norm", 2 * Q,
      [&] { b.rope_forward(packed2, rstd2, packed, positions, qw, kw, rope); });
  add("rope_backward_qk_norm", 3 * Q,
      [&] { b.rope_backward(packed2, dqw, dkw, packed, packed, rstd2, positions, qw, kw, rope); });
  add("swiglu_forward", 3 * F, [&] { b.swiglu_forward(hidden, gate_up, kRows, kHidden); });
  add("swiglu_backward", 5 * F, [&] { b.swiglu_backward(dgate_up, hidden, gate_up, kRows, kHidden); });
  add("swiglu_forward_beside_gate", 4 * F,
      [&] { b.swiglu_forward_beside_gate(dgate_up, gate_up, kRows, kHidden); });
  add("swiglu_backward_from_output", 5 * F,
      [&] { b.swiglu_backward_from_output(dgate_up, hidden, gate_up, kRows, kHidden); });
  add("bias_silu_forward", 2 * N, [&] { b.bias_silu_forward(y, x, w, kRows, kWidth); });
  add("bias_silu_backward", 3 * N, [&] { b.bias_silu_backward(z, dw, y, x, w, kRows, kWidth); });
  add("row_score_forward", N, [&] { b.row_score_forward(stat, x, w, one, kRows, kWidth); });
  add("row_score_backward", 3 * N,
      [&] { b.row_score_backward_accumulate(z, dw, one, stat2, x, w, kRows, kWidth); });
  add("top_k_rows", R, [&] { b.top_k_rows(kept, stat2, kBatch, kRows / kBatch, kKept / kBatch); });
  add("gather_rows_forward", 2 * K, [&] { b.gather_rows_forward(part, x, kept, gather); });
  add("gather_rows_backward", 3 * K, [&] { b.gather_rows_backward_accumulate(z, part, kept, gather); });
  add("gated_scatter_forward", 2 * N + 2 * K,
      [&] { b.gated_scatter_forward(y, x, part, stat2, kept, GateKind::Sigmoid, gather); });
  add("gated_scatter_in_place", 3 * K,
      [&] { b.gated_scatter_forward(y, y, part, stat2, kept, GateKind::Sigmoid, gather); });
  add("gated_scatter_backward", 3 * K,
      [&] { b.gated_scatter_backward(part2, stat, x, part, stat2, kept, GateKind::Sigmoid, gather); });
  add("cross_entropy", 2 * L, [&] { b.cross_entropy(stat, dlogits, logits, tokens, kRows, kVocab, 1.0); });
  add("cross_entropy_loss_only", L,
      [&] { b.cross_entropy(stat, View{}, logits, tokens, kRows, kVocab, 1.0); });
  add("membership_bce", 2 * R, [&] { b.membership_bce(stat, View{}, stat2, kept, kRows, 1.0); });
  add("routing_statistics", R, [&] { b.routing_statistics(eight, stat2, stat2, kept, 0.0, kRows); });
  add("adamw", 7 * A, [&] { b.adamw(p, View{}, m, v, g, numbers, adamw); });
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
