// fathom doctor: what this machine has, and what that means for Fathom.
#include <algorithm>
#include <iostream>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "app/command.h"
#include "app/device.h"
#include "app/gemm_rate.h"
#ifdef FATHOM_CUDA
#include "kernels/cuda/device_query.h"
#include "kernels/cuda/libraries.h"
#endif
#include "kernels/error.h"
#include "src/core/build_info.h"
#include "src/core/stopwatch.h"
#include "train/comm/open_communicator.h"

extern "C" {
char* openblas_get_config(void);
int openblas_get_parallel(void);
}

namespace fathom::app {

namespace {

// Reads and writes a buffer larger than the caches, in GB/s.
double copy_rate() {
  constexpr std::size_t kBytes = 256U << 20;
  const std::vector<char> from(kBytes, 1);
  std::vector<char> to(kBytes);
  double best = 1e30;
  for (int i = 0; i < 4; ++i) {
    const Stopwatch watch;
    std::copy(from.begin(), from.end(), to.begin());
    best = std::min(best, watch.seconds());
  }
  return 2.0 * static_cast<double>(kBytes) / best / 1e9;
}

struct GpuReport {
  std::vector<std::string> lines;  // for people
  nlohmann::json gpus = nlohmann::json::array();
  nlohmann::json libraries = nlohmann::json::array();
  std::string why_not;  // why there is no GPU to train on; empty: there is one
  std::vector<std::string> hints;
};

#ifdef FATHOM_CUDA
void report_devices(GpuReport& out) {
  const cuda::DeviceReport report = cuda::query_devices();
  std::size_t unusable = 0;
  for (const cuda::Device& d : report.devices) {
    const double gib = static_cast<double>(d.memory_bytes) / (1 << 30);
    nlohmann::json json = {{"index", d.index},
                           {"name", d.name},
                           {"compute_capability", fmt::format("{}.{}", d.major, d.minor)},
                           {"memory_bytes", d.memory_bytes},
                           {"memory_free_bytes", nullptr},
                           {"memory_gb_per_s", d.memory_gb_per_s},
                           {"multiprocessors", d.multiprocessors}};
    std::string free_text;
    try {
      const std::int64_t free_bytes = cuda::prove_device(d).free_bytes;
      const double free_gib = static_cast<double>(free_bytes) / (1 << 30);
      json["memory_free_bytes"] = free_bytes;
      free_text = fmt::format(" ({:.1f} free)", free_gib);
      // The driver and CUDA themselves hold a little.
      constexpr double kFree = 0.9;
      if (free_gib < kFree * gib) {
        out.hints.push_back(
            fmt::format("Other programs hold {:.1f} GiB of GPU {}: training has so much less, and shares its "
                        "time. nvidia-smi "
                        "lists them.",
                        gib - free_gib, d.index));
      }
    } catch (const UserError& e) {  // the other GPUs may do
      out.hints.push_back(fmt::format("GPU {} cannot be used. {}", d.index, e.what()));
      ++unusable;
    }
    out.lines.push_back(fmt::format(
        "GPU       {}: {}, compute capability {}.{}, {:.1f} GiB{} at up to {:.0f} GB/s, {} multiprocessors",
        d.index, d.name, d.major, d.minor, gib, free_text, d.memory_gb_per_s, d.multiprocessors));
    out.gpus.push_back(std::move(json));
  }
  if (unusable == report.devices.size())
    out.why_not = "no GPU here can be used, so the CPU trains; the reasons are below";
  out.lines.push_back(fmt::format("CUDA      the driver serves {}; this build is of {}, with code for {}",
                                  cuda::version_text(report.driver_version),
                                  cuda::version_text(report.runtime_version), cuda::built_architectures()));
}

void report_libraries(GpuReport& out) {
  for (const cuda::Library& l : cuda::query_libraries(out.why_not.empty())) {
    const bool usable = !l.version.empty();
    out.lines.push_back(fmt::format("{:<9} {}", l.name, usable ? l.version : l.why_not));
    out.libraries.push_back({{"name", l.name},
                             {"version", usable ? nlohmann::json(l.version) : nullptr},
                             {"why_not", l.why_not}});
    // Without a GPU nothing is lost by their lack.
    if (!usable && out.why_not.empty()) out.hints.push_back(fmt::format("No {}. {}", l.name, l.without));
  }
}
#endif

// What this machine has for the CUDA parts. Having none is no failure of doctor's.
GpuReport gpu_report() {
  GpuReport out;
#ifdef FATHOM_CUDA
  try {
    report_devices(out);
  } catch (
      const UserError& e) {  // no driver, one that is too old, no GPU, or one that this build has no code for
    out.why_not = e.what();
  }
#else
  out.why_not = "not looked for: this build is without CUDA (preset cuda)";
#endif
  if (!out.why_not.empty()) out.lines.push_back("GPU       " + out.why_not);
#ifdef FATHOM_CUDA
  report_libraries(out);
#endif
  return out;
}

void run(Globals& globals) {
  const std::shared_ptr<Backend> backend = make_cpu_backend({}, globals.threads);
  constexpr int kOpenMp = 2;  // openblas_get_parallel: 0 sequential, 1 its own threads, 2 OpenMP
  const bool shares_threads = openblas_get_parallel() == kOpenMp;
  const double gflops = gemm_rate(2048, 256, 768) / 1e9;  // a training step's shape
  const double gbytes = copy_rate();
  const double memory = static_cast<double>(machine_memory()) / (1 << 30);
  std::vector<std::string> hints;
  if (!shares_threads) {
    hints.emplace_back(
        "OpenBLAS runs on threads of its own, which compete with Fathom's. Install libopenblas-openmp-dev "
        "and build "
        "again.");
  }
  const GpuReport gpus = gpu_report();
  hints.insert(hints.end(), gpus.hints.begin(), gpus.hints.end());
  const BuildInfo& build = build_info();
  const std::string mpi = mpi_version();
  if (globals.json) {
    const nlohmann::json json = {{"version", build.version},
                                 {"git_sha", build.git_sha},
                                 {"compiler", build.compiler},
                                 {"build_type", build.build_type},
                                 {"instruction_sets", build.instruction_sets},
                                 {"cuda_build", build.cuda},
                                 {"gpus", gpus.gpus},
                                 {"gpu_why_not", gpus.why_not},
                                 {"cuda_libraries", gpus.libraries},
                                 {"cpu", backend->description()},
                                 {"cores", std::thread::hardware_concurrency()},
                                 {"memory_gib", memory},
                                 {"openblas", openblas_get_config()},
                                 {"openblas_openmp", shares_threads},
                                 {"mpi", mpi.empty() ? nlohmann::json(nullptr) : nlohmann::json(mpi)},
                                 {"sgemm_gflops", gflops},
                                 {"copy_gb_per_s", gbytes},
                                 {"hints", hints}};
    std::cout << json.dump() << "\n";
    return;
  }
  std::cout << fmt::format("fathom    {}\n", describe_build())
            << fmt::format("CPU       {}; {} cores\n", backend->description(),
                           std::thread::hardware_concurrency())
            << fmt::format("memory    {:.1f} GiB; one core copies {:.1f} GB/s (read + write)\n", memory,
                           gbytes)
            << fmt::format("OpenBLAS  {}\n", openblas_get_config())
            << fmt::format("MPI       {}\n", mpi.empty() ? "this build has none (docs/distributed.md)" : mpi)
            << fmt::format("sgemm     {:.0f} GFLOP/s on all threads: the ceiling of a training step here\n",
                           gflops);
  for (const std::string& line : gpus.lines) std::cout << line << "\n";
  for (const std::string& hint : hints) std::cout << "hint      " << hint << "\n";
}

}  // namespace

void add_doctor(CLI::App& app, Globals& globals) {
  CLI::App* sub = app.add_subcommand("doctor", "What this machine has, and hints");
  add_global_flags(*sub, globals);
  sub->callback([&globals] { run(globals); });
}

}  // namespace fathom::app
