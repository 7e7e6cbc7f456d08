#include "app/bench_kernels.h"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <random>

#include <fmt/format.h>

#include "app/device.h"
#include "kernels/capture.h"
#include "kernels/error.h"
#include "src/core/stopwatch.h"

namespace fathom::app {

namespace {

constexpr double kLargestCache = 150e6;  // bytes: three times the L2 of the largest GPU we know
constexpr double kBatchSeconds = 20e-3;
constexpr int kBatches = 5;
constexpr double kShortLaunch = 100e-6;  // seconds

Context make_context(const KernelBenchFlags& flags, const Globals& globals) {
  Config config;
  config.deterministic = flags.deterministic;
  std::shared_ptr<Backend> backend = open_backend(globals, config);
  const std::string precision = !flags.precision.empty() ? flags.precision
                                : backend->is_cpu()      ? "fp32"
                                                         : "bf16";
  require_precision(*backend, {"--precision", precision, "--precision fp32"}, globals, config);
  return {std::move(backend), precision == "bf16" ? DType::BF16 : DType::F32};
}

// A number of launches in turn over the sets; recorded, they go to the device as one, so that a kernel of
// microseconds is timed and not the host that launches it.
class Batch {
 public:
  Batch(Backend& backend, const std::vector<Launch>& sets, std::int64_t times, bool record)
      : backend_(backend), sets_(sets), times_(times) {
    if (!record) return;
    recorded_ = capture(backend, [this] { launch_all(); });
    seconds();  // the first launch also brings it to the device
  }

  /// The wait for them included.
  double seconds() const {
    const Stopwatch watch;
    if (recorded_) {
      recorded_->launch();
    } else {
      launch_all();
    }
    backend_.synchronize();
    return watch.seconds();
  }

 private:
  void launch_all() const {
    for (std::int64_t i = 0; i < times_; ++i) sets_[static_cast<std::size_t>(i) % sets_.size()](backend_);
  }

