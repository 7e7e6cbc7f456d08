// parallel_for for the kernels, and scratch memory of a thread.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cpu/host.h"

namespace fathom::cpu::FATHOM_ISA {

/// body(begin, end) over [0, n) in pieces of `grain` elements, on all threads.
template <typename Body>
void parallel_for(std::int64_t n, std::int64_t grain, Body&& body) {
  if (n <= 0) return;
  using B = std::remove_reference_t<Body>;
  run_pieces(
      n, grain, [](void* b, std::int64_t begin, std::int64_t end) { (*static_cast<B*>(b))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace fathom::cpu::FATHOM_ISA
