// fathom bench attention: causal attention, forward and backward, of whole sequences and of the tokens that a
// routed block keeps.
#include <cmath>
#include <memory>

#include <fmt/format.h>

#include "app/bench_kernels.h"
#include "app/device.h"
#include "kernels/error.h"

namespace fathom::app {

namespace {

struct AttentionFlags {
  KernelBenchFlags kernel;
  std::int64_t batch = 0;
  std::int64_t seq = 0;
  std::int64_t heads = 12;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
};

void measure(KernelBench& bench, const AttentionShape& s, const Ceiling& ceiling) {
  const std::int64_t rows = s.batch * s.seq;
  const std::int64_t row = (s.heads + 2 * s.kv_heads) * s.head_dim;
  const std::int64_t out_row = s.heads * s.head_dim;
  // Two products of T x T x d a head forward and five backward; causal: half of it.
  const double product = static_cast<double>(s.batch * s.heads) * static_cast<double>(s.seq) *
                         static_cast<double>(s.seq) * static_cast<double>(s.head_dim);
  const auto element = static_cast<double>(size_of(bench.context().compute_dtype()));
  const double bytes = element * static_cast<double>(rows * (row + out_row));
  const auto print = [&](const char* direction, double flops, double seconds) {
    const nlohmann::json shape = {{"direction", direction}, {"batch", s.batch},
                                  {"seq", s.seq},           {"heads", s.heads},
                                  {"kv_heads", s.kv_heads}, {"head_dim", s.head_dim}};
    bench.print({fmt::format("attention T {} d {} {}", s.seq, s.head_dim, direction), shape, flops, "tflops",
                 seconds, ceiling});
  };
  print("forward", 2 * product, bench.seconds(bytes, [&]() -> Launch {
    return [out = bench.compute({rows, out_row}), lse = bench.stat({s.batch, s.heads, s.seq}),
            qkv = bench.compute({rows, row}), s](Backend& b) { b.attention_forward(out, lse, qkv, {}, s); };
  }));
  print("backward", 5 * product, bench.seconds(2 * bytes, [&]() -> Launch {
    const Tensor out = bench.compute({rows, out_row});
    const Tensor lse = bench.stat({s.batch, s.heads, s.seq});
    const Tensor qkv = bench.compute({rows, row});
    bench.context().backend().attention_forward(out, lse, qkv, {}, s);
    return [dqkv = bench.compute({rows, row}), dout = bench.compute({rows, out_row}), out, lse, qkv,
            s](Backend& b) { b.attention_backward(dqkv, dout, out, lse, qkv, {}, s); };
  }));
}

void run(const AttentionFlags& flags, const Globals& globals) {
  if (flags.kv_heads > 0 && flags.heads % flags.kv_heads != 0) {
    throw UsageError(fmt::format("--kv-heads {} does not divide --heads {}.", flags.kv_heads, flags.heads),
                     "Each key and value head serves the same number of query heads.");
  }
  KernelBench bench("attention", flags.kernel, globals);
  require_head_dim(bench.context().backend(), "--head-dim", flags.head_dim);
  const Ceiling ceiling{fmt::format("forward product {}^3, same process", bench.on_cpu() ? 1024 : 8192),
                        bench.gemm_rate() / 1e12};
  // 65536 tokens of a dense batch; the same sequences after a routed block chose an eighth of each.
  struct Size {
    std::int64_t batch, seq;
  };
  std::vector<Size> sizes =
      bench.on_cpu() ? std::vector<Size>{{1, 2048}, {1, 256}} : std::vector<Size>{{32, 2048}, {32, 256}};
  if (flags.seq > 0) sizes = {{bench.on_cpu() ? 1 : 32, flags.seq}};
  std::vector<std::int64_t> head_dims = {64, 128};
  if (flags.head_dim > 0) head_dims = {flags.head_dim};
  for (const Size& size : sizes) {
    for (const std::int64_t d : head_dims) {
      const AttentionShape s{.batch = flags.batch > 0 ? flags.batch : size.batch,
                             .seq = size.seq,
                             .heads = flags.heads,
                             .kv_heads = flags.kv_heads > 0 ? flags.kv_heads : flags.heads,
                             .head_dim = d,
                             .scale = 1.0 / std::sqrt(static_cast<double>(d))};
      measure(bench, s, ceiling);
    }
  }
}

}  // namespace

void add_bench_attention(CLI::App& bench, Globals& globals) {
  auto flags = std::make_shared<AttentionFlags>();
  CLI::App* sub =
      bench.add_subcommand("attention", "Causal attention, counted as half of the square: TFLOP/s");
  const auto number = [&](const char* name, std::int64_t& value, const char* text, double least) {
    sub->add_option(name, value, text)->capture_default_str()->check(number_from_to(least, 1e9));
  };
  number("--batch", flags->batch, "Sequences; 0: 32 on a GPU, 1 on the CPU", 0);
  number("--seq", flags->seq, "Tokens of a sequence; 0: 2048, and 256 as after routing", 0);
  number("--heads", flags->heads, "Query heads", 1);
  number("--kv-heads", flags->kv_heads, "Key and value heads; 0: as many", 0);
  number("--head-dim", flags->head_dim, "Size of a head; 0: 64 and 128", 0);
  add_kernel_bench_flags(*sub, flags->kernel, globals);
  sub->callback([flags, &globals] { run(*flags, globals); });
}

}  // namespace fathom::app
