#include "kernels/cpu/host.h"
#include "kernels/cpu/isa/cpu_backend.h"

#define FATHOM_QUOTE_(x) #x
#define FATHOM_QUOTE(x) FATHOM_QUOTE_(x)

namespace fathom::cpu::FATHOM_ISA {

std::string CpuBackend::description() const { return describe(FATHOM_QUOTE(FATHOM_ISA), threads_); }

Backend* make(const BackendOptions& options, int threads) { return new CpuBackend(options, threads); }

}  // namespace fathom::cpu::FATHOM_ISA
