// SwiGLU (Shazeer 2020): h = silu(g) u. With p = sigmoid(g): dg = dh u p (1 + g (1 - p)), du = dh g p.
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/partials.h"
#include "kernels/cpu/isa/vector_math.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

template <typename T>
void forward(T* h, const T* gate_up, std::int64_t rows, std::int64_t hidden) {
  parallel_for(rows, row_grain(hidden), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const T* g = gate_up + i * 2 * hidden;
      const T* u = g + hidden;
      T* to = h + i * hidden;
#pragma omp simd
      for (std::int64_t j = 0; j < hidden; ++j) to[j] = g[j] * vsigmoid(g[j]) * u[j];
    }
  });
}

template <typename T>
void backward(T* dgate_up, T* h, const T* dh, const T* gate_up, std::int64_t rows, std::int64_t hidden) {
  parallel_for(rows, row_grain(hidden), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const T* g = gate_up + i * 2 * hidden;
      const T* u = g + hidden;
      const T* d = dh + i * hidden;
      T* dg = dgate_up + i * 2 * hidden;
      T* du = dg + hidden;
#pragma omp simd
      for (std::int64_t j = 0; j < hidden; ++j) {
        const T p = vsigmoid(g[j]);
        const T silu = g[j] * p;
        dg[j] = d[j] * u[j] * (p + silu * (T(1) - p));
        du[j] = d[j] * silu;
      }
      if (h == nullptr) continue;
      T* to = h + i * hidden;
#pragma omp simd
      for (std::int64_t j = 0; j < hidden; ++j) to[j] = g[j] * vsigmoid(g[j]) * u[j];
    }
  });
}

}  // namespace

void CpuBackend::swiglu_forward(View h, ConstView gate_up, std::int64_t rows, std::int64_t hidden) {
  const char* op = "swiglu_forward";
  for_compute_type(op, h.dtype, [&](auto zero) {
    using T = decltype(zero);
    forward(output<T>(op, "h", h, rows * hidden), input<T>(op, "gate_up", gate_up, rows * 2 * hidden), rows,
            hidden);
  });
}

void CpuBackend::swiglu_backward(View dgate_up, View h, ConstView dh, ConstView gate_up, std::int64_t rows,
                                 std::int64_t hidden) {
  const char* op = "swiglu_backward";
  for_compute_type(op, dgate_up.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward(output<T>(op, "dgate_up", dgate_up, rows * 2 * hidden),
             optional_output<T>(op, "h", h, rows * hidden), input<T>(op, "dh", dh, rows * hidden),
             input<T>(op, "gate_up", gate_up, rows * 2 * hidden), rows, hidden);
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
