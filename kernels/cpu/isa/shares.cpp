// Rows of shares and what is asked of them: not compiled anew for each instruction set.
#include "kernels/cpu/isa/cpu_backend.h"

namespace fathom::cpu::FATHOM_ISA {

void CpuBackend::make_shares(View shares, ConstView logits, std::int64_t rows, std::int64_t vocab,
                             std::int64_t choices, double temperature) {
  make_shares_on_host(shares, logits, rows, vocab, choices, temperature);
}

void CpuBackend::ask_shares(std::span<ShareQuestion> questions, std::int64_t choices) {
  ask_shares_on_host(questions, choices);
}

}  // namespace fathom::cpu::FATHOM_ISA
