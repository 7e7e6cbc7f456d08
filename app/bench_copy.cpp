// fathom bench copy: bytes read and written a second by the device's own copy, the ceiling of ops that are
// bound by memory.
#include <memory>

#include "app/bench_kernels.h"
#ifdef FATHOM_CUDA
#include "kernels/cuda/device_query.h"
#endif

namespace fathom::app {

namespace {

struct CopyFlags {
  KernelBenchFlags kernel;
  std::int64_t bytes = 0;
};

// What the memory's clock and width allow, in GB/s; nothing known of the CPU's.
Ceiling memory_ceiling([[maybe_unused]] const KernelBench& bench) {
#ifdef FATHOM_CUDA
  if (!bench.on_cpu()) {
    double rate = 0;
    const std::string name = bench.device();
    for (const cuda::Device& d : cuda::query_devices().devices) {
      if (name.find(d.name) != std::string::npos) rate = d.memory_gb_per_s;
    }
    return {"the memory's clock times its width", rate};
  }
#endif
  return {"unknown", 0};
}

void run(const CopyFlags& flags, const Globals& globals) {
  KernelBench bench("copy", flags.kernel, globals);
  const Ceiling ceiling = memory_ceiling(bench);
  const std::int64_t element = static_cast<std::int64_t>(size_of(bench.context().compute_dtype()));
  std::vector<std::int64_t> sizes = {16 << 20, 64 << 20, 256 << 20};
  if (!bench.on_cpu()) sizes.push_back(1 << 30);
  if (flags.bytes > 0) sizes = {flags.bytes};
  for (const std::int64_t bytes : sizes) {
    const std::int64_t n = (bytes + element - 1) / element;
    const double moved = 2.0 * static_cast<double>(n * element);
    const double time = bench.seconds(moved, [&]() -> Launch {
      return [to = bench.compute({n}), from = bench.compute({n})](Backend& b) { b.copy(to, from); };
    });
    bench.print({"copy", {{"bytes", n * element}}, moved, "gb_per_s", time, ceiling});
  }
}

}  // namespace

void add_bench_copy(CLI::App& bench, Globals& globals) {
  auto flags = std::make_shared<CopyFlags>();
  CLI::App* sub = bench.add_subcommand("copy", "The device's copy: GB/s, read and written");
  sub->add_option("--bytes", flags->bytes, "Bytes to copy; 0: several sizes")
      ->capture_default_str()
      ->check(number_from_to(0, 1e12));
  add_kernel_bench_flags(*sub, flags->kernel, globals);
  sub->callback([flags, &globals] { run(*flags, globals); });
}

}  // namespace fathom::app
