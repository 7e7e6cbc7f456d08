// A loop on the CPU backend's threads, for what the host does by itself.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cpu/host.h"

namespace fathom {

/// body(begin, end) over [0, n) in pieces of `grain`, whose ends do not depend on the number of threads,
/// which is what make_cpu_backend() set. The body must not throw.
template <typename Body>
void for_pieces(std::int64_t n, std::int64_t grain, Body&& body) {
  if (n <= 0) return;
  using B = std::remove_reference_t<Body>;
  cpu::run_pieces(
      n, grain, [](void* b, std::int64_t begin, std::int64_t end) { (*static_cast<B*>(b))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace fathom
