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
void backward(T* dgate_up, const T* dh, const T* gate_up, std::int64_t rows, std::int64_t hidden) {
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
    }
  });
}

/// What silu(gate) counts as where h must tell up.
template <typename T>
T held(T silu) {
  constexpr T kLeast = T(kLeastSilu);
  return silu < kLeast && silu > -kLeast ? (silu < T(0) ? -kLeast : kLeast) : silu;
}

template <typename T>
void forward_beside_gate(T* gate_h, const T* gate_up, std::int64_t rows, std::int64_t hidden) {
  parallel_for(rows, row_grain(hidden), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const T* g = gate_up + i * 2 * hidden;
      const T* u = g + hidden;
      T* to_gate = gate_h + i * 2 * hidden;
      T* to = to_gate + hidden;
#pragma omp simd
      for (std::int64_t j = 0; j < hidden; ++j) {
        const T gate = g[j];
        to[j] = held(gate * vsigmoid(gate)) * u[j];
        to_gate[j] = gate;
      }
    }
  });
}

template <typename T>
void backward_from_output(T* dgate_up, const T* dh, const T* gate_h, std::int64_t rows, std::int64_t hidden) {
  parallel_for(rows, row_grain(hidden), [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const T* g = gate_h + i * 2 * hidden;
      const T* h = g + hidden;
      const T* d = dh + i * hidden;
      T* dg = dgate_up + i * 2 * hidden;
      T* du = dg + hidden;
#pragma omp simd
      for (std::int64_t j = 0; j < hidden; ++j) {
        const T p = vsigmoid(g[j]);
        const T silu = g[j] * p;
        const T u = h[j] / held(silu);
        dg[j] = d[j] * u * (p + silu * (T(1) - p));
        du[j] = d[j] * silu;
      }
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

void CpuBackend::swiglu_backward(View dgate_up, ConstView dh, ConstView gate_up, std::int64_t rows,
                                 std::int64_t hidden) {
  const char* op = "swiglu_backward";
  for_compute_type(op, dgate_up.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward(output<T>(op, "dgate_up", dgate_up, rows * 2 * hidden), input<T>(op, "dh", dh, rows * hidden),
             input<T>(op, "gate_up", gate_up, rows * 2 * hidden), rows, hidden);
  });
}

void CpuBackend::swiglu_forward_beside_gate(View gate_h, ConstView gate_up, std::int64_t rows,
                                            std::int64_t hidden) {
  const char* op = "swiglu_forward_beside_gate";
  for_compute_type(op, gate_h.dtype, [&](auto zero) {
    using T = decltype(zero);
    forward_beside_gate(output<T>(op, "gate_h", gate_h, rows * 2 * hidden),
                        input<T>(op, "gate_up", gate_up, rows * 2 * hidden), rows, hidden);
  });
}

void CpuBackend::swiglu_backward_from_output(View dgate_up, ConstView dh, ConstView gate_h, std::int64_t rows,
                                             std::int64_t hidden) {
  const char* op = "swiglu_backward_from_output";
  for_compute_type(op, dgate_up.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward_from_output(output<T>(op, "dgate_up", dgate_up, rows * 2 * hidden),
                         input<T>(op, "dh", dh, rows * hidden),
                         input<T>(op, "gate_h", gate_h, rows * 2 * hidden), rows, hidden);
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