  Backend& backend_;
  const std::vector<Launch>& sets_;
  std::int64_t times_;
  std::unique_ptr<CapturedWork> recorded_;
};

}  // namespace

void add_kernel_benches(CLI::App& bench, Globals& globals) {
  add_bench_copy(bench, globals);
  add_bench_gemm(bench, globals);
  add_bench_attention(bench, globals);
  add_bench_ops(bench, globals);
}

void add_kernel_bench_flags(CLI::App& sub, KernelBenchFlags& flags, Globals& globals) {
  sub.add_option("--precision", flags.precision, "bf16 | fp32; default: bf16 on a GPU, fp32 on the CPU")
      ->check(CLI::IsMember({"bf16", "fp32"}));
  sub.add_flag("--deterministic", flags.deterministic, "Kernels that are bit-equal from run to run");
  add_global_flags(sub, globals);
}

KernelBench::KernelBench(const std::string& name, const KernelBenchFlags& flags, const Globals& globals)
    : context_(make_context(flags, globals)), name_(name), json_(globals.json) {}

Tensor KernelBench::compute(const Shape& shape) {
  Tensor t = context_.empty(shape);
  context_.backend().fill_normal(t, 1.0, 1, ++stream_);
  return t;
}

Tensor KernelBench::stat(const Shape& shape) {
  Tensor t = context_.empty_stat(shape);
  context_.backend().fill_normal(t, 1.0, 1, ++stream_);
  return t;
}

Tensor KernelBench::ids(std::int64_t n, std::int64_t limit) {
  std::mt19937_64 random(++stream_);
  std::uniform_int_distribution<std::int32_t> any(0, static_cast<std::int32_t>(limit) - 1);
  std::vector<std::int32_t> values(static_cast<std::size_t>(n));
  for (std::int32_t& x : values) x = any(random);
  Tensor t = context_.empty({n}, DType::I32);
  from_host(context_.backend(), t, values);
  return t;
}

Tensor KernelBench::some_rows(std::int64_t rows, std::int64_t count) {
  std::vector<std::int32_t> values(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    values[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i * rows / count);
  }
  Tensor t = context_.empty({count}, DType::I32);
  from_host(context_.backend(), t, values);
  return t;
}

double KernelBench::seconds(double bytes, const std::function<Launch()>& make) {
  Backend& backend = context_.backend();
  constexpr double kMostSets = 1024;
  const auto wanted =
      static_cast<std::size_t>(std::min(kMostSets, std::ceil(kLargestCache / std::max(1.0, bytes))));
  std::vector<Launch> sets;
  sets.reserve(wanted);
  while (sets.size() < wanted) sets.push_back(make());
  for (const Launch& launch : sets) launch(backend);  // plans are made and memory is touched
  backend.synchronize();
  std::int64_t times = 1;
  double time = 0;
  while ((time = Batch(backend, sets, times, false).seconds()) < kBatchSeconds) times *= 2;
  // Long ones hide their launches, and a large copy is another, slower one when it is recorded (docs/log.md).
  const bool record = backend.can_capture() && time / static_cast<double>(times) < kShortLaunch;
  auto batch = std::make_unique<Batch>(backend, sets, times, record);
  while (record && batch->seconds() < kBatchSeconds) {
    batch.reset();  // its memory before the next one's
    times *= 2;
    batch = std::make_unique<Batch>(backend, sets, times, record);
  }
  std::vector<double> found;
  found.reserve(kBatches);
  for (int i = 0; i < kBatches; ++i) found.push_back(batch->seconds() / static_cast<double>(times));
  batch.reset();
  std::sort(found.begin(), found.end());
  sets.clear();
  context_.allocator().release_cache();
  return found[kBatches / 2];
}

void KernelBench::print(const Line& line) const {
  const double rate = line.amount / line.seconds / (line.unit == "tflops" ? 1e12 : 1e9);
  const bool known = line.ceiling.rate > 0;
  const double share = known ? rate / line.ceiling.rate : 0;
  if (json_) {
    nlohmann::json json = {{"bench", name_},
                           {"device", device()},
                           {"dtype", fathom::name_of(context_.compute_dtype())},
                           {"what", line.what},
                           {"ms", line.seconds * 1e3},
                           {line.unit, rate},
                           {"ceiling", line.ceiling.what},
                           {"ceiling_" + line.unit, known ? nlohmann::json(line.ceiling.rate) : nullptr},
                           {"share_of_ceiling", known ? nlohmann::json(share) : nullptr}};
    json.update(line.shape);
    if (line.like_rate > 0) json["share_of_equal_copy"] = rate / line.like_rate;
    std::cout << json.dump() << "\n";
    return;
  }
  std::string shape;
  for (const auto& [key, value] : line.shape.items()) shape += fmt::format(" {} {}", key, value.dump());
  std::cout << fmt::format("{:<30} {:>9.4f} ms {:>8.4g} {} ", line.what, line.seconds * 1e3, rate,
                           line.unit == "tflops" ? "TFLOP/s" : "GB/s")
            << (known ? fmt::format("{:>4.0f} % of {:.4g} ({})", 100 * share, line.ceiling.rate,
                                    line.ceiling.what)
                      : line.ceiling.what)
            << (line.like_rate > 0
                    ? fmt::format(", {:.0f} % of a copy of as much", 100 * rate / line.like_rate)
                    : "")
            << " " << shape << "\n";
}

double KernelBench::copy_rate() { return copy_rate(on_cpu() ? 64 << 20 : 1 << 30); }

double KernelBench::copy_rate(std::int64_t bytes) {
  const auto element = static_cast<std::int64_t>(size_of(context_.compute_dtype()));
  const std::int64_t n = std::max<std::int64_t>(1, bytes / element);
  const double moved = 2.0 * static_cast<double>(n * element);
  return moved / seconds(moved, [&]() -> Launch {
           return [to = compute({n}), from = compute({n})](Backend& b) { b.copy(to, from); };
         });
}

double KernelBench::gemm_rate() {
  const std::int64_t side = on_cpu() ? 1024 : 8192;
  const auto n = static_cast<double>(side);
  const double elements = 3 * n * n;
  const double time =
      seconds(elements * static_cast<double>(size_of(context_.compute_dtype())), [&]() -> Launch {
        return [y = compute({side, side}), x = compute({side, side}), w = compute({side, side}),
                s = LinearShape{side, side, side}](Backend& b) { b.linear_forward(y, x, w, s); };
      });
  return 2 * n * n * n / time;
}

}  // namespace fathom::app
