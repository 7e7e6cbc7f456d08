// Which copy of the CPU backend runs: the best instruction set that this processor and this build have.
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include <fmt/format.h>

#include "kernels/backend.h"
#include "kernels/cpu/host.h"
#include "kernels/error.h"

extern "C" void openblas_set_num_threads(int);

namespace fathom {
namespace cpu {
#ifdef FATHOM_HAVE_ISA_AVX512
namespace avx512 {
Backend* make(const BackendOptions&, int);
}
#endif
#ifdef FATHOM_HAVE_ISA_AVX2
namespace avx2 {
Backend* make(const BackendOptions&, int);
}
#endif
namespace portable {
Backend* make(const BackendOptions&, int);
}
}  // namespace cpu

namespace {

struct Candidate {
  const char* name;
  bool runs_here;
  Backend* (*make)(const BackendOptions&, int);
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options, int threads) {
  const Candidate candidates[] = {
#ifdef FATHOM_HAVE_ISA_AVX512
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
       cpu::avx512::make},
#endif
#ifdef FATHOM_HAVE_ISA_AVX2
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), cpu::avx2::make},
#endif
      {"portable", true, cpu::portable::make},
  };
  if (threads <= 0) threads = static_cast<int>(std::thread::hardware_concurrency());
  cpu::set_threads(threads);
#ifdef FATHOM_OPENMP
  openblas_set_num_threads(cpu::threads());
#else
  openblas_set_num_threads(1);  // its OpenMP threads would be invisible to ThreadSanitizer
#endif

  const char* wanted = std::getenv("FATHOM_ISA");
  for (const Candidate& c : candidates) {
    if (wanted != nullptr && std::strcmp(wanted, c.name) != 0) continue;
    if (c.runs_here) return std::unique_ptr<Backend>(c.make(options, cpu::threads()));
    if (wanted != nullptr) {
      throw UserError(
          fmt::format("FATHOM_ISA={} asks for an instruction set that this processor lacks.", wanted),
          "Unset it to use the best one that there is.");
    }
  }
  throw UserError(fmt::format("FATHOM_ISA={} is not an instruction set of this build.", wanted),
                  "It has portable and, on x86-64, avx2 and avx512; unset it to use the best one.");
}

}  // namespace fathom
