// What the benches of single ops share: the device, random data, timing, and how a result is printed.
//
// A timing is the median of five batches of launches, each at least 20 ms of work. Launches of less than 100
// us are recorded and launched as one where the backend can do that: the host would be slower. Launches take
// turns over sets of buffers that together exceed any cache, filled with random numbers: zeros are faster
// than numbers.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "app/command.h"
#include "src/autograd/context.h"

namespace fathom::app {

/// bench copy, gemm, attention and ops.
void add_kernel_benches(CLI::App& bench, Globals& globals);
void add_bench_copy(CLI::App& bench, Globals& globals);
void add_bench_gemm(CLI::App& bench, Globals& globals);
void add_bench_attention(CLI::App& bench, Globals& globals);
void add_bench_ops(CLI::App& bench, Globals& globals);
void add_bench_decode(CLI::App& bench, Globals& globals);  // and prefill
void add_bench_speculative(CLI::App& bench, Globals& globals);
void add_bench_requests(CLI::App& bench, Globals& globals);
void add_bench_batch(CLI::App& bench, Globals& globals);
void add_bench_load(CLI::App& bench, Globals& globals);

/// Declares --precision and --deterministic.
struct KernelBenchFlags {
  std::string precision;
  bool deterministic = false;
};
void add_kernel_bench_flags(CLI::App& sub, KernelBenchFlags& flags, Globals& globals);

/// One launch over its own buffers.
using Launch = std::function<void(Backend&)>;

/// What a rate is held against.
struct Ceiling {
  std::string what;
  double rate = 0;  // of the unit of the line; 0: unknown
};

class KernelBench {
 public:
  KernelBench(const std::string& name, const KernelBenchFlags& flags, const Globals& globals);

  Context& context() { return context_; }
  bool on_cpu() const { return context_.backend().is_cpu(); }
  std::string device() const { return context_.backend().description(); }

  // --- random data
  Tensor compute(const Shape& shape);
  Tensor stat(const Shape& shape);
  /// n whole numbers below `limit`.
  Tensor ids(std::int64_t n, std::int64_t limit);
  /// `count` of `rows` rows, ascending and evenly spread.
  Tensor some_rows(std::int64_t rows, std::int64_t count);

  /// Seconds of one launch. `make` makes one set of buffers and the launch over it; `bytes` is what a launch
  /// touches, by which sets are counted.
  double seconds(double bytes, const std::function<Launch()>& make);

  /// Prints a result: `what` and `shape` name it; amount / seconds, in `unit` (1e9 bytes or 1e12 FLOPs a
  /// second), is held against the ceiling.
  struct Line {
    std::string what;
    nlohmann::json shape = nlohmann::json::object();
    double amount = 0;
    std::string unit;  // "gb_per_s" or "tflops"
    double seconds = 0;
    Ceiling ceiling;
    double like_rate = 0;  // of a copy that moves as many bytes, in the same unit; 0: not measured
  };
  void print(const Line& line) const;

  /// Read and written bytes a second of the backend's own copy of 1 GiB (CPU: 64 MiB).
  double copy_rate();
  /// The same of so many bytes, read once and written once: what a launch of a few microseconds can reach.
  double copy_rate(std::int64_t bytes);
  /// FLOP/s of a square product, 8192 on a side (CPU: 1024): what this device reaches.
  double gemm_rate();

 private:
  Context context_;
  std::string name_;
  bool json_;
  std::uint64_t stream_ = 0;  // of random numbers: no two tensors are equal
};

}  // namespace fathom::app
